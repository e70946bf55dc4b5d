"""How far to step for a second difference: far enough for rounding, near enough for the quadratic model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from zoscope.curvature.stencil import Difference
from zoscope.errors import NumericalError

Differences = Callable[[float], Sequence[Difference]]

MOST_DOUBLINGS = 24
"""The search ends so many factors of two away from its start."""


@dataclass
class _Trials:
    """Curvatures along a few directions at steps ``start·2^k``."""

    differences: Differences
    start: float
    spent: int = 0
    found: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def step(self, k: int) -> float:
        return math.ldexp(self.start, k)

    def at(self, k: int) -> NDArray[np.float64]:
        if k not in self.found:
            self.found[k] = np.array([difference.curvature for difference in self.differences(self.step(k))])
            self.spent += len(self.found[k])
        return self.found[k]

    def disagreement(self, k: int) -> float:
        """Relative difference between the curvatures at a step and at half of it: truncation above, rounding below."""
        here, half = self.at(k), self.at(k - 1)
        if not (np.isfinite(here).all() and np.isfinite(half).all()):
            return math.inf
        scale = float(np.sqrt(np.mean(here**2)))
        return float(np.sqrt(np.mean((here - half) ** 2))) / scale if scale > 0 else 0.0


def choose_step(differences: Differences, *, start: float, tolerance: float, budget: int) -> tuple[float, int]:
    """The step at which curvatures agree best with those at half of it.

    Truncation grows as h² and rounding as 1/h², four times as much at h/2, so that their balance shows as the least
    disagreement, whatever the dtype and the curvature are. The search walks down that valley by factors of two.

    Args:
        differences: Tells for a step the differences along some directions, always the same.
        start: Where both may balance.
        tolerance: Relative disagreement that is good enough.
        budget: Most differences to spend.

    Returns:
        The step h, and the differences spent.

    Raises:
        NumericalError: If no step gives finite losses.
    """
    trials = _Trials(differences, start)
    k, best = 0, trials.disagreement(0)
    for sign in (1, -1):
        while best > tolerance and abs(k) < MOST_DOUBLINGS and trials.spent + len(trials.at(0)) <= budget:
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
