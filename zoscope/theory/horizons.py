"""For how many steps a step size is stable, and which ones are for a given number of steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zoscope.theory.mean_square import StabilityCondition, Version, estimates
from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum

LONGEST_RUN = 2**50
"""Steps beyond which a blow-up counts as never."""


@dataclass(frozen=True)
class HorizonPoint:
    """Thresholds for a number of steps.

    Args:
        steps: Horizon T.
        lower: η*(T) of the full spectrum, param²/loss.
        upper: η*(T) of the positive part, param²/loss.
    """

    steps: int
    lower: Estimate
    upper: Estimate


def horizon_curve(
    sampled: SampledSpectrum, steps: Sequence[int], *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> tuple[HorizonPoint, ...]:
    """η*(T), full and positive, for every T of ``steps``.

    Args:
        sampled: Spectrum with its error information.
        steps: Horizons, positive integers.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        One point per horizon, in the order given.

    Raises:
        ValueError: If a horizon is not a positive integer.

    Source: derived in the README's theory section.
    """
    conditions = [
        StabilityCondition(rule, moments, horizon, version) for horizon in steps for version in ("full", "positive")
    ]
    found = iter(estimates(conditions, sampled))
    return tuple(HorizonPoint(horizon, lower=next(found), upper=next(found)) for horizon in steps)


def time_to_blow_up(
    spectrum: Spectrum,
    lr: float,
    *,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    version: Version = "positive",
) -> float:
    """Number of steps after which ``lr`` is no longer stable: the smallest T with ``Σ w φ_lr ≥ 1``.

    Args:
        spectrum: Nodes ``(n,)`` in loss/param², weights ``(n,)``.
        lr: Step size in param²/loss.
        rule: Update rule.
        moments: Constants of the estimator.
        version: As in ``StabilityCondition``.

    Returns:
        A whole number ≥ 1; ``inf`` when the feedback never reaches 1, or not within 2^50 steps.

    Raises:
        ValueError: If ``lr`` is not positive or the version unknown.

    Source: derived in the README's theory section.
    """

    def unstable_at(steps: int) -> bool:
        return StabilityCondition(rule, moments, steps, version).total_feedback(spectrum, lr) >= 1

    escapes = version == "full" and bool((spectrum.nodes[spectrum.weights != 0] < 0).any())
    if not escapes and StabilityCondition(rule, moments).total_feedback(spectrum, lr) <= 1:
        return math.inf
    late = 1
    while not unstable_at(late):
        late *= 2
        if late > LONGEST_RUN:
            return math.inf
    early = late // 2  # stable for `early` steps, not for `late`
    while late - early > 1:
        middle = (early + late) // 2
        early, late = (early, middle) if unstable_at(middle) else (middle, late)
    return float(late)
