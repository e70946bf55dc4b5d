"""How far the noise of zeroth-order steps takes the parameters, and whether the loss is still quadratic there.

A step of size η along ``u ~ N(0, I)`` moves every parameter by about ``η‖g‖/√q``, so N of them by √N as much, in random
directions: the run is where a random direction leads, at a distance that is known beforehand. Two more evaluations
there say how far the loss rises; two nearer ones, along the same direction, what its curvature promised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zoscope.problem import Notice
from zoscope.runtime import spawn_generators

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem import Objective
    from zoscope.theory.rules import UpdateRule

DIRECTIONS = 3
"""Random directions: twelve evaluations of the loss in all."""

NEAR = 0.25
"""Where curvature is read off, as a part of the distance asked about."""

LEFT_BEHIND = 0.5
"""Excess of the rise over the quadratic one, as a part of it, from which the quadratic model is called left."""

ROUNDING = 100.0
"""Units in the last place of the loss that a rise near by has to have to be known."""


@dataclass(frozen=True)
class Reach:
    """What N steps of noise do to the loss.

    Args:
        steps: N.
        distance: Root mean square move of a parameter.
        ratio: Mean rise of the loss at that distance, in units of what the curvature near by promises.
    """

    steps: int
    distance: float
    ratio: float

    @property
    def quadratic_steps(self) -> float:
        """Steps after which the excess is ``LEFT_BEHIND``: it grows as the square of the distance, so as the steps."""
        return self.steps * LEFT_BEHIND / (self.ratio - 1.0) if self.ratio > 1.0 else math.inf


def noise_distance(lr: float, *, steps: int, grad_norm: float, queries: int, rule: UpdateRule) -> float:
    """Root mean square move of a parameter by the noise of N steps at a gradient that stays what it is."""
    per_step = rule.lr_scale * lr / (1.0 - rule.momentum)
    return per_step * grad_norm * math.sqrt(steps / queries)


@torch.no_grad()
def measure_reach(objective: Objective, *, loss: float, distance: float, steps: int, seed: int) -> Reach | None:
    """Look at the loss at a distance along random directions; ``None`` where rounding hides its rise.

    Args:
        objective: The prepared problem; its parameters come back.
        loss: Loss where it stands.
        distance: As from ``noise_distance``, in units of a parameter.
        steps: The steps that lead there.
        seed: Of the directions.
    """
    origin = objective.read()
    *_, generator = spawn_generators(seed, 9, origin.device)  # a stream of its own
    far = near = 0.0
    try:
        for _ in range(DIRECTIONS):
            u = torch.randn(len(origin), generator=generator, dtype=origin.dtype, device=origin.device)
            far += _rise(objective, origin, u, distance) - 2.0 * loss
            near += _rise(objective, origin, u, NEAR * distance) - 2.0 * loss
    finally:
        objective.write(origin)
    floor = ROUNDING * torch.finfo(origin.dtype).eps * abs(loss) * DIRECTIONS
    if not near > floor:
        return None  # no curvature to speak of, or none that can be told from rounding
    return Reach(steps, distance, NEAR**2 * far / near if math.isfinite(far) else math.inf)


def _rise(objective: Objective, origin: Tensor, u: Tensor, distance: float) -> float:
    total = 0.0
    for sign in (1.0, -1.0):
        objective.write(torch.add(origin, u, alpha=sign * distance))
        total += objective.value()
    return total


def reach_notices(found: Reach | None, *, lr: float) -> Iterable[Notice]:
    """On a run whose own noise leaves the quadratic model on the way."""
    if found is None or found.ratio <= 1.0 + LEFT_BEHIND:
        return
    ratio = f"{found.ratio:.3g} times" if math.isfinite(found.ratio) else "infinitely"
    yield Notice(
        "leaves-quadratic",
        f"The noise of {found.steps:,} steps of {lr:.3g} moves every parameter by about {found.distance:.1g}; that far "
        f"away along random directions the loss has risen {ratio} as much as the curvature here promises. After some "
        f"{max(found.quadratic_steps, 1):,.0f} steps runs are where the loss is steeper than its quadratic model: "
        "they can blow up earlier than predicted. A smaller lr, or more queries, keeps them within it.",
    )
