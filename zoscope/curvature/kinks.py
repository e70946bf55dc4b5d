"""Curvature that second derivatives do not see: kinks of ReLU, max-pooling, absolute values, and hidden derivatives."""

import math
from dataclasses import dataclass

import torch

from zoscope.curvature.operators import LinearOperator
from zoscope.problem import Objective
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import NORMAL, widening

PROBES = 3
"""Directions compared; differences along one direction average over all kinks at once and scatter little."""

STEP = 1e-3
"""Step along a direction: the usual μ of zeroth-order training, so that the kinks that count are those it crosses."""

CLEAR_OF_ROUNDING = 100.0
"""Second difference of the loss in units of its rounding error; the step is longer where it would be less."""

UNITS = 1000
"""Length of a step that shows rounding, in units of the last place of a typical parameter."""


@dataclass(frozen=True)
class Missed:
    """What differences of the loss see beside the Hessian.

    Args:
        trace: By how much their trace is larger, loss/param², over steps of ``STEP``. Its standard error is that over
            the directions; its quadrature error is that of a longer step, where rounding asks for one.
        disagreement: Root mean square difference along a direction, relative to the Hessian's own curvatures.
    """

    trace: Estimate
    disagreement: float

    @property
    def significant(self) -> float:
        """The trace where its 95 % interval, of so few directions, leaves out zero, else 0: what a notice tells."""
        clear = NORMAL * widening(PROBES - 1) * self.trace.stderr
        return self.trace.value if abs(self.trace.value) > clear else 0.0


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

    def second_difference(vector: torch.Tensor, step: float) -> float:
        objective.write(start + step * vector)
        above = objective.value()
        objective.write(start - step * vector)
        return above - 2 * loss + objective.value()

    eps, size = torch.finfo(operator.dtype).eps, max(map(abs, curvatures))
    try:
        # Over such a step the loss bends by rounding alone, which may exceed its own: a cross-entropy near zero has
        # that of its logits.
        nearby = UNITS * eps * float(start.double().square().mean().sqrt())
        bent = [abs(second_difference(z, nearby) - nearby**2 * c) for z, c in zip(vectors, curvatures, strict=True)]
        noise = max(4 * eps * max(abs(loss), 1e-30), *bent)
        h = max(STEP, math.sqrt(CLEAR_OF_ROUNDING * noise / size)) if size > 0 else STEP
        excess = [second_difference(z, h) / h**2 - c for z, c in zip(vectors, curvatures, strict=True)]
    finally:
        objective.write(start)
    found = torch.tensor(excess, dtype=torch.float64)
    rounding = noise / h**2
    if size == 0 and float(found.abs().max()) <= rounding:  # a linear loss
        return NOTHING
    spread = math.hypot(float(found.std()), rounding) / math.sqrt(PROBES)
    own = torch.tensor(curvatures, dtype=torch.float64).square().mean().sqrt()
    share = float(found.square().mean().sqrt() / own) if own > 0 else 0.0
    # Over a longer step a kink bends the loss less, in inverse proportion at most.
    mean = float(found.mean())
    return Missed(Estimate(mean, spread, quadrature=abs(mean) * (h / STEP - 1)), share)
