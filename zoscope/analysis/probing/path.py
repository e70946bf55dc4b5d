"""The mean path of the runs, measured: the descent that a zeroth-order run follows but for its noise.

On the quadratic model it follows the gradient along straight parabolas for ever, and speeds up along negative
curvature. The loss does not: a few hundred gradients say what it does, at a small part of the cost of the runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.operators import gradient
from zoscope.theory.curve import MeanPath

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.problem import Objective
    from zoscope.theory.rules import UpdateRule

MOST_GRADIENTS = 10_000
"""A longer path is cut off there. Stable zeroth-order runs have steps below 1/λ_max: it takes fewer than they do."""


@dataclass(frozen=True)
class GradientFlow:
    """``dθ/ds = -P⁻¹ g(θ)`` from the start, in the time ``s`` that a step of size η takes η of.

    Args:
        times: ``(n,)`` from 0, param²/loss.
        losses: ``(n,)``.
        squares: ``(n,)``, ``gᵀ P⁻¹ g``.
    """

    times: NDArray[np.float64]
    losses: NDArray[np.float64]
    squares: NDArray[np.float64]

    def mean_path(self, *, lr: float, steps: int, rule: UpdateRule) -> MeanPath | None:
        """As the steps of an optimizer see it; ``None`` where it is not known that far."""
        times = flow_times(lr=lr, steps=steps, rule=rule)
        if times[-1] > self.times[-1] * (1 + 1e-9):
            return None
        return MeanPath(np.interp(times, self.times, self.losses), np.interp(times, self.times, self.squares))


def flow_times(*, lr: float, steps: int, rule: UpdateRule) -> NDArray[np.float64]:
    """Time after 0, 1, …, ``steps`` steps along a constant gradient: momentum takes its time to build up."""
    beta = rule.momentum
    velocity = (1.0 - beta ** np.arange(1, steps + 1)) / (1.0 - beta)
    return np.concatenate([[0.0], rule.lr_scale * lr * np.cumsum(velocity)])


@torch.no_grad()
def follow_gradient(
    objective: Objective, *, until: float, sharpness: float, diagonal: Tensor | None = None
) -> GradientFlow:
    """Follow the gradient from the current parameters, which come back, in steps that the sharpest mode stands.

    Args:
        objective: The prepared problem.
        until: Time to follow it for.
        sharpness: Largest eigenvalue of ``P^-1/2 H P^-1/2``.
        diagonal: P; ``None`` for the identity.
    """
    origin = objective.read()
    count = min(max(math.ceil(until * sharpness), 20), MOST_GRADIENTS)
    step = min(until / count, 1.0 / sharpness)
    theta, losses, squares = origin.clone(), [], []
    try:
        for _ in range(count + 1):
            objective.write(theta)
            loss, g = gradient(objective)
            velocity = g if diagonal is None else g / diagonal
            losses.append(loss)
            squares.append(float(g.double() @ velocity.double()))
            if not math.isfinite(losses[-1] + squares[-1]):
                break
            theta.sub_(velocity, alpha=step)
    finally:
        objective.write(origin)
    known = len(losses) if math.isfinite(losses[-1] + squares[-1]) else len(losses) - 1
    return GradientFlow(step * np.arange(known, dtype=np.float64), np.array(losses[:known]), np.array(squares[:known]))
