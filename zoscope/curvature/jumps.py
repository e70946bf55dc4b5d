"""Losses that are constant but for jumps: floor, round, argmax, accuracies, quantised models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zoscope.curvature.stencil import Stencil
    from zoscope.problem import Objective

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
