"""Whether the curvature rises within the first steps of descent, as it does behind a new head on a trained network.

A head that is still random, or zero, hides the curvature of the layers before it: what is there sums to nearly nothing,
half of it negative, and what is coming grows as the square of the head. Thresholds at such a start say nothing of the
run. A few steps of gradient descent show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zoscope.problem import Notice
from zoscope.runtime import spawn_generators
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import widening

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem import Objective

FALL = 0.3
"""Part of the loss that descent is to take off, to first order, or as much of it as the planned run does."""

LEAST_FALL = 0.05
"""Part of the loss below which a run stays where it starts, and nothing is looked at."""

PACE, STEPS = 4, 6
"""Steps of descent that are to do, and that may: a new head moves in the first, and what it uncovers in the next."""

SUFFICIENT = 0.3
"""Part of the decrease promised to first order that a step has to keep, or it is too long."""

ATTEMPTS = 6
"""Step sizes tried, each half of the one before, until the loss falls enough."""

GROWN = 3.0
"""Growth of the trace from which the start says nothing of the run."""

FEWEST, MOST = 3, 24
"""Random directions of the trace: the first number where it is plain that it has not grown."""

PLAIN = 2.0
"""Growth up to which that is plain."""

STEP = 1e-3
"""Step of the differences along a direction of unit entries, where rounding does not ask for a longer one."""

CLEAR_OF_ROUNDING = 100.0
"""Second difference of the loss in units of its rounding error; the step is longer where it would be less."""


@dataclass(frozen=True)
class Growth:
    """The trace before and after a few steps of descent.

    Args:
        before: Upper end of the trace at the start, with what kinks add to it.
        after: The trace where the steps end; its stderr holds Student's factor, its quadrature the rounding.
        fall: Part of the loss that the steps took off.
        num_hvps: Cost in Hessian-vector products: six evaluations of the loss, or two gradients, are one.
    """

    before: float
    after: Estimate
    fall: float
    num_hvps: int

    @property
    def significant(self) -> bool:
        """Whether the trace has grown by more than ``GROWN``, beyond the error bars of both."""
        return self.after.interval[0] > GROWN * max(self.before, 0.0)


@dataclass
class _Walk:
    """Counts what it does to an objective."""

    objective: Objective
    evaluations: int = 0
    gradients: int = 0

    def value(self, x: Tensor) -> float:
        self.objective.write(x)
        self.evaluations += 1
        return self.objective.value()

    def gradient(self, x: Tensor) -> Tensor:
        self.objective.write(x)
        self.gradients += 1
        return self.objective.gradient()[1]

    @property
    def num_hvps(self) -> int:
        return math.ceil(self.evaluations / 6 + self.gradients / 2)


def measure_growth(
    objective: Objective, *, loss: float, before: float, share: float, seed: int, weights: Tensor | None = None
) -> Growth | None:
    """Take a few steps of gradient descent, look at the trace there, and come back.

    Args:
        objective: The prepared problem; its parameters come back.
        loss: Loss where it stands.
        before: Upper end of the trace there, loss/param².
        share: Part of the loss that the planned run gains on the quadratic model.
        seed: Of the directions.
        weights: ``(d,)`` factors of the directions' entries, for a preconditioned trace; of root mean square 1.

    Returns:
        ``None`` where the run goes nowhere, the loss does not fall, or a value is not finite.
    """
    fall = min(share, FALL)
    if loss == 0 or not fall >= LEAST_FALL:
        return None
    walk, origin = _Walk(objective), objective.read()
    try:
        x, value, end = origin, loss, loss - fall * abs(loss)
        for done in range(STEPS):
            found = _descended(walk, x, value, (value - end) / max(PACE - done, 1))
            if found is None:
                break
            x, value = found
            if value <= end:
                break
        if x is origin:
            return None
        after = _trace(walk, x, value, before=before, distance=_rms(x - origin), seed=seed, weights=weights)
    finally:
        objective.write(origin)
    return None if after is None else Growth(before, after, (loss - value) / abs(loss), walk.num_hvps)


def _descended(walk: _Walk, x: Tensor, value: float, decrease: float) -> tuple[Tensor, float] | None:
    """Where a step leads that takes a decrease off to first order, or a shorter one if the loss falls by too little."""
    g = walk.gradient(x)
    square = float(g.double().square().sum())
    if not (math.isfinite(square) and square > 0):
        return None
    step = decrease / square
    for _ in range(ATTEMPTS):
        there = torch.add(x, g, alpha=-step)
        found = walk.value(there)
        if found <= value - SUFFICIENT * step * square:
            return there, found
        step /= 2
    return None


def _rms(vector: Tensor) -> float:
    return float(vector.double().square().mean().sqrt())


def _trace(
    walk: _Walk, x: Tensor, value: float, *, before: float, distance: float, seed: int, weights: Tensor | None
) -> Estimate | None:
    """By second differences along random directions, as many as it takes to see whether it has grown."""
    noise = 4 * torch.finfo(x.dtype).eps * max(abs(value), 1e-30)
    h = STEP
    if before > 0:  # longer steps than those of the descent itself would look at another place
        h = max(STEP, min(math.sqrt(CLEAR_OF_ROUNDING * noise / before), distance))
    *_, generator = spawn_generators(seed, 10, x.device)  # a stream of its own
    samples: list[float] = []
    after = Estimate(math.nan)
    while len(samples) < MOST:
        for _ in range(FEWEST):
            z = torch.randn(len(x), generator=generator, dtype=x.dtype, device=x.device)
            z = z if weights is None else z * weights
            ends = walk.value(torch.add(x, z, alpha=h)) + walk.value(torch.add(x, z, alpha=-h))
            samples.append((ends - 2 * value) / h**2)
        found = torch.tensor(samples, dtype=torch.float64)
        if not bool(torch.isfinite(found).all()):
            return None
        error = widening(len(samples) - 1) * float(found.std()) / math.sqrt(len(samples))
        after = Estimate(float(found.mean()), error, noise / h**2)
        if after.value <= PLAIN * max(before, 0.0) or after.interval[0] > GROWN * max(before, 0.0):
            break
    return after


def growth_notices(found: Growth | None) -> Iterable[Notice]:
    """On a start that says nothing of the run."""
    if found is None or not found.significant:
        return
    yield Notice(
        "little-curvature",
        "There is little curvature here, and more soon. A few steps of gradient descent take "
        f"{100 * found.fall:.0f} % off the loss, and raise the trace from at most {found.before:.1g} to about "
        f"{found.after.value:.1g}. A new head on a trained network starts like this. No step size from here holds for "
        "a long run. Start with a smaller one, and measure again after warm-up.",
    )
