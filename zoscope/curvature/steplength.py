"""How far to step for a second difference: far enough for rounding, near enough for the quadratic model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from zoscope.curvature.stencil import Stencil, Walk
from zoscope.errors import NumericalError

MOST_DOUBLINGS = 24
"""The search ends so many factors of two away from its start."""


@dataclass
class _Trials:
    """Curvatures along a few directions at steps ``start·2^k``."""

    stencil: Stencil
    directions: Sequence[Walk]
    start: float
    found: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def spent(self) -> int:
        return len(self.found) * len(self.directions)

    def step(self, k: int) -> float:
        return math.ldexp(self.start, k)

    def at(self, k: int) -> NDArray[np.float64]:
        if k not in self.found:
            h = self.step(k)
            self.found[k] = np.array([self.stencil.along(u, h).curvature for u in self.directions])
        return self.found[k]

    def disagreement(self, k: int) -> float:
        """Relative difference between the curvatures at a step and at half of it: truncation above, rounding below."""
        here, half = self.at(k), self.at(k - 1)
        if not (np.isfinite(here).all() and np.isfinite(half).all()):
            return math.inf
        scale = float(np.sqrt(np.mean(here**2)))
        return float(np.sqrt(np.mean((here - half) ** 2))) / scale if scale > 0 else 0.0


def choose_step(stencil: Stencil, directions: Sequence[Walk], *, tolerance: float, budget: int) -> tuple[float, int]:
    """The step at which curvatures agree best with those at half of it.

    Truncation grows as h² and rounding as 1/h², four times as much at h/2, so that their balance shows as the least
    disagreement, whatever the dtype and the curvature are. The search walks down that valley by factors of two, from
    where both would balance for weights of the size seen and curvature that changes over that size.

    Args:
        stencil: Evaluates the loss.
        directions: Along which to compare.
        tolerance: Relative disagreement that is good enough.
        budget: Most differences to spend.

    Returns:
        The step h, and the differences spent.

    Raises:
        NumericalError: If no step gives finite losses.
    """
    trials = _Trials(stencil, directions, stencil.typical_size * stencil.epsilon**0.25)
    k, best = 0, trials.disagreement(0)
    for sign in (1, -1):
        while best > tolerance and abs(k) < MOST_DOUBLINGS and trials.spent + len(directions) <= budget:
            value = trials.disagreement(k + sign)
            lost = math.isinf(value) and math.isinf(best) and sign < 0  # not yet where the loss is finite
            if value >= best and not lost:
                break
            k, best = k + sign, value
        if k > 0:
            break
    if math.isinf(best):
        raise NumericalError(
            f"No step gives finite losses around the given parameters: tried {trials.step(min(trials.found)):.1g} to "
            f"{trials.step(max(trials.found)):.1g} along random directions. The loss is defined on too small a "
            "neighbourhood, or not a function of the parameters alone."
        )
    return trials.step(k), trials.spent
