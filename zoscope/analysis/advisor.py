"""Advice on an optimizer for any number of steps: what was measured once, asked again by every check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from zoscope.analysis.recommend import SHORT, Advice, Threshold, Thresholds, advise
from zoscope.theory.horizons import horizon_curve

if TYPE_CHECKING:
    from zoscope.analysis.minibatch_results import MiniBatchModel
    from zoscope.theory.curve import GradientMeasure
    from zoscope.theory.horizons import HorizonPoint
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Estimate, SampledSpectrum

LONG_WAY = 1.1
"""Decrease of the loss over the planned run, relative to the loss, that no quadratic model with a minimum can mean."""


@dataclass(frozen=True)
class Advisor:
    """Advice for an update rule at a measured point.

    Args:
        rule: Update rule.
        moments: Constants of the estimator.
        spectrum: Of the operator that the rule acts through, all examples.
        gradient: Spectral measure of the gradient in the operator's coordinates; ``None`` for a zero gradient.
        loss: Loss at the point.
        descent: Descent threshold, that of mini-batches where training uses them; ``None`` for a zero gradient.
        exact: Infinite-time threshold, likewise; ``None`` where there is none.
        batches: η*(T) with mini-batches; ``None`` where every step sees all examples.
        doubts: Codes of what speaks against the point whatever the number of steps.
        points: Points of η*(T) that are known already.
    """

    rule: UpdateRule
    moments: EstimatorMoments
    spectrum: SampledSpectrum
    gradient: GradientMeasure | None
    loss: float
    descent: Estimate | None
    exact: Estimate | None
    batches: MiniBatchModel | None = None
    doubts: tuple[str, ...] = ()
    points: tuple[HorizonPoint, ...] = ()

    def at(self, steps: int, wanted: Threshold) -> Advice:
        """Advice for a planned number of steps, by the threshold that is wanted."""
        return self.for_each(steps, (wanted,))[wanted]

    def for_each(self, steps: int, names: Sequence[Threshold]) -> dict[Threshold, Advice]:
        """Advice for a planned number of steps, by each of several thresholds."""
        point = self._point(steps)
        plain = Thresholds(point, self.descent, self.exact, minibatch=self.batches is not None)
        doubted: Thresholds | None = None
        found = {}
        for wanted in names:
            advice = advise(wanted, plain)
            doubts = tuple(self._doubts(plain, advice.recommended))
            if doubts:
                doubted = doubted or replace(plain, short=self._short(point))
                advice = advise(wanted, doubted, doubts)
            found[wanted] = advice
        return found

    def _short(self, planned: HorizonPoint) -> Estimate:
        """η*(min(N, 300)) of all eigenvalues."""
        if planned.steps <= SHORT:
            return planned.lower
        return self._point(SHORT).lower if self.batches is None else self.batches.of_all(SHORT)

    def _point(self, steps: int) -> HorizonPoint:
        for point in self.points:
            if point.steps == steps:
                return point
        if self.batches is not None:
            return self.batches.at(steps)
        (point,) = horizon_curve(self.spectrum, [steps], rule=self.rule, moments=self.moments)
        return point

    def _doubts(self, thresholds: Thresholds, lr: float | None) -> Iterator[str]:
        """Codes; those of the run are about the step size that would be recommended without any."""
        if self.share(lr, thresholds.horizon.steps) > LONG_WAY:
            yield "gradient-not-small"
        yield from self.doubts
        if thresholds.ends_are_apart:
            yield "ends-apart"

    def share(self, lr: float | None, steps: int) -> float:
        """Part of the loss that gradient descent of a step size gains on the quadratic model within some steps."""
        if self.gradient is None or lr is None or self.loss == 0:
            return 0.0
        step = lr * self.rule.lr_scale / (1 - self.rule.momentum)
        return decrease(self.gradient, step=step, steps=steps) / abs(self.loss)


def decrease(gradient: GradientMeasure, *, step: float, steps: int) -> float:
    """What gradient descent gains on the quadratic model: ``Σ c (1 − (1 − ηθ)^2N) / 2θ``."""
    theta = np.where(gradient.nodes == 0, np.finfo(float).tiny, gradient.nodes)
    with np.errstate(over="ignore", divide="ignore"):  # along negative curvature the gain has no bound
        gains = -np.expm1(2 * steps * np.log(np.abs(1 - step * theta))) / (2 * theta)
        gains = np.where(np.abs(step * theta) < 1e-12, step * steps, gains)
    found = float(gradient.weights @ gains)
    return found if not math.isnan(found) else math.inf
