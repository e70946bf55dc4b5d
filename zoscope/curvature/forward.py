"""Trace, Frobenius norm and the curvature along the gradient, from forward passes alone.

``X = uᵀHu`` with Gaussian u is ``Σ λ_i z_i²``: mean ``Tr H``, variance ``2‖H‖_F²``, excess kurtosis at most 12, and
skewed where few eigenvalues carry the sum. Error bars of normal samples would be too short.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from zoscope.curvature.finite_difference import Combination, Difference, Stencil, choose_step
from zoscope.curvature.nonsmooth import Jump, jump_along
from zoscope.curvature.operators import Array
from zoscope.curvature.slq import ForwardCurvature, ForwardNoise, OnProgress, relative
from zoscope.errors import NumericalError, UsageError
from zoscope.optim.directions import Direction, new_generator
from zoscope.problem import Objective
from zoscope.problem.model import ShardedGroup
from zoscope.problem.objective import Examples
from zoscope.runtime import collective
from zoscope.theory.minibatch import spread_of_batches
from zoscope.theory.spectrum import Estimate, widening

MOST_KURTOSIS = 12.0
"""Of a single squared Gaussian, the most skewed member of the family."""

NORMAL_95 = 1.96


def mean_of(values: ArrayLike) -> Estimate:
    """Mean of a sample ``(n,)``, its standard error widened so that 1.96 of them make a 95 % interval.

    Student's quantile takes as many degrees of freedom as the sample variance really has.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.inf)
    stderr = float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(float(x.mean()), stderr * widening(max(_freedom(x), 1.0)))


