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

NOISE = 2.0
"""Relative disagreement with half the step from which differences are rounding alone, which makes √17."""

HUMP = 1.5
"""Rise of the disagreement that few directions may show by chance: the search looks beyond it."""

FLAT = 0.05
"""Disagreement of a valley that may be none: kinks add about as much at all steps, most unsteadily at short ones."""

UNITS = 8.0
"""Second differences of losses that are right to their resolution are wrong by about half so many of it."""

_Array = NDArray[np.float64]


@dataclass
class _Trials:
    """Curvatures along a few directions at steps ``start·2^k``."""

    differences: Differences
    start: float
    budget: int
    reserve: int
    resolution: float
    spent: int = 0
    found: dict[int, _Array] = field(default_factory=dict)

    def step(self, k: int) -> float:
        return math.ldexp(self.start, k)

    def at(self, k: int) -> _Array:
        if k not in self.found:
            self.found[k] = np.array([difference.curvature for difference in self.differences(self.step(k))])
            self.spent += len(self.found[k])
        return self.found[k]

    def may(self, k: int) -> bool:
        """Whether another step is within the reach and the budget of the search."""
        known = all(neighbour in self.found for neighbour in (k, k - 1))
        return abs(k) <= MOST_DOUBLINGS and (known or self.spent + len(self.found[0]) <= self.budget)

    def finite(self, k: int) -> bool:
        return bool(np.isfinite(self.at(k)).all() and np.isfinite(self.at(k - 1)).all())

    def disagreement(self, k: int) -> float:
        """Relative difference between the curvatures at a step and at half of it: truncation above, rounding below."""
        if not self.finite(k):
            return math.inf
        here, half = self.at(k), self.at(k - 1)
        scale = float(np.sqrt(np.mean(here**2)))
        return float(np.sqrt(np.mean((here - half) ** 2))) / scale if scale > 0 else 0.0

    def quantised(self, k: int) -> bool:
        """Whether differences are equal, or zero, though directions are not."""
        return len(np.unique(self.at(k))) <= len(self.at(k)) // 2

    def tells(self, k: int) -> bool:
        """Whether differences show curvature, not rounding alone."""
        return self.disagreement(k) <= NOISE and not self.quantised(k)

    def coarse(self, k: int) -> bool:
        """Whether steps disagree by no more than the rounding of the loss itself."""
        apart = float(np.sqrt(np.mean((self.at(k) - self.at(k - 1)) ** 2)))
        return self.quantised(k) or self.step(k) ** 2 * apart <= UNITS * self.resolution


def choose_step(
    differences: Differences,
    *,
    start: float,
    tolerance: float,
    budget: int,
    reserve: int = 0,
    farthest: float = math.inf,
    resolution: float = 0.0,
) -> tuple[float, int]:
    """The step at which curvatures agree best with those at half of it.

    Truncation grows as h² and rounding as 1/h², four times as much at h/2, so that their balance shows as the least
    disagreement, whatever the dtype and the curvature are. The search walks down that valley by factors of two. Beyond
    the size of the parameters there may be another valley, where the loss is smooth on its way to somewhere else: no
    step is longer than ``farthest``, unless the loss could not resolve its differences otherwise.

    Args:
        differences: Tells for a step the differences along some directions, always the same.
        start: Where both may balance.
        tolerance: Relative disagreement that is good enough.
        budget: Most differences to spend.
        reserve: How many more where the start shows nothing but rounding, since all others would be spent in vain.
        farthest: Longest step that still says something about where it starts; ``inf`` where nothing tells.
        resolution: What a loss may be wrong by.

    Returns:
        The step h, and the differences spent.

    Raises:
        NumericalError: If no step gives finite losses.
    """
    trials = _Trials(differences, start, budget, reserve, resolution)

    def onward(k: int) -> bool:
        near = trials.step(k) <= farthest or (trials.finite(k - 1) and trials.coarse(k - 1))
        return near and trials.may(k)

    k = _first(trials, onward)
    if math.isinf(trials.disagreement(k)):
        raise NumericalError(
            f"No step gives finite losses around the given parameters: tried {trials.step(min(trials.found)):.1g} to "
            f"{trials.step(max(trials.found)):.1g} along random directions. The loss is defined on too small a "
            "neighbourhood, or not a function of the parameters alone."
        )
    return trials.step(_best(trials, k, onward, tolerance) if trials.tells(k) else k), trials.spent


def _first(trials: _Trials, onward: Callable[[int], bool]) -> int:
    """A step near the start that shows curvature; where none does, the longest, which bounds it best."""
    if trials.tells(0):
        return 0
    trials.budget += trials.reserve
    longest = 0
    if trials.finite(0):
        k = 1
        while onward(k) and trials.finite(k):
            longest = k
            if trials.tells(k):
                return k
            k += 1
    k = -1
    while trials.may(k):
        if trials.tells(k):
            return k
        if not trials.finite(longest) and trials.finite(k) and trials.at(k).any():  # else parameters hardly move
            longest = k
        k -= 1
    return longest


def _best(trials: _Trials, k: int, onward: Callable[[int], bool], tolerance: float) -> int:
    """The bottom of the valley around a step."""
    best, j = k, k - 1
    while trials.disagreement(best) > tolerance and trials.may(j) and trials.tells(j):
        if trials.disagreement(j) >= trials.disagreement(best):
            break
        best, j = j, j - 1
    j = k + 1
    while trials.disagreement(best) > tolerance and onward(j):
        least = trials.disagreement(best)
        if math.isinf(trials.disagreement(j)) or (trials.disagreement(j) > HUMP * least and least < FLAT):
            break
        best, j = min(best, j, key=trials.disagreement), j + 1
    return best
