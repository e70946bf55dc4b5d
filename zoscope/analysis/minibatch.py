"""What mini-batches do to the thresholds of an optimizer, as a result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zoscope.analysis.thresholds import Pair, ci95, point_dict
from zoscope.curvature.minibatch import Eigenpairs, GradientNoise, gradient_noise, hessian_noise
from zoscope.curvature.operators import LinearOperator, Preconditioned, ShardOperator
from zoscope.curvature.preconditioner import expected_diagonal
from zoscope.errors import UsageError
from zoscope.problem.objective import Examples
from zoscope.result import JsonObject, encode, pick
from zoscope.runtime import spawn_generators
from zoscope.theory.minibatch import MiniBatchCondition, spread_of_batches
from zoscope.theory.spectrum import Estimate, widening
from zoscope.theory.stability import LONGEST_RUN, HorizonPoint, Version

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.analysis.measurement import Slope
    from zoscope.problem import Objective
    from zoscope.theory.minibatch import HessianNoise
    from zoscope.theory.rules import EstimatorMoments, UpdateRule
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
        return None if found is None else found.scaled(self.scale)


@dataclass(frozen=True)
class ForwardMiniBatch(JsonObject):
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
        return {
            **pick(self, "batch_size examples"),
            "horizon": {"steps": self.steps, "lower": None, "upper": None, "ci95": [None, None]},
            "exact": None,
            "exact_ci95": None,
            **pick(self, "descent num_hvps"),
            "lower": encode(self.lower) | {"assumes": "no example has negative curvature"},
            "upper": encode(self.upper) | {"assumes": None},
            **pick(self, "noise_sq hessian_spread_sq"),
        }


@dataclass(frozen=True)
class MiniBatchBounds(JsonObject):
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

    keys = "batch_size examples horizon exact=exact.value exact_ci95 descent num_hvps"

    batch_size: int
    examples: int
    horizon: HorizonPoint
    exact: Estimate | None
    descent: Estimate | None
    num_hvps: int
    model: MiniBatchModel = field(repr=False, compare=False)

    @property
    def exact_ci95(self) -> Pair | None:
        """95 % interval of the infinite-time threshold."""
        return None if self.exact is None else ci95(self.exact)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return super().to_dict() | {"horizon": point_dict(self.horizon)}


Array = NDArray[np.float64]


@dataclass(frozen=True)
class BatchSpread:
    """What one operator's mini-batches are like; plain numbers.

    Args:
        batch_size: B.
        examples: n.
        spread: Variance of a mini-batch in units of that of one example.
        noise: Spread of the examples' Hessians.
        slope: Of the mean; ``None`` for a zero gradient.
        noise_curvature: ``(p,)`` samples of ``E (g_B-g)ᵀP⁻¹HP⁻¹(g_B-g)``.
        noise_sq: ``(p,)`` samples of ``E‖g_B-g‖²``.
        scale: How much larger Adam's P is with the noise of mini-batches in it.
        num_hvps: Cost, in Hessian-vector products on all examples.
        num_sweeps: The part of it that were sweeps over the data in random groups.
    """

    batch_size: int
    examples: int
    spread: float
    noise: HessianNoise
    slope: Slope | None
    noise_curvature: Array
    noise_sq: Array
    scale: float
    num_hvps: int
    num_sweeps: int

    def bounds(
        self, spectrum: SampledSpectrum, *, steps: int, rule: UpdateRule, moments: EstimatorMoments
    ) -> MiniBatchBounds:
        """The thresholds of an update rule."""
        model = MiniBatchModel(rule, moments, spectrum, self.noise, self.spread, self.scale)
        return MiniBatchBounds(
            batch_size=self.batch_size,
            examples=self.examples,
            horizon=model.at(steps),
            exact=model.for_ever(),
            descent=self._descent(rule, moments),
            num_hvps=self.num_hvps,
            model=model,
        )

    def _descent(self, rule: UpdateRule, moments: EstimatorMoments) -> Estimate | None:
        if self.slope is None:
            return None

        def threshold(curvature: float, square: float) -> float:
            assert self.slope is not None
            return self.scale * self.slope.threshold(rule, moments, noise_curvature=curvature, noise_sq=square)

        value = threshold(float(self.noise_curvature.mean()), float(self.noise_sq.mean()))
        samples = [threshold(float(c), float(s)) for c, s in zip(self.noise_curvature, self.noise_sq, strict=True)]
        if not np.isfinite([value, *samples]).all():
            return Estimate(value)
        # Widened by Student's factor, so that ±1.96 of it is a 95 % interval.
        return Estimate(value, widening(len(samples) - 1) * float(np.std(samples, ddof=1)) / math.sqrt(len(samples)))


class Batches:
    """Measures the spread of mini-batches beside the operators of a problem.

    Args:
        objective: The prepared problem.
        base: The curvature of all examples.
        g: ``(d,)`` their mean gradient.
        batch_size: B.
        seed: Seed of every random number.
        eps: ε of Adam's P where it is the expected one; ``None`` for one that has seen mini-batches itself.

    Raises:
        UsageError: If the batches cannot be cut into examples and are not of that size.
    """

    def __init__(
        self, objective: Objective, base: LinearOperator, g: Tensor, *, batch_size: int, seed: int, eps: float | None
    ) -> None:
        assert isinstance(base, ShardOperator)
        self._objective, self._base, self._g = objective, base, g
        self._batch_size, self._eps = batch_size, eps
        self._examples = Examples(objective)
        self._pairs: Eigenpairs | None = None
        # A stream of its own: what is measured of all examples does not depend on the batch size.
        *_, self._generator = spawn_generators(seed, 8, base.device)
        size = batch_size
        if self._examples.whole:
            require_whole(objective, size)
            size = 1
        self.spread = spread_of_batches(self._examples.count, size)

    def keep(self, values: Array, vectors: Tensor) -> None:
        """Eigenpairs of the operator that is being measured."""
        self._pairs = Eigenpairs.largest(values, vectors)

    @cached_property
    def _gradient(self) -> GradientNoise:
        return gradient_noise(self._objective, self._examples, self._g, generator=self._generator)

    def spread_of(self, slope: Slope | None, moments: EstimatorMoments, *, diagonal: Tensor | None) -> BatchSpread:
        """Of the operator whose eigenpairs were kept last, and of the gradient.

        Args:
            slope: Of the mean gradient.
            moments: Constants of the estimator.
            diagonal: Adam's P; ``None`` for gradient descent.
        """
        assert self._pairs is not None
        before, gradients = self._base.num_hvps, self._gradient
        operator = self._base if diagonal is None else Preconditioned(self._base, diagonal)
        noise, sweeps = hessian_noise(operator, self._examples, self._pairs, generator=self._generator)
        directions = gradients.vectors if diagonal is None else gradients.vectors / diagonal
        curved = (directions.double() * self._base.matmat(directions).double()).sum(dim=1).cpu().numpy()
        return BatchSpread(
            batch_size=self._batch_size,
            examples=self._objective.num_examples,
            spread=self.spread,
            noise=noise,
            slope=slope,
            noise_curvature=self.spread * curved,
            noise_sq=self.spread * gradients.traces,
            scale=self._scale(diagonal, gradients, moments),
            num_hvps=self._base.num_hvps - before + sweeps,
            num_sweeps=sweeps,
        )

    def _scale(self, diagonal: Tensor | None, gradients: GradientNoise, moments: EstimatorMoments) -> float:
        """Mean ratio of P with mini-batches to P without."""
        if diagonal is None or self._eps is None:
            return 1.0
        noisy = expected_diagonal(self._g, moments=moments, eps=self._eps, variance=self.spread * gradients.variance)
        return float((noisy / diagonal.double()).mean())


def require_whole(objective: Objective, size: int) -> None:
    """See that batches which cannot be cut can be mini-batches of that size.

    Raises:
        UsageError: If there are fewer than two, or they have another size.
    """
    sizes = {shard.examples for shard in objective.shards}
    if len(objective.shards) > 1 and sizes == {size}:
        return
    found = ", ".join(str(s) for s in sorted(sizes)[:4])
    count = len(objective.shards)
    if count == 1:
        raise UsageError(
            f"--batch-size {size}: the problem has one batch, which cannot be cut into examples, so there is nothing "
            f"to draw mini-batches from. Expected at least two batches of {size} examples in the spec."
        )
    raise UsageError(
        f"--batch-size {size}: the problem's {count} batches cannot be cut into examples, so a "
        f"mini-batch can only be one of them, of {found} examples. Make batches of {size} in the spec, at least two."
    )