def variance_of(values: ArrayLike) -> Estimate:
    """Unbiased variance of a sample ``(n,)``; its standard error covers the longer, upper arm of the interval."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(0.0, math.inf)
    variance, freedom = float(x.var(ddof=1)), _freedom(x)
    from scipy.special import chdtri  # slow to import, and needed for forward passes alone

    arm = freedom / float(chdtri(freedom, 0.975)) - 1
    return Estimate(variance, variance * arm / NORMAL_95)


def ratio_of(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Ratio of the means of two samples ``(n,)`` taken together; its standard error covers the longer arm.

    Few samples of a skewed law mostly miss its tail, and show too little scatter then. Johnson's correction for that
    (J. Am. Stat. Assoc. 73, 536, 1978) moves the interval by ``γ(1 + 2t²)s/6n``, towards the tail.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if len(a) < 2 or b.mean() <= 0:
        return Estimate(0.0, math.inf)
    ratio = float(a.mean() / b.mean())
    rest = a - ratio * b
    stderr = float(rest.std(ddof=1)) / (math.sqrt(len(a)) * float(b.mean()))
    t = NORMAL_95 * widening(len(a) - 1)
    arm = t + _skewness(rest) * (1 + 2 * t**2) / (6 * math.sqrt(len(a)))
    return Estimate(ratio, stderr * arm / NORMAL_95)


def _skewness(x: Array) -> float:
    """Size of the skewness, corrected for the smallness of the sample."""
    n, z = len(x), x - x.mean()
    second = float(np.mean(z**2))
    if n < 3 or second <= 0:
        return 0.0
    return abs(float(np.mean(z**3))) / math.pow(second, 1.5) * math.sqrt(n * (n - 1)) / (n - 2)


def _freedom(x: Array) -> float:
    """Degrees of freedom of a chi-square as uncertain as the sample variance: ``2 / (Var s² / σ⁴)``.

    ``Var s²/σ⁴ = 2/(n-1) + κ/n``. The sample kurtosis of skewed laws is too small; ``κ ≥ 1.5 skewness²`` holds in the
    family (Cauchy-Schwarz on ``Tr H³``), and skewness is better known.
    """
    n = len(x)
    excess = MOST_KURTOSIS
    z = x - x.mean()
    second = float(np.mean(z**2))
    if n >= 4 and second > 0:
        g2 = float(np.mean(z**4)) / second**2 - 3
        sampled = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * g2 + 6)
        excess = min(max(sampled, 1.5 * _skewness(x) ** 2, 0.0), MOST_KURTOSIS)
    return 2 / (2 / (n - 1) + excess / n)


T = TypeVar("T")

_TO_NONE = 4 / 3
"""Truncation at h over the change from h/2 to h."""

_CPU = torch.device("cpu")
_OF_PARTS = 1 << 20
"""Keeps the stream of parts apart from those of directions on other devices and ranks."""


@dataclass(frozen=True)
class Noise:
    """How single examples e spread, as the random parts of the data show along some directions.

    Args:
        gradient_sq: Estimate of ``E‖g_e − g‖²``.
        gradient_checks: The same along each of the first few directions, from steps of h/2 and h, ``(2, c)``.
        curvature: Estimate of ``E (g_e − g)ᵀH(g_e − g)``.
        hessian_sq: Estimate of ``E‖H_e − H‖_F²``.
        hessian_shift: By how much truncation and rounding may have moved it.
    """

    gradient_sq: float
    gradient_checks: Array
    curvature: float
    hessian_sq: float
    hessian_shift: float


@dataclass(frozen=True)
class Group:
    """Some directions and the stencil along the gradient estimate that they make.

    Args:
        slopes: ``uᵀg``, ``(q,)``.
        curvatures: ``uᵀHu``, ``(q,)``.
        checks: ``uᵀg`` and ``uᵀHu`` of the first few, from steps of h/2 and h, ``(2, 2, c)``.
        along_gradient: An unbiased estimate of ``gᵀHg``.
        noise: How examples spread around their mean; ``None`` where that was not asked for.
    """

    slopes: Array
    curvatures: Array
    checks: Array
    along_gradient: float
    noise: Noise | None = None


class DirectionSampler:
    """Measures along numbered directions; the answer does not depend on how many ranks share them.

    Args:
        objective: Prepared with ``differentiable=False``.
        seed: Seed of the directions, and of the parts.
        parts: Into how many random parts the examples are divided for every group, to see how they spread; None
            leaves that out.
    """

    def __init__(self, objective: Objective, seed: int, parts: int | None = None) -> None:
        self._objective, self._seed, self._parts = objective, seed, parts
        self.ranks, self._mirrored = objective.ranks, objective.mirrored
        self._pilots: list[Direction] = []
        self.stencil = self._attempt(lambda: Stencil(objective, seed=seed))

    def _attempt(self, work: Callable[[], T]) -> T:
        """This rank's part of some work: on all of the data, or on its part of the model together with the others."""
        group = self._objective.process_group
        if isinstance(group, ShardedGroup):
            return group.attempt(work)
        with self._objective.alone():
            return self.ranks.attempt(work)

    @property
    def first_step(self) -> float:
        """Where truncation and rounding would balance for weights and curvature of the usual sizes.

        By a power of two from these sizes, as every step of the search: seeds then differ in what they find there only.
        """
        return math.ldexp(self.stencil.typical_size, round(0.25 * math.log2(self.stencil.epsilon)))

    def pilots(self, count: int) -> Callable[[float], list[Difference]]:
        """What tells the differences along the first ``count`` directions for any step."""
        return lambda h: self._all(DirectionSampler.pilot, list(range(count)), h)

    def groups(self, size: int, *, first: int, checks: int, h: float, most: int) -> Iterator[Group]:
        """Groups of ``size`` directions each, from number ``first`` on, in order; a few may be measured in vain."""
        self._pilots.clear()
        ahead = 1 if self._mirrored else self.ranks.size
        for start in range(0, most, ahead):
            firsts = [first + number * size for number in range(start, min(start + ahead, most))]
            yield from self._all(DirectionSampler.group, firsts, h, size, checks)

    def group(self, first: int, h: float, size: int, checks: int) -> Group:
        """One group of directions, from number ``first`` on, of which the first ``checks`` are measured at h/2 too."""
        numbers = range(first, first + size)
        if self._parts is None:
            return measure_group(self.stencil, numbers, checks=checks, h=h)
        objective = self.stencil.objective
        generator = new_generator(np.random.SeedSequence(self._seed, spawn_key=(first, _OF_PARTS)), _CPU)
        examples = Examples(objective)
        parts = examples.partition(self._parts, generator)
        scale = float(np.mean([spread_of_batches(examples.count, len(part)) for part in parts]))
        signs = 1.0 - 2.0 * torch.randint(0, 2, (len(parts),), generator=generator).double().numpy()
        with self.stencil.divided(parts, h):
            return measure_group(self.stencil, numbers, checks=checks, h=h, signs=signs, scale=scale)

    def jump(self) -> Jump | None:
        """Of a loss that is constant but for jumps; looked for by all ranks together where they share a model."""
        return self._jump() if self._mirrored else jump_along(self.stencil)

    @collective
    def _jump(self) -> Jump | None:
        return self._attempt(lambda: jump_along(self.stencil))

    @collective
    def _all(self, work: Callable[..., T], numbers: list[int], *args: float) -> list[T]:
        ranks = self.ranks
        if self._mirrored:
            return self._attempt(lambda: [work(self, number, *args) for number in numbers])

        def mine() -> list[T]:
            self.stencil.reach(args[0])  # moves θ to a grid where it is large: the same on every rank
            return [work(self, number, *args) for number in numbers[ranks.rank :: ranks.size]]

        parts = ranks.gather(self._attempt(mine))
        return [parts[i % ranks.size][i // ranks.size] for i in range(len(numbers))] if parts else []

    def pilot(self, number: int, h: float) -> Difference:
        """The differences along one of the directions that are measured at many steps."""
        while len(self._pilots) <= number:
            self._pilots.append(self.stencil.direction(len(self._pilots)))
        return self.stencil.along(self._pilots[number], h)


@contextmanager
def exploring(objective: Objective, *, seed: int, parts: int | None = None) -> Iterator[DirectionSampler]:
    """A sampler on all ranks that hold an objective.

    Args:
        objective: Prepared with ``differentiable=False``.
        seed: Seed of the directions.
        parts: As for `DirectionSampler`.
    """
    sampler = _sampler(objective, seed, parts)
    with objective.alone():
        yield sampler


@collective
def _sampler(objective: Objective, seed: int, parts: int | None) -> DirectionSampler:
    return objective.ranks.keep(DirectionSampler(objective, seed, parts))


def measure_group(
    stencil: Stencil,
    numbers: Sequence[int],
    *,
    checks: int,
    h: float,
    signs: Array | None = None,
    scale: float = 1.0,
) -> Group:
    """One group of directions.

    Args:
        stencil: What measures along them; divided where ``signs`` are given.
        numbers: Of the directions.
        checks: How many of the first ones are measured at h/2 too.
        h: The step.
        signs: ``(k,)`` random signs of the parts that the data are divided into.
        scale: Variance of a part in units of that of an example.
    """
    directions = [stencil.direction(number) for number in numbers]
    found = [_finite(stencil.along(u, h), h) for u in directions]
    slopes, curvatures = _columns(found)
    halves = [_finite(stencil.along(u, h / 2), h / 2) for u in directions[:checks]]
    checked = np.stack([_columns(halves), np.stack([slopes, curvatures])[:, :checks]], axis=1)

    def through(weights: Array) -> float:
        """``vᵀHv`` for the vector of which ``weights`` are the products with the directions, from pairs of them."""
        norm, size = float(np.linalg.norm(weights)), len(weights)
        if norm == 0:
            return 0.0
        c = weights / norm  # a sum with weights of norm 1 is as long as a direction, so that h suits it too
        whole = _finite(stencil.along(Combination(directions, c.tolist(), stencil.blocks), h), h).curvature
        return norm**2 * (whole - float(c**2 @ curvatures)) / (size * (size - 1))

    group = Group(slopes, curvatures, checked, through(slopes))
    if signs is None:
        return group
    apart, half = _disagreements(found), _disagreements(halves)
    # Σ ξ (g_part − g) has the covariance of examples, once divided by the root of what it adds up.
    noise = signs @ apart[0] / math.sqrt(len(signs) * scale)
    changes = _TO_NONE * (half[1] - apart[1][:, :checks])
    covariances = [float(np.cov(a, b)[0, 1]) for a, b in zip(apart[1][:, :checks], changes, strict=True)]
    return replace(
        group,
        noise=Noise(
            gradient_sq=float(np.mean(apart[0] ** 2)) / scale,
            gradient_checks=np.stack([np.mean(x**2, axis=0) for x in (half[0], apart[0][:, :checks])]) / scale,
            curvature=through(noise),
            hessian_sq=0.5 * float(apart[1].var(axis=1, ddof=1).mean()) / scale,
            hessian_shift=(float(np.abs(covariances).mean()) + 0.5 * float(changes.var(axis=1, ddof=1).mean())) / scale,
        ),
    )


def _disagreements(found: Sequence[Difference]) -> Array:
    """Slopes and curvatures of the parts less those of all data, ``(2, k, n)``."""
    return np.stack([d.parts - np.array([[d.slope], [d.curvature]]) for d in found if d.parts is not None], axis=-1)


def _columns(found: Sequence[Difference]) -> Array:
    return np.array([[d.slope for d in found], [d.curvature for d in found]])


def _finite(difference: Difference, h: float) -> Difference:
    if not (math.isfinite(difference.slope) and math.isfinite(difference.curvature)):
        raise NumericalError(
            f"The loss is not finite at a distance of {h:.2g} along a random direction: expected finite losses around "
            "the given parameters. The loss may overflow or leave its domain there; measure at another point, in "
            "--dtype float64, or restrict --params."
        )
    return difference


LEAST_DIRECTIONS = 40
"""Budget below which no error bar could be trusted."""

GROUP = 16
"""Directions that make one estimate of the gradient."""

LEAST_GROUPS = 4
"""Groups before a measurement may stop by itself."""

PILOTS = 8
"""Directions on which the step is chosen."""

CHECKS = 4
"""Directions of a group that are measured at h/2 too."""

ROUGH = 0.1
"""Disagreement of differences from which it is worth looking whether the loss has jumps."""

PARTS = 8
"""Random parts that the examples are divided into for every group of directions."""

ForwardPrecision = Callable[[ForwardCurvature], float]
"""Largest relative 95 % half-width among the quantities wanted."""


def measure_forward(
    objective: Objective,
    *,
    precision: ForwardPrecision | None = None,
    rtol: float = 0.02,
    max_hvps: int = 600,
    seed: int = 0,
    noise: bool = False,
    on_progress: OnProgress | None = None,
) -> ForwardCurvature:
    """Measure ``Tr H``, ``‖H‖_F²``, ``‖g‖²`` and ``gᵀHg/‖g‖²`` from evaluations of the loss.

    Along Gaussian directions ``X = uᵀHu`` has the mean ``Tr H`` and the variance ``2‖H‖_F²``, and ``s = uᵀg`` comes
    with it for free. ``gᵀHg`` is the mean of ``s_i s_j u_iᵀHu_j`` over pairs of different directions. One stencil along
    the gradient estimate ``Σ s_i u_i`` of a group yields the sum over all its pairs, and the ``X_i`` that are known
    already take the pairs of equal ones out, so that the estimate carries no trace of ``Tr H``. (The covariance of s²
    and X, which is ``2gᵀHg`` and needs no stencil, scatters four times as much for groups of 16.)

    With ``noise`` the loss is known of random parts of the data as well, a new partition for every group. How slopes
    and curvatures of the parts spread along a direction says how gradients and Hessians of examples do, and one more
    stencil, along an estimate of ``Σ ±(g_part − g)``, how much curvature the noise of gradients meets.

    Args:
        objective: Prepared with ``differentiable=False``.
        precision: Largest relative 95 % half-width among the quantities wanted; that of the trace when left out.
        rtol: Half-width at which to stop.
        max_hvps: Directions allowed, two evaluations each.
        seed: Of the directions.
        noise: Whether to see how single examples spread, for mini-batches.
        on_progress: Called after every group.

    Returns:
        The measurement. Whether ``rtol`` was reached is for the caller to see: ``precision(result)``.

    Raises:
        ValueError: If ``rtol`` is not positive.
        UsageError: If the budget is too small for an error bar.
        NumericalError: If losses around the parameters are not finite.
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be > 0, got {rtol}")
    if max_hvps < LEAST_DIRECTIONS:
        raise UsageError(
            f"--max-hvps {max_hvps}: --curvature forward needs at least {LEAST_DIRECTIONS} directions to put error "
            "bars on its numbers."
        )
    precision = precision or (lambda result: relative(result.trace))
    with exploring(objective, seed=seed, parts=PARTS if noise else None) as sampler:
        return _Forward(sampler, precision, rtol=rtol, budget=max_hvps, stencils=1 + noise).run(on_progress)


class _Forward:
    def __init__(
        self, sampler: DirectionSampler, precision: ForwardPrecision, *, rtol: float, budget: int, stencils: int
    ) -> None:
        self._started = time.perf_counter()
        self._sampler = sampler
        self._precision = precision
        self._rtol = rtol
        self._budget = budget
        self._stencils = stencils  # of a group, along what it estimates
        self._spent = 0
        self._groups: list[Group] = []

    def run(self, on_progress: OnProgress | None) -> ForwardCurvature:
        pilots = 2 if self._budget < 100 else 4 if self._budget < 300 else PILOTS
        h, self._spent = choose_step(
            self._sampler.pilots(pilots),
            start=self._sampler.first_step,
            tolerance=self._rtol / 20,
            budget=self._budget // 4,
            reserve=self._budget // 4 if self._budget >= 100 else 0,
            farthest=self._sampler.stencil.farthest,
            resolution=self._sampler.stencil.resolution,
        )
        left = self._budget - self._spent
        checks = CHECKS if self._budget >= 100 else 2
        size = min(GROUP, left // LEAST_GROUPS - checks - self._stencils)
        cost = size + checks + self._stencils
        for group in self._sampler.groups(size, first=pilots, checks=checks, h=h, most=left // cost):
            self._groups.append(group)
            self._spent += cost
            enough = len(self._groups) >= LEAST_GROUPS
            result = self._result(h) if enough else None
            reached = self._precision(result) if result is not None else None
            if on_progress is not None:
                on_progress("directions", self._spent, reached)
            if reached is not None and reached <= self._rtol:
                break
        result = self._result(h)
        if result.disagreement <= ROUGH:
            return result
        return replace(result, jump=self._sampler.jump(), num_evaluations=self._sampler.stencil.evaluations)

    def _result(self, h: float) -> ForwardCurvature:
        groups = self._groups
        slopes, curvatures = np.concatenate([g.slopes for g in groups]), np.concatenate([g.curvatures for g in groups])
        tilts, bends = np.concatenate([g.checks for g in groups], axis=2)  # slopes and curvatures, (2, c) each
        # All directions share the loss at θ, whose rounding no comparison between them shows in full.
        shift = _apart(bends) + self._sampler.stencil.resolution / h**2
        trace, variance, gradient_sq = mean_of(curvatures), variance_of(curvatures), mean_of(slopes**2)
        # Var X changes by 2 Cov(X, change) + Var(change) on the way to no step. All of X may come from errors alike.
        change = _TO_NONE * (bends[0] - bends[1])
        spread = abs(float(np.cov(bends[1], change)[0, 1])) + 0.5 * float(change.var(ddof=1)) + 0.5 * shift**2
        rayleigh = None
        if gradient_sq.value > 0:
            found = ratio_of([g.along_gradient for g in groups], [float(np.mean(g.slopes**2)) for g in groups])
            # What truncation and rounding add to slopes has a Rayleigh quotient of its own, below ‖H‖_F.
            share = min(_TO_NONE * abs(float(np.diff((tilts**2).mean(axis=1))[0])) / gradient_sq.value, 1.0)
            error = shift / (len(groups[0].slopes) - 1) + share * math.sqrt(variance.value / 2)
            rayleigh = Estimate(found.value, found.stderr, error)
        return ForwardCurvature(
            trace=Estimate(trace.value, trace.stderr, shift),
            frobenius_sq=Estimate(variance.value / 2, variance.stderr / 2, spread),
            gradient_sq=Estimate(gradient_sq.value, gradient_sq.stderr, _apart(tilts**2)),
            rayleigh=rayleigh,
            loss=self._sampler.stencil.loss,
            indefinite=bool((curvatures < -_TO_NONE * np.abs(bends[0] - bends[1]).max()).any()),
            step=h,
            disagreement=shift / abs(trace.value) if trace.value != 0 else math.inf,
            num_hvps=self._spent,
            num_evaluations=self._sampler.stencil.centres + 2 * self._spent,
            seconds=time.perf_counter() - self._started,
            noise=self._noise(),
        )

    def _noise(self) -> ForwardNoise | None:
        groups = [(group.noise, group.slopes) for group in self._groups if group.noise is not None]
        if not groups:
            return None
        found = [noise for noise, _ in groups]
        hessian = mean_of([noise.hessian_sq for noise in found])
        shift = float(np.mean([noise.hessian_shift for noise in found]))
        return ForwardNoise(
            gradient_sq=np.array([noise.gradient_sq for noise in found]),
            curvature=np.array([noise.curvature for noise in found]),
            slopes_sq=np.array([np.mean(slopes**2) for _, slopes in groups]),
            gradient_error=_moved(np.concatenate([noise.gradient_checks for noise in found], axis=1)),
            slopes_error=_moved(np.concatenate([group.checks[0] for group in self._groups], axis=1) ** 2),
            hessian_sq=Estimate(hessian.value, hessian.stderr, shift),
        )


def _moved(values: Array) -> float:
    """How far a mean over directions may be from that at no step: squares of slopes change with either sign.

    Args:
        values: ``(2, c)`` at h/2 and h.
    """
    change = values[0] - values[1]
    return _TO_NONE * (abs(float(change.mean())) + 1.96 * float(change.std(ddof=1)) / math.sqrt(len(change)))


def _apart(values: Array) -> float:
    """What single directions say of the errors at step h: by how much they differ at h/2, where truncation is 1/4.

    Not by how much their mean does: truncation mostly has one sign, which rounding or chance hides in a mean; and where
    the loss has kinks, or bends on a scale below h, no law leads from changes between steps to what is at none.

    Args:
        values: ``(2, c)`` at h/2 and h.
    """
    return _TO_NONE * float(np.sqrt(np.mean((values[0] - values[1]) ** 2)))
