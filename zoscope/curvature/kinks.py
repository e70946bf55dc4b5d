"""Curvature that second derivatives do not see: kinks of ReLU, max-pooling, absolute values, and hidden derivatives."""

import math
from dataclasses import dataclass

import torch

from zoscope.curvature.operators import LinearOperator
from zoscope.problem import Objective
from zoscope.theory.spectrum import Estimate

PROBES = 3
"""Directions compared; differences along one direction average over all kinks at once and scatter little."""

STEP = 1e-3
"""Step along a direction: the usual μ of zeroth-order training, so that the kinks that count are those it crosses."""

CLEAR_OF_ROUNDING = 100.0
"""Second difference of the loss in units of its rounding error; the step is longer where it would be less."""


@dataclass(frozen=True)
class Missed:
    """What differences of the loss see beside the Hessian.

    Args:
        trace: By how much their trace is larger, loss/param², with its standard error over the directions.
        disagreement: Root mean square difference along a direction, relative to the Hessian's own curvatures.
    """

    trace: Estimate
    disagreement: float

    @property
    def significant(self) -> float:
        """The trace where three standard errors tell it from nothing, else 0."""
        return self.trace.value if abs(self.trace.value) > 3 * self.trace.stderr else 0.0


NOTHING = Missed(Estimate(0.0), 0.0)


def missed_curvature(objective: Objective, operator: LinearOperator, *, generator: torch.Generator) -> Missed:
    """How much larger the trace is for small random steps than for infinitesimal ones.

    At a kink the second derivative is a point mass: autograd returns 0 almost everywhere, yet every step of finite
    length crosses some kinks, and the loss over many examples bends like a smooth one with more curvature. Compares
    ``(f(θ+hz) - 2f(θ) + f(θ-hz))/h²`` with ``zᵀHz`` for the same ``z ~ N(0, I)``. For a smooth loss the difference is
    zero up to O(h²), unless an operation hides its second derivative from autograd.

    Args:
        objective: The prepared problem; its parameters are the same afterwards.
        operator: Its Hessian.
        generator: Source of the directions.

    """
    vectors = torch.randn(PROBES, operator.dim, generator=generator, dtype=operator.dtype, device=operator.device)
    curvatures = (vectors * operator.matmat(vectors)).sum(dim=1).double().tolist()
    start, loss = objective.read(), objective.value()
    noise = 4 * torch.finfo(operator.dtype).eps * max(abs(loss), 1e-30)
    size = max(map(abs, curvatures))
    h = max(STEP, math.sqrt(CLEAR_OF_ROUNDING * noise / size)) if size > 0 else STEP
    excess = []
    try:
        for vector, curvature in zip(vectors, curvatures, strict=True):
            objective.write(start + h * vector)
            above = objective.value()
            objective.write(start - h * vector)
            below = objective.value()
            excess.append((above - 2 * loss + below) / h**2 - curvature)
    finally:
        objective.write(start)
    found = torch.tensor(excess, dtype=torch.float64)
    rounding = noise / h**2
    spread = math.hypot(float(found.std()), rounding) / math.sqrt(PROBES)
    own = torch.tensor(curvatures, dtype=torch.float64).square().mean().sqrt()
    share = float(found.square().mean().sqrt() / own) if own > 0 else 0.0
    return Missed(Estimate(float(found.mean()), spread), share)
