"""The picture of a spectrum: eigenvalues per decade over eigenvalues of both signs, with the band and the outliers."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoscope.report.bounds_tables import OPERATOR_NAMES
from zoscope.report.figures import COLOURS, new_figure, require_matplotlib, save
from zoscope.report.style import count, quantity
from zoscope.theory.density import position_of

if TYPE_CHECKING:
    from zoscope.analysis.density_results import SpectrumResult
    from zoscope.theory.spectrum import Array

POSITIVE, NEGATIVE = COLOURS[:2]

LOWEST = 0.2
"""Where the axis of the density begins, eigenvalues per decade; one eigenvalue alone rises to 2.7."""

MOST_MARKS = 300
"""More outliers than these are a bulk: then only the ends are marked."""

RESOLVED = 0.03
"""A smallest eigenvalue nearer to zero than this is zero in the picture, in units of its scale."""

TICK_DISTANCE = 0.06
"""Least distance of two ticks, in units of the axis."""


def draw(result: SpectrumResult, path: Path) -> None:
    """Write the picture; its format follows the file name.

    Raises:
        UsageError: If matplotlib is not installed, does not know the format, or the file cannot be written.
    """
    require_matplotlib()
    figure: Any = new_figure(width=8, height=4.5)
    axes: Any = figure.subplots()
    _draw_density(axes, result)
    _draw_outliers(axes, result)
    _label(axes, result)
    save(figure, path)


def _draw_density(axes: Any, result: SpectrumResult) -> None:
    density = result.density
    low = np.maximum(density.values - density.half_widths, LOWEST)
    high = np.maximum(density.values + density.half_widths, LOWEST)
    line = np.maximum(density.values, LOWEST)
    for colour, side, style, label in (
        (NEGATIVE, density.positions <= 0, "--", "negative"),
        (POSITIVE, density.positions >= 0, "-", "positive"),
    ):
        if colour == NEGATIVE and not _goes_below_zero(result):
            continue  # the kernel does, around eigenvalues at zero
        x = density.positions[side]
        axes.fill_between(x, LOWEST, line[side], color=colour, alpha=0.12, linewidth=0)
        axes.fill_between(x, low[side], high[side], color=colour, alpha=0.35, linewidth=0)
        if (line[side] > LOWEST).any():
            axes.plot(x, _gaps(line[side]), style, color=colour, linewidth=1.6, label=label)
    axes.axvline(0, color="0.5", linewidth=0.8)


def _goes_below_zero(result: SpectrumResult) -> bool:
    return result.curvature.lambda_min.value < -RESOLVED * result.density.scale


def _gaps(line: Array) -> Array:
    return np.where(line > LOWEST, line, np.nan)  # how matplotlib leaves a line out


def _draw_outliers(axes: Any, result: SpectrumResult) -> None:
    values, label = result.outliers, "known one by one"
    if len(values) > MOST_MARKS:
        values = np.array([eigenvalue.value for eigenvalue in (*result.top, *result.bottom)])
        label = "ends of the spectrum"
    if not len(values):
        return
    places = position_of(values, scale=result.density.scale)
    height = np.full(len(places), 0.97)
    axes.plot(
        places,
        height,
        "|",
        color="black",
        markersize=9,
        markeredgewidth=0.9,
        transform=axes.get_xaxis_transform(),
        label=label,
        clip_on=False,
    )


def _label(axes: Any, result: SpectrumResult) -> None:
    density = result.density
    edges = position_of(np.array([-density.scale, density.scale]), scale=density.scale)
    axes.axvspan(*edges, color="0.9", zorder=0, label=f"|λ| < {quantity(density.scale, digits=1)}: linear axis")
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 3 * float(np.max(density.values + density.half_widths)))
    shown = density.positions[density.values + density.half_widths > LOWEST]
    left = shown[0] if _goes_below_zero(result) else max(shown[0], 0.0)
    axes.set_xlim(left, shown[-1])
    axes.set_xticks(*_ticks(left, shown[-1], scale=density.scale))
    axes.set_xlabel("eigenvalue λ (loss/param²)")
    axes.set_ylabel("eigenvalues per decade, smoothed")
    band = "" if result.curvature.method == "dense" else ", 95 % band"
    name = OPERATOR_NAMES.get(result.operator, result.operator)
    axes.set_title(
        f"{result.spec or 'problem'}: {name}, {count(result.problem.num_params)} eigenvalues{band}", fontsize="medium"
    )
    axes.legend(fontsize="small", frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.94))


def _ticks(left: float, right: float, *, scale: float) -> tuple[list[float], list[str]]:
    """Places and labels of zero and of powers of ten of both signs; where they crowd, the larger ones."""
    places, labels = [0.0], ["0"]
    span = max(-left, right)
    first, last = (math.floor(math.log10(scale)) - 1, math.ceil(math.log10(scale) + span))
    for power, (sign, mark) in product(range(last, first, -1), ((1, ""), (-1, "−"))):
        place = float(position_of(np.array([sign * 10.0**power]), scale=scale)[0])
        apart = min(abs(place - other) for other in places) >= TICK_DISTANCE * (right - left)
        if left <= place <= right and apart:
            places.append(place)
            labels.append(rf"${mark}10^{{{power}}}$")
    return places, labels
