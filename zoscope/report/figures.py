"""Pictures as matplotlib draws them, and as files."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.errors import UsageError, require_package
from zoscope.files import write_whole
from zoscope.report.pictures import (
    BLACK,
    Axis,
    Band,
    Chart,
    Line,
    Look,
    Numbers,
    Panel,
    Picture,
    Points,
    Rug,
    Rule,
    picture_of,
    power_of_ten,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
WIDTH, ROOM, UNIT = 9.5, 0.7, 0.85
"""Inches: the width of a picture, what a chart takes besides its panels, and a panel of height 1."""

LEGEND_LINE = 0.19
"""Inches of a line of a legend."""

MARKED = 10
"""About so many markers on a curve."""

MANY = 40
"""More points than these are small."""

WIDE = 3.0
"""Bars of this width have no caps."""

DASHES = {"solid": "-", "dashed": "--", "dashdot": "-.", "dotted": ":"}
MARKERS = {
    "": "",
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "cross": "X",
    "star": "*",
    "down": "v",
}
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names from outside may hold dollar signs
    "svg.hashsalt": "zoscope",  # the same result makes the same file
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "hatch.linewidth": 0.4,
}


def draw(document: Mapping[str, Any], paths: Sequence[Path], *, option: str = "--plot") -> None:
    """Write the picture of a result, once for every path; the format follows the file name.

    Args:
        document: The JSON document of the result.
        paths: Where to.
        option: What asked for it, for messages.

    Raises:
        UsageError: If matplotlib is not installed, does not know a format, or a file cannot be written.
    """
    require_package("matplotlib", option=option, extra="plot")
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in letters that the font lacks
        figure = figure_of(picture_of(document))
        for path in paths:
            _save(figure, path, option=option)


def _save(figure: Figure, path: Path, *, option: str) -> None:
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=path.suffix.removeprefix(".").lower(), dpi=DPI, metadata=metadata)
        write_whole(path, buffer.getvalue())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option}: cannot write {path} ({error}). Choose another name, such as {path.stem or 'plot'}.png."
        ) from None


def figure_of(picture: Picture) -> Figure:
    """The figure, with a legend to the right of every panel that has named marks.

    pyplot is left out, which would choose a window system.
    """
    from matplotlib.figure import Figure

    panels = [panel for chart in picture.charts for panel in chart.panels]
    heights = [_height(panel) for panel in panels]
    size = (WIDTH, 0.4 + sum(heights) + ROOM * len(picture.charts))
    figure: Figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(picture.title, fontsize=11, x=0.01, ha="left")
    if not panels:
        return figure
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    row = 0
    for chart in picture.charts:
        axes = [figure.add_subplot(grid[row])]
        axes += [figure.add_subplot(grid[row + n], sharex=axes[0]) for n in range(1, len(chart.panels))]
        row += len(axes)
        _draw_chart(axes, chart)
    return figure


def _height(panel: Panel) -> float:
    named = sum(bool(getattr(mark, "label", "")) for mark in panel.marks)
    return max(UNIT * panel.height, LEGEND_LINE * named + 0.1)


def _draw_chart(axes: Sequence[Any], chart: Chart) -> None:
    axes[0].set_title(chart.title)
    for panel_axes, panel in zip(axes, chart.panels, strict=True):
        for mark in panel.marks:
            _MARKS[type(mark)](panel_axes, mark)
        _set_axis(panel_axes, "y", panel.y)
        _set_axis(panel_axes, "x", chart.x)
        if panel_axes is not axes[-1]:
            panel_axes.set_xlabel("")
            panel_axes.tick_params(axis="x", which="both", labelbottom=False)
        if panel_axes.get_legend_handles_labels()[1]:
            panel_axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0)


def _set_axis(axes: Any, which: str, axis: Axis) -> None:
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    getattr(axes, f"set_{which}label")(axis.label)
    own = axes.xaxis if which == "x" else axes.yaxis
    if axis.log:
        getattr(axes, f"set_{which}scale")("log", nonpositive="mask")
    if axis.limits:
        getattr(axes, f"set_{which}lim")(*axis.limits)
    if axis.log:
        low, high = getattr(axes, f"get_{which}lim")()
        decades = math.log10(high / low) if 0 < low < high else 1.0
        subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
        own.set_major_locator(LogLocator(subs=subs) if decades > 0.8 else AutoLocator())
        own.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
        own.set_minor_formatter(NullFormatter())
    if axis.whole:
        own.set_major_locator(MaxNLocator(integer=True))
    if axis.ticks is not None:
        getattr(axes, f"set_{which}ticks")(axis.ticks[0], labels=axis.ticks[1])
        getattr(axes, f"set_{which}ticks")([], minor=True)


def tick_text(value: float) -> str:
    """A place on a logarithmic axis: plain where that is short, else a power of ten and its factor."""
    if not value > 0:
        return ""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    factor = value / 10.0 ** math.floor(math.log10(value) + 1e-9)
    power = power_of_ten(value / factor)
    return power if abs(factor - 1) < 1e-6 else f"{factor:.0f}·{power}"


def _numbers(values: Numbers) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _line_options(look: Look) -> dict[str, Any]:
    return {"color": look.colour, "linestyle": DASHES[look.dash], "linewidth": look.width, "alpha": look.opacity}


def _line(axes: Any, mark: Line) -> None:
    marker = MARKERS[mark.look.marker]
    options = _line_options(mark.look) | {"label": mark.label or "_", "marker": marker, "markersize": 4.5}
    axes.plot(
        _numbers(mark.x),
        _numbers(mark.y),
        drawstyle="steps-post" if mark.steps else "default",
        markevery=max(1, math.ceil(len(mark.x) / MARKED)),
        **options,
    )


def _band(axes: Any, mark: Band) -> None:
    axes.fill_between(
        _numbers(mark.x),
        _numbers(mark.low),
        _numbers(mark.high),
        facecolor=(mark.colour, mark.opacity),
        edgecolor=(mark.colour, min(1.0, 2.5 * mark.opacity)) if mark.hatch else "none",
        hatch=3 * mark.hatch,
        linewidth=0,
        label=mark.label or "_",
    )


def _points(axes: Any, mark: Points) -> None:
    look = mark.look
    x, y = _numbers(mark.x), _numbers(mark.y)
    size = 6 if len(x) <= MANY else 3
    options = {"color": look.colour, "alpha": look.opacity, "markersize": size, "marker": MARKERS[look.marker]}
    bars: dict[str, Any] = {}
    if mark.low:
        middle = x if mark.across else y
        low, high = _numbers(mark.low), _numbers(mark.high)
        below = [max(value - end, 0.0) if end == end else 0.0 for value, end in zip(middle, low, strict=True)]
        above = [max(end - value, 0.0) if end == end else 0.0 for value, end in zip(middle, high, strict=True)]
        bars = {"xerr" if mark.across else "yerr": [below, above], "elinewidth": look.width}
        bars["capsize"] = 3 if look.width < WIDE else 0
    axes.errorbar(
        x,
        y,
        linestyle="",
        markerfacecolor=look.colour if mark.filled else "white",
        label=mark.label or "_",
        **options,
        **bars,
    )


def _rule(axes: Any, mark: Rule) -> None:
    draw_it = axes.axhline if mark.level else axes.axvline
    draw_it(mark.at, label=mark.label or "_", zorder=1, **_line_options(mark.look))


def _rug(axes: Any, mark: Rug) -> None:
    axes.plot(
        mark.x,
        [0.97] * len(mark.x),
        "|",
        color=BLACK,
        markersize=9,
        markeredgewidth=0.9,
        transform=axes.get_xaxis_transform(),
        label=mark.label or "_",
    )


_MARKS: dict[type, Any] = {Line: _line, Band: _band, Points: _points, Rule: _rule, Rug: _rug}
