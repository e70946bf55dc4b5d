"""Errors of functions of two estimates."""

from __future__ import annotations

import math
from collections.abc import Callable

from zoscope.theory.spectrum import Estimate


def propagated(
    function: Callable[[float, float], float], first: Estimate, second: Estimate, *, independent: bool
) -> Estimate:
    """A function of two estimates; its error is how far it moves over their 95 % intervals, one after the other.

    The errors add up where they may go together, and add in squares where they are independent.
    """
    value = function(first.value, second.value)
    if not math.isfinite(value):
        return Estimate(value)
    moves = (
        max(abs(function(end, second.value) - value) for end in first.interval),
        max(abs(function(first.value, end) - value) for end in second.interval),
    )
    return Estimate(value, (math.hypot(*moves) if independent else sum(moves)) / 1.96)
