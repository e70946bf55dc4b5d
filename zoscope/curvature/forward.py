"""Curvature from forward passes alone: trace, Frobenius norm and the gradient's share, each with its error."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from zoscope.curvature.party import Group, Party, exploring
from zoscope.curvature.results import ForwardCurvature, ForwardNoise
from zoscope.curvature.sampling import OnProgress
from zoscope.curvature.scatter import mean_of, ratio_of, variance_of
from zoscope.curvature.steplength import choose_step
from zoscope.errors import UsageError
from zoscope.problem import Objective
from zoscope.theory.spectrum import Estimate

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

_TO_NONE = 4 / 3
"""Truncation at h over the change from h/2 to h."""

_Array = NDArray[np.float64]


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
    with exploring(objective, seed=seed, parts=PARTS if noise else None) as party:
        measurement = _Forward(party, precision or _of_trace, rtol=rtol, budget=max_hvps, stencils=1 + noise)
        return measurement.run(on_progress)


class _Forward:
    def __init__(self, party: Party, precision: ForwardPrecision, *, rtol: float, budget: int, stencils: int) -> None:
        self._started = time.perf_counter()
        self._party = party
        self._precision = precision
        self._rtol = rtol
        self._budget = budget
        self._stencils = stencils  # of a group, along what it estimates
        self._spent = 0
        self._groups: list[Group] = []

    def run(self, on_progress: OnProgress | None) -> ForwardCurvature:
        pilots = 2 if self._budget < 100 else 4 if self._budget < 300 else PILOTS
        h, self._spent = choose_step(
            self._party.pilots(pilots),
            start=self._party.first_step,
            tolerance=self._rtol / 20,
            budget=self._budget // 4,
            reserve=self._budget // 4 if self._budget >= 100 else 0,
            farthest=self._party.stencil.farthest,
            resolution=self._party.stencil.resolution,
        )
        left = self._budget - self._spent
        checks = CHECKS if self._budget >= 100 else 2
        size = min(GROUP, left // LEAST_GROUPS - checks - self._stencils)
        cost = size + checks + self._stencils
        for group in self._party.groups(size, first=pilots, checks=checks, h=h, most=left // cost):
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
        return replace(result, jump=self._party.jump(), num_evaluations=self._party.stencil.evaluations)

    def _result(self, h: float) -> ForwardCurvature:
        groups = self._groups
        slopes, curvatures = np.concatenate([g.slopes for g in groups]), np.concatenate([g.curvatures for g in groups])
        tilts, bends = np.concatenate([g.checks for g in groups], axis=2)  # slopes and curvatures, (2, c) each
        # All directions share the loss at θ, whose rounding no comparison between them shows in full.
        shift = _apart(bends) + self._party.stencil.resolution / h**2
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
            loss=self._party.stencil.loss,
            indefinite=bool((curvatures < -_TO_NONE * np.abs(bends[0] - bends[1]).max()).any()),
            step=h,
            disagreement=shift / abs(trace.value) if trace.value != 0 else math.inf,
            num_hvps=self._spent,
            num_evaluations=self._party.stencil.centres + 2 * self._spent,
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


def _of_trace(result: ForwardCurvature) -> float:
    trace = result.trace
    return trace.half_width / abs(trace.value) if trace.value != 0 else math.inf


def _moved(values: _Array) -> float:
    """How far a mean over directions may be from that at no step: squares of slopes change with either sign.

    Args:
        values: ``(2, c)`` at h/2 and h.
    """
    change = values[0] - values[1]
    return _TO_NONE * (abs(float(change.mean())) + 1.96 * float(change.std(ddof=1)) / math.sqrt(len(change)))


def _apart(values: _Array) -> float:
    """What single directions say of the errors at step h: by how much they differ at h/2, where truncation is 1/4.

    Not by how much their mean does: truncation mostly has one sign, which rounding or chance hides in a mean; and where
    the loss has kinks, or bends on a scale below h, no law leads from changes between steps to what is at none.

    Args:
        values: ``(2, c)`` at h/2 and h.
    """
    return _TO_NONE * float(np.sqrt(np.mean((values[0] - values[1]) ** 2)))
