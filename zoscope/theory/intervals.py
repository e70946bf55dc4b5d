"""How far the ends of an interval from moments of the spectrum may be off, where the moments were sampled."""

import math
from collections.abc import Callable

import numpy as np

from zoscope.theory.spectrum import Array, SampledSpectrum
from zoscope.theory.thresholds import Interval

STEP = 1e-6
"""Relative step of the derivatives by a moment; they are an error bar's, so that more digits say nothing."""

OfMoments = Callable[[float, float, float], Interval]
"""An interval from ``Tr M``, ``‖M‖_F²`` and ``λ_max``."""


def interval_ci95(
    bounds: OfMoments, sampled: SampledSpectrum, *, largest: float, residual: float, positive: bool
) -> tuple[float, float]:
    """From the lower 95 % end of the lower bound to the upper 95 % end of the upper one.

    To first order a bound changes with its moments as ``∂₁ δTr M + ∂₂ δ‖M‖_F² = δTr h(M)``, ``h(x) = ∂₁x + ∂₂x²``, a
    trace whose error the spectrum knows. That of λ_max is at most its residual.

    Args:
        bounds: The interval as a function of its moments.
        sampled: Spectrum with its errors.
        largest: λ_max.
        residual: Of that eigenvalue.
        positive: Whether the moments are those of the positive part.

    Returns:
        Two step sizes in param²/loss, the lower one cut at 0; ``inf`` where a bound is.
    """

    def part(x: Array) -> Array:
        return np.maximum(x, 0.0) if positive else x

    point = (sampled.fine.trace_of(part), sampled.fine.trace_of(lambda x: part(x) ** 2), largest)
    found = bounds(*point)

    def half_width(end: str) -> float:
        by_trace, by_square, by_largest = (_derivative(bounds, point, place, end) for place in range(3))
        change = sampled.trace_of(lambda x: by_trace * part(x) + by_square * part(x) ** 2)
        return change.half_width + abs(by_largest) * residual

    lower, upper = (
        math.inf if math.isinf(value) else value + sign * half_width(end)
        for value, sign, end in ((found.lower, -1, "lower"), (found.upper, 1, "upper"))
    )
    return max(lower, 0.0), upper


def _derivative(bounds: OfMoments, point: tuple[float, float, float], place: int, end: str) -> float:
    step = STEP * abs(point[place])
    if step == 0:
        return 0.0
    ends = [
        getattr(bounds(*(x + sign * step * (i == place) for i, x in enumerate(point))), end) for sign in (-1.0, 1.0)
    ]
    slope = float(ends[1] - ends[0]) / (2 * step)
    return slope if math.isfinite(slope) else 0.0
