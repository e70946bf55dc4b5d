"""Curvature that second derivatives cannot see: kinks of ReLU, max-pooling, absolute values and the like."""

import math

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


def kink_trace(objective: Objective, operator: LinearOperator, *, generator: torch.Generator) -> Estimate:
    """How much larger the trace is for small random steps than for infinitesimal ones.

    At a kink the second derivative is a point mass: autograd returns 0 almost everywhere, yet every step of finite
    length crosses some kinks, and the loss over many examples bends like a smooth one with more curvature. Compares
    ``(f(θ+hz) - 2f(θ) + f(θ-hz))/h²`` with ``zᵀHz`` for the same ``z ~ N(0, I)``. For a smooth loss the difference is
    zero up to O(h²).

    Args:
        objective: The prepared problem; its parameters are the same afterwards.
        operator: Its Hessian.
        generator: Source of the directions.

    Returns:
        The excess of the trace over ``Tr H`` in loss/param², with its standard error over the directions.
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
    return Estimate(float(found.mean()), spread)
