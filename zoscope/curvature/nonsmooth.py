"""Losses whose second derivatives do not tell how they bend: kinks, jumps, hidden derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from zoscope.curvature.operators import LinearOperator
from zoscope.problem import Objective
from zoscope.theory.spectrum import NORMAL, Estimate, widening

if TYPE_CHECKING:
    from zoscope.curvature.finite_difference import Stencil

GROWING = (1e-3, 1e-2, 1e-1, 1.0)
"""Distances, in units of the parameters, at which a loss without any derivative may still be another."""

FINEST = 1e-6
"""Distance at which forward passes begin to look for jumps; the next is ten times as long."""

A_JUMP = 1e3
"""Change of the loss in units of its resolution that a smooth loss cannot show where a tenth of the way shows none."""


@dataclass(frozen=True)
class Jump:
    """A loss that is constant on pieces changes from one to another.

    Args:
        distance: In units of the parameters' size.
        before: The loss here.
        after: The loss there.
    """

    distance: float
    before: float
    after: float


def jump_of(objective: Objective, *, generator: torch.Generator) -> Jump | None:
    """Whether a loss whose gradient and Hessian vanish changes all the same, and its gradient vanishes there too.

    Args:
        objective: The prepared problem; its parameters are the same afterwards.
        generator: Source of a direction, on its device.

    Returns:
        ``None`` for a loss that does not change, or has a slope elsewhere.
    """
    start, loss = objective.read(), objective.value()
    direction = torch.randn(len(start), generator=generator, dtype=start.dtype, device=start.device)
    size = float(start.double().square().mean().sqrt()) or 1.0
    resolution = 2 * torch.finfo(start.dtype).eps * abs(loss)
    try:
        for share in GROWING:
            objective.write(start + share * size * direction)
            there = objective.value()
            if math.isfinite(there) and abs(there - loss) > A_JUMP * resolution:
                slope = objective.gradient()[1]
                return None if bool(slope.any()) else Jump(share, loss, there)
    finally:
        objective.write(start)
    return None


def jump_along(stencil: Stencil) -> Jump | None:
    """Whether a loss is the same, to the last digit, until it changes at once: from forward passes along a direction.

    Args:
        stencil: Around the parameters. A loss that does not even change by small jumps over ``FINEST`` of their size is
            not told from a smooth one.
    """
    direction, share, flat = stencil.direction(), FINEST, False
    while share <= 1:
        h = share * stencil.typical_size
        found = stencil.along(direction, h)
        rise, bend = h * found.slope, 0.5 * h**2 * found.curvature
        change = max(bend + rise, bend - rise, key=abs)
        if not math.isfinite(change):
            return None
        if abs(change) > stencil.resolution:
            jumped = flat and abs(change) > A_JUMP * stencil.resolution
            return Jump(share, stencil.loss, stencil.loss + change) if jumped else None
        flat, share = True, 10 * share
    return None


PROBES = 3
"""Directions compared; differences along one direction average over all kinks at once and scatter little."""

STEP = 1e-3
"""Step along a direction: the usual μ of zeroth-order training, so that the kinks that count are those it crosses."""

AHEAD, SETTLING = 10, 3
"""Optimizer steps whose noise is as long as the step with which kinks are measured, and how often that is adapted."""

NOTICEABLE = 0.1
"""Curvature that only differences see, relative to that of second derivatives, which is worth following and telling."""

CLEAR_OF_ROUNDING = 100.0
"""Second difference of the loss in units of its rounding error; the step is longer where it would be less."""

UNITS = 1000
"""Length of a step that shows rounding, in units of the last place of a typical parameter."""


@dataclass(frozen=True)
class Nonsmooth:
    """What differences of the loss see beside the Hessian.

    Args:
        trace: By how much their trace is larger, loss/param², over steps of ``step``. Its standard error is that over
            the directions; its quadrature error is that of a longer step than ``STEP``, where rounding asks for one.
        disagreement: Root mean square difference along a direction over ``STEP``, relative to the Hessian's curvatures.
        step: In units of the parameters: ``STEP``, or where that sees more the noise of ``AHEAD`` optimizer steps.
    """

    trace: Estimate
    disagreement: float
    step: float = STEP

    @property
    def significant(self) -> float:
        """The trace where its 95 % interval, of so few directions, leaves out zero, else 0: what a notice tells."""
        clear = NORMAL * widening(PROBES - 1) * self.trace.stderr
        return self.trace.value if abs(self.trace.value) > clear else 0.0


NOTHING = Nonsmooth(Estimate(0.0), 0.0)


def nonsmooth_curvature(
    objective: Objective, operator: LinearOperator, *, generator: torch.Generator, reach: float = 0.0
) -> Nonsmooth:
    """How much larger the trace is for small random steps than for infinitesimal ones.

    At a kink the second derivative is a point mass: autograd returns 0 almost everywhere, yet every step of finite
    length crosses some kinks, and the loss over many examples bends like a smooth one with more curvature. Compares
    ``(f(θ+hz) - 2f(θ) + f(θ-hz))/h²`` with ``zᵀHz`` for the same ``z ~ N(0, I)``. For a smooth loss the difference is
    zero up to O(h²), unless an operation hides its second derivative from autograd.

    With kinks this depends on h, and more of them are met further away. So where h = ``STEP`` sees something, h grows
    to the noise of ``AHEAD`` optimizer steps at the descent threshold that belongs to it, ``√AHEAD · 2 reach / Tr``.

    Args:
        objective: The prepared problem; its parameters are the same afterwards.
        operator: Its Hessian.
        generator: Source of the directions.
        reach: ``‖g‖/√b`` of the estimates that train; 0 where nothing trains.
    """
    vectors = torch.randn(PROBES, operator.dim, generator=generator, dtype=operator.dtype, device=operator.device)
    curvatures = (vectors * operator.matmat(vectors)).sum(dim=1).double().tolist()
    start, loss = objective.read(), objective.value()

    def second_difference(vector: torch.Tensor, step: float) -> float:
        objective.write(start + step * vector)
        above = objective.value()
        objective.write(start - step * vector)
        return above - 2 * loss + objective.value()

    def excess(step: float) -> torch.Tensor:
        found = [second_difference(z, step) / step**2 - c for z, c in zip(vectors, curvatures, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    eps, size = torch.finfo(operator.dtype).eps, max(map(abs, curvatures))
    try:
        # Over such a step the loss bends by rounding alone, which may exceed its own: a cross-entropy near zero has
        # that of its logits.
        nearby = UNITS * eps * float(start.double().square().mean().sqrt())
        bent = [abs(second_difference(z, nearby) - nearby**2 * c) for z, c in zip(vectors, curvatures, strict=True)]
        noise = max(4 * eps * max(abs(loss), 1e-30), *bent)
        h = max(STEP, math.sqrt(CLEAR_OF_ROUNDING * noise / size)) if size > 0 else STEP
        found = excess(h)
        if size == 0 and float(found.abs().max()) <= noise / h**2:  # a linear loss
            return NOTHING
        own, differs = (float(t.square().mean().sqrt()) for t in (torch.tensor(curvatures, dtype=torch.float64), found))
        share = differs / own if own > 0 else 0.0
        # Over a longer step a kink bends the loss less, in inverse proportion at most.
        step, longer, there, ahead = h, h / STEP - 1, found, 0.0
        for _ in range(SETTLING if differs > NOTICEABLE * own and reach > 0 else 0):
            trace = float(np.mean(curvatures)) + float(there.mean())
            wanted = 2 * math.sqrt(AHEAD) * reach / trace if 0 < trace < math.inf else 0.0
            ahead = max(math.sqrt((ahead or wanted) * wanted), h)
            there = excess(ahead)
        if ahead > h and bool(there.isfinite().all()):
            found, step, longer = there, ahead, 0.0
    finally:
        objective.write(start)
    mean, spread = float(found.mean()), math.hypot(float(found.std()), noise / step**2) / math.sqrt(PROBES)
    return Nonsmooth(Estimate(mean, spread, quadrature=abs(mean) * longer), share, step)
