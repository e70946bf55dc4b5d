"""From thresholds to advice: what binds, which step size to use, what a given one would do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from zoscope.analysis.optimizer_bounds import Binding, Outlook, ThresholdName, Verdict
from zoscope.theory.curve import GradientMeasure, predicted_loss
from zoscope.theory.horizons import time_to_blow_up
from zoscope.theory.mean_square import Version
from zoscope.theory.typical import typical_doubling_time

if TYPE_CHECKING:
    from zoscope.analysis.minibatch_results import MiniBatchBounds
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Spectrum

Threshold = Literal["exact", "descent", "horizon", "binding"]

VERSIONS: tuple[Version, ...] = ("full", "positive")

MARGIN = 0.7
"""Share of the binding threshold that is recommended. Runs at 0.8 of it have been seen to sharpen their way past it."""


def choose_binding(
    wanted: Threshold, *, horizon: float | None, descent: float | None, exact: float | None
) -> Binding | None:
    """The threshold that counts.

    Args:
        wanted: ``"binding"`` takes the smaller one of horizon and descent (the infinite-time threshold where neither is
            known); any other name takes that one.
        horizon: η*(N) of the positive part.
        descent: Descent threshold.
        exact: Infinite-time threshold.

    Returns:
        ``None`` where the threshold is not defined.
    """
    values: dict[ThresholdName, float | None] = {"horizon": horizon, "descent": descent, "exact": exact}
    candidates: tuple[ThresholdName, ...] = ("horizon", "descent") if wanted == "binding" else (wanted,)
    known = [(value, name) for name in candidates if (value := values[name]) is not None]
    if not known and wanted == "binding" and exact is not None:
        known = [(exact, "exact")]
    if not known:
        return None
    value, name = min(known, key=lambda pair: pair[0])
    return Binding(name, value)


def recommend(binding: Binding | None, *, full: float = math.inf) -> tuple[float | None, str]:
    """A step size with a margin below the binding threshold, and the reason for it.

    Args:
        binding: What limits the step size; ``None`` where no threshold is known.
        full: η*(N) of all eigenvalues, the only limit where none is positive.
    """
    if binding is None:
        return None, "no threshold is known here"
    if math.isfinite(binding.value):
        return MARGIN * binding.value, (
            f"{MARGIN:g} × the binding threshold, because curvature usually rises while a network trains"
        )
    if math.isfinite(full):
        return MARGIN * full, (
            f"no eigenvalue is positive; {MARGIN:g} × η*(N) of all eigenvalues, because noise grows along negative "
            "curvature too"
        )
    return None, "nothing limits the step size on this quadratic model"


def judge(
    lr: float,
    *,
    steps: int,
    spectrum: Spectrum,
    rule: UpdateRule,
    moments: EstimatorMoments,
    binding: Binding | None,
    descent: float | None,
    doubling: tuple[float, float] | None = None,
) -> Verdict:
    """What a step size does within the planned steps.

    Args:
        lr: Step size asked about, param²/loss.
        steps: Planned number of steps N.
        spectrum: All of the operator's spectrum.
        rule: Update rule.
        moments: Constants of the estimator.
        binding: The threshold to compare with.
        descent: Descent threshold.
        doubling: What ``doubling_steps`` says.
    """
    ends = [time_to_blow_up(spectrum, lr, rule=rule, moments=moments, version=version) for version in VERSIONS]
    first, last = min(ends), max(ends)
    outlook: Outlook = "unstable" if last <= steps else "uncertain" if first <= steps else "stable"
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=None if binding is None else lr / binding.value,
        outlook=outlook,
        blow_up=(first, last),
        doubling=doubling,
        descends=None if descent is None or rule.momentum > 0 else lr < descent,  # with momentum not about one step
    )


def judge_batches(lr: float, minibatch: MiniBatchBounds, *, binding: Binding | None, descent: float | None) -> Verdict:
    """What a step size does within the planned steps when every step sees a mini-batch.

    Args:
        lr: Step size asked about, param²/loss.
        minibatch: Thresholds with mini-batches.
        binding: The threshold to compare with.
        descent: Descent threshold.
    """
    model, steps = minibatch.model, minibatch.horizon.steps
    ends = [model.blow_up(lr, version=version) for version in VERSIONS]
    first, last = min(ends), max(ends)
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=None if binding is None else lr / binding.value,
        outlook="unstable" if last <= steps else "uncertain" if first <= steps else "stable",
        blow_up=(first, last),
        doubling=None,
        descends=None if descent is None or model.rule.momentum > 0 else lr < descent,
    )


def doubling_steps(
    lr: float,
    *,
    steps: int,
    spectrum: Spectrum,
    gradient: GradientMeasure,
    loss: float,
    rule: UpdateRule,
    moments: EstimatorMoments,
) -> tuple[float, float]:
    """When the loss has risen by its own value: in the mean over runs, and in a typical run.

    This is when a blow-up shows. Feedback passes 1 long before where the gradient, which starts the noise, is small.
    The mean counts all eigenvalues and is led by the unluckiest runs; the typical run counts the positive ones only.

    Args:
        lr: Step size, param²/loss.
        steps: Steps to look ahead.
        spectrum: All of the operator's spectrum.
        gradient: Spectral measure of the gradient.
        loss: Loss at the start, not 0.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        The earlier and the later one; ``inf`` for not within ``steps``.
    """
    curve = predicted_loss(spectrum, gradient, loss=loss, lr=lr, steps=steps, rule=rule, moments=moments)
    risen = np.flatnonzero(curve - loss >= abs(loss))
    mean = float(risen[0]) if risen.size else math.inf
    typical = typical_doubling_time(
        spectrum.positive, gradient, loss=loss, lr=lr, steps=steps, rule=rule, moments=moments
    )
    return min(mean, typical), max(mean, typical)
