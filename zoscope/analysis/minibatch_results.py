"""What mini-batches do to the thresholds of an optimizer, as a result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoscope.theory.horizons import LONGEST_RUN, HorizonPoint
from zoscope.theory.mean_square import Version
from zoscope.theory.minibatch import MiniBatchCondition
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from zoscope.theory.minibatch import HessianNoise
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import SampledSpectrum


@dataclass(frozen=True)
class MiniBatchModel:
    """Thresholds of one update rule with mini-batches, for any number of steps.

    Args:
        rule: Update rule.
        moments: Constants of the estimator.
        spectrum: Of the operator of all examples.
        noise: Spread of the examples' operators around it.
        spread: Variance of a mini-batch in units of that of one example.
        scale: Factor on every threshold: how much larger Adam's P is with the noise of mini-batches in it.
    """

    rule: UpdateRule
    moments: EstimatorMoments
    spectrum: SampledSpectrum
    noise: HessianNoise
    spread: float
    scale: float = 1.0

    def at(self, steps: int) -> HorizonPoint:
        """η*(T), full and positive."""
        upper = self._threshold(steps, "positive")
        assert upper is not None
        return HorizonPoint(steps, self.of_all(steps), upper)

    def of_all(self, steps: int) -> Estimate:
        """η*(T) of all eigenvalues."""
        lower = self._threshold(steps, "full")
        assert lower is not None
        return lower

    def for_ever(self) -> Estimate | None:
        """The infinite-time threshold; ``None`` where noise accumulates along flat or negative curvature."""
        return self._threshold(None, "positive")

    def blow_up(self, lr: float, *, version: Version) -> float:
        """The smallest T at which a step size is no longer stable; ``inf`` for not within ``LONGEST_RUN`` steps."""
        late = 1
        while not self.unstable_at(lr, late, version):
            late *= 2
            if late > LONGEST_RUN:
                return math.inf
        early = late // 2
        while late - early > 1:
            middle = (early + late) // 2
            early, late = (early, middle) if self.unstable_at(lr, middle, version) else (middle, late)
        return float(late)

    def unstable_at(self, lr: float, steps: int, version: Version) -> bool:
        """Whether a step size passes the threshold within a number of steps."""
        return self._condition(steps, version).total_feedback(self.spectrum.fine, self.noise, lr / self.scale) >= 1

    def _condition(self, steps: int | None, version: Version) -> MiniBatchCondition:
        return MiniBatchCondition(self.rule, self.spread, self.moments, steps, version)

    def _threshold(self, steps: int | None, version: Version) -> Estimate | None:
        found = self._condition(steps, version).estimate(self.spectrum, self.noise)
        if found is None:
            return None
        return Estimate(self.scale * found.value, self.scale * found.stderr, self.scale * found.quadrature)


@dataclass(frozen=True)
class ForwardMiniBatch:
    """What forward passes know of mini-batches of B examples, drawn anew at every step.

    Args:
        batch_size: B.
        examples: n, what they are drawn from.
        steps: Planned number of steps.
        descent: Largest step size with a falling expected loss; ``None`` at a stationary point.
        lower: Lower bound of η*(N), positive ones; where negative curvature was seen, from the number of steps alone.
        upper: Upper bound of the infinite-time threshold.
        noise_sq: ``E‖g_B − g‖²``, loss²/param².
        hessian_spread_sq: ``E‖H_B − H‖_F²``, loss²/param⁴.
        num_hvps: Directions spent.
    """

    batch_size: int
    examples: int
    steps: int
    descent: Estimate | None
    lower: Estimate
    upper: Estimate
    noise_sq: Estimate
    hessian_spread_sq: Estimate
    num_hvps: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: that of `MiniBatchBounds`, null where a spectrum is needed, and more."""
        from zoscope.analysis.optimizer_bounds import estimate_dict

        return {
            "batch_size": self.batch_size,
            "examples": self.examples,
            "horizon": {"steps": self.steps, "lower": None, "upper": None, "ci95": [None, None]},
            "exact": None,
            "exact_ci95": None,
            "descent": None if self.descent is None else estimate_dict(self.descent),
            "num_hvps": self.num_hvps,
            "lower": {**estimate_dict(self.lower), "assumes": "no example has negative curvature"},
            "upper": {**estimate_dict(self.upper), "assumes": None},
            "noise_sq": estimate_dict(self.noise_sq),
            "hessian_spread_sq": estimate_dict(self.hessian_spread_sq),
        }


@dataclass(frozen=True)
class MiniBatchBounds:
    """Thresholds with mini-batches of B examples, drawn anew at every step without replacement within a step.

    Args:
        batch_size: B.
        examples: n, what they are drawn from.
        horizon: η*(N), full and positive.
        exact: Infinite-time threshold; ``None`` where no step size is stable for ever.
        descent: Largest step size with a falling expected loss; ``None`` at a stationary point.
        num_hvps: Cost, in Hessian-vector products on all examples.
        model: For other numbers of steps.
    """

    batch_size: int
    examples: int
    horizon: HorizonPoint
    exact: Estimate | None
    descent: Estimate | None
    num_hvps: int
    model: MiniBatchModel = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        from zoscope.analysis.optimizer_bounds import ci95, estimate_dict, number

        point = self.horizon
        return {
            "batch_size": self.batch_size,
            "examples": self.examples,
            "horizon": {
                "steps": point.steps,
                "lower": number(point.lower.value),
                "upper": number(point.upper.value),
                "ci95": [number(ci95(point.lower)[0]), number(ci95(point.upper)[1])],
            },
            "exact": None if self.exact is None else number(self.exact.value),
            "exact_ci95": None if self.exact is None else [number(end) for end in ci95(self.exact)],
            "descent": None if self.descent is None else estimate_dict(self.descent),
            "num_hvps": self.num_hvps,
        }
