"""What forward passes say of training with mini-batches: the noise of gradients, and an upper bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoscope.analysis.minibatch import require_whole
from zoscope.analysis.minibatch_results import ForwardMiniBatch
from zoscope.analysis.propagation import propagated
from zoscope.curvature.scatter import mean_of, ratio_of
from zoscope.problem.examples import Examples
from zoscope.theory.descent import along_gradient
from zoscope.theory.minibatch import spread_of_batches
from zoscope.theory.spectrum import Estimate
from zoscope.theory.thresholds import forward_only_batches, forward_only_bounds, forward_only_horizon

if TYPE_CHECKING:
    from zoscope.curvature.results import ForwardCurvature
    from zoscope.problem import Objective
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule


@dataclass(frozen=True)
class ForwardBatches:
    """Mini-batches of a size, as forward passes see them.

    Args:
        batch_size: B.
        examples: n, what they are drawn from.
        spread: Variance of a mini-batch in units of that of one example.
    """

    batch_size: int
    examples: int
    spread: float

    @classmethod
    def of(cls, objective: Objective, batch_size: int) -> ForwardBatches:
        """Of a prepared problem.

        Raises:
            UsageError: If its batches cannot be cut into examples and are not of that size.
        """
        examples, size = Examples(objective), batch_size
        if examples.whole:
            require_whole(objective, batch_size)
            size = 1
        return cls(batch_size, objective.num_examples, spread_of_batches(examples.count, size))

    def noise_sq(self, found: ForwardCurvature) -> Estimate:
        """``E‖g_B − g‖²``."""
        assert found.noise is not None
        mean = mean_of(found.noise.gradient_sq)
        return Estimate(self.spread * mean.value, self.spread * mean.stderr, self.spread * found.noise.gradient_error)

    def hessian_sq(self, found: ForwardCurvature) -> Estimate:
        """``E‖H_B − H‖_F²``."""
        assert found.noise is not None
        part = found.noise.hessian_sq
        return Estimate(self.spread * part.value, self.spread * part.stderr, self.spread * part.quadrature)

    def descent(self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments) -> Estimate | None:
        """Step size below which the expected loss falls, ``E g_BᵀHg_B`` and ``E‖g_B‖²`` in the place of those of g.

        Both noises are taken in units of ``‖g‖²``, from the same directions: what is uncertain of it is so in both.
        """
        if found.rayleigh is None:
            return None
        trace, rayleigh, noise = found.trace, found.rayleigh, self._noise(found, moments)
        along = along_gradient(moments, rule)
        of_trace = moments.b * (1 + noise.relative)
        curvature = of_trace * trace.value + along * rayleigh.value + noise.curvature.value
        if curvature <= 0:
            return Estimate(math.inf)
        value = 2 * (1 - rule.momentum) / (rule.lr_scale * curvature)
        error = math.hypot(abs(along) * rayleigh.half_width, noise.curvature.half_width)
        # The two noises are of the same directions, and the trace of more of them.
        error += abs(moments.b * trace.value) * noise.relative_half_width
        return Estimate(value, value * math.hypot(of_trace * trace.half_width, error) / curvature / 1.96)

    def upper(self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments) -> Estimate:
        """Upper bound of the infinite-time threshold."""
        frobenius_sq = max(found.frobenius_sq.value, 0.0)

        def bound(p1: float, spread_sq: float) -> float:
            return forward_only_batches(p1, frobenius_sq, max(spread_sq, 0.0), rule=rule, moments=moments)

        def of_norm(p1: float, p2: float) -> float:
            spread_sq = max(self.hessian_sq(found).value, 0.0)
            return forward_only_batches(p1, max(p2, 0.0), spread_sq, rule=rule, moments=moments)

        first = propagated(bound, found.trace, self.hessian_sq(found), independent=False)
        second = propagated(of_norm, found.trace, found.frobenius_sq, independent=False)
        return Estimate(first.value, math.hypot(first.half_width, second.half_width) / 1.96)

    def lower(self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments, steps: int) -> Estimate:
        """Lower bound of η*(N): from the number of steps, or, where it is larger, that of all examples times B/n."""
        spread = self.hessian_sq(found)

        def in_steps(p2: float, spread_sq: float) -> float:
            squares = max(p2, 0.0) + max(spread_sq, 0.0)
            return forward_only_horizon(squares, steps, rule=rule, moments=moments)

        def for_ever(p1: float, p2: float) -> float:
            share = min(self.batch_size / self.examples, 1.0)
            return share * forward_only_bounds(p1, max(p2, 0.0), rule=rule, moments=moments).lower

        first = propagated(in_steps, found.frobenius_sq, spread, independent=False)
        if found.indefinite or found.trace.value <= 0:
            return first
        second = propagated(for_ever, found.trace, found.frobenius_sq, independent=False)
        return max(first, second, key=lambda estimate: estimate.value)

    def bounds(
        self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments, scale: float, steps: int
    ) -> ForwardMiniBatch:
        """What can be said of one update rule.

        Args:
            found: What was measured.
            rule: Update rule.
            moments: Constants of the estimator.
            scale: Adam's P, with the noise of mini-batches in it; 1 for other rules.
            steps: Planned.
        """
        descent = self.descent(found, rule=rule, moments=moments)
        return ForwardMiniBatch(
            batch_size=self.batch_size,
            examples=self.examples,
            steps=steps,
            descent=None if descent is None else _scaled(descent, scale),
            lower=_scaled(self.lower(found, rule=rule, moments=moments, steps=steps), scale),
            upper=_scaled(self.upper(found, rule=rule, moments=moments), scale),
            noise_sq=self.noise_sq(found),
            hessian_spread_sq=self.hessian_sq(found),
            num_hvps=found.num_hvps,
        )

    def _noise(self, found: ForwardCurvature, moments: EstimatorMoments) -> _RelativeNoise:
        noise = found.noise
        assert noise is not None
        relative = ratio_of(self.spread * noise.gradient_sq, noise.slopes_sq)
        curved = ratio_of(self.spread * moments.a * noise.curvature, noise.slopes_sq)
        square = float(noise.slopes_sq.mean())
        rough = (self.spread * noise.gradient_error + relative.value * noise.slopes_error) / square
        return _RelativeNoise(relative.value, relative.half_width + rough, curved)


@dataclass(frozen=True)
class _RelativeNoise:
    """Noise of gradients in units of ``‖g‖²``: its square, and a times the curvature that it meets."""

    relative: float
    relative_half_width: float
    curvature: Estimate


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    return Estimate(scale * estimate.value, scale * estimate.stderr, scale * estimate.quadrature)


def noisy_square(found: ForwardCurvature, batches: ForwardBatches | None) -> float:
    """``E‖g_B‖²``."""
    return found.gradient_sq.value + (0.0 if batches is None else float(np.maximum(batches.noise_sq(found).value, 0.0)))
