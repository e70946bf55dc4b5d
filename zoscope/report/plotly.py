"""Pictures as plotly draws them in a browser: plain JSON, without its Python objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from zoscope.report.pictures import BLACK, Axis, Band, Chart, Line, Look, Numbers, Panel, Points, Rug, Rule

UNIT, GAP, EDGES = 75, 26, 96
"""Pixels: a panel of height 1, the room between panels, and what is above and below all of them."""

DASHES = {"solid": "solid", "dashed": "dash", "dashdot": "dashdot", "dotted": "dot"}
SYMBOLS = {"triangle": "triangle-up", "cross": "x", "down": "triangle-down"}
"""Markers that have another name there."""

MARKED = 10
GRID = "#e5e5e5"


def plot_of(chart: Chart) -> dict[str, Any]:
    """Traces and layout of a chart, as ``Plotly.newPlot`` takes them; texts are escaped."""
    heights = [UNIT * panel.height for panel in chart.panels]
    whole = sum(heights) + GAP * (len(heights) - 1)
    traces: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": round(whole + EDGES),
        "margin": {"l": 70, "r": 20, "t": 44, "b": 52},
        "title": {"text": escape(chart.title), "x": 0, "xanchor": "left", "font": {"size": 15}},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#888", "activecolor": "#0072B2"},
        "xaxis": _axis(chart.x, _along(chart.panels)) | {"anchor": _name("y", len(heights) - 1)},
        "shapes": shapes,
    }
    top = whole
    for number, (panel, height) in enumerate(zip(chart.panels, heights, strict=True)):
        domain = [max(top - height, 0.0) / whole, min(top / whole, 1.0)]
        top -= height + GAP
        layout[_name("yaxis", number)] = _axis(panel.y, _upwards(panel)) | {"anchor": "x", "domain": domain}
        legend = _name("legend", number)
        layout[legend] = {"x": 1.02, "xanchor": "left", "y": domain[1], "yanchor": "top", "font": {"size": 11}}
        for trace in _traces(panel):
            traces.append({"xaxis": "x", "yaxis": _name("y", number), "legend": legend} | trace)
        shapes += [_rule(mark, _name("y", number), legend) for mark in panel.marks if isinstance(mark, Rule)]
    return {"data": traces, "layout": layout}


def _name(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}{number + 1}"


def _along(panels: Sequence[Panel]) -> list[Numbers]:
    return [mark.x for panel in panels for mark in panel.marks if not isinstance(mark, Rule)]


def _upwards(panel: Panel) -> list[Numbers]:
    return [mark.y for mark in panel.marks if isinstance(mark, Line | Points)]


FEW = 4.0
"""Decades up to which a logarithmic axis has ticks at 2 and 5."""


def _axis(axis: Axis, rows: Sequence[Numbers]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": {"text": escape(axis.label)},
        "type": "log" if axis.log else "linear",
        "gridcolor": GRID,
        "zeroline": False,
        "showline": True,
        "linecolor": "#444",
        "ticks": "outside",
        "automargin": True,
        "exponentformat": "power",
    }
    if axis.log:
        ends = axis.limits or [value for row in rows for value in row if value is not None and value > 0]
        decades = math.log10(max(ends) / min(ends)) if ends else 0.0
        found |= {"dtick": "D2", "tickformat": "~g"} if 0.5 < decades < FEW else {}
    if axis.limits:
        found["range"] = [math.log10(end) for end in axis.limits] if axis.log else list(axis.limits)
    if axis.ticks:
        places, texts = axis.ticks
        found |= {"tickmode": "array", "tickvals": list(places), "ticktext": [escape(text) for text in texts]}
    return found


def _traces(panel: Panel) -> Iterator[dict[str, Any]]:
    for mark in panel.marks:
        if isinstance(mark, Line):
            yield _line(mark)
        elif isinstance(mark, Band):
            yield _band(mark)
        elif isinstance(mark, Points):
            yield _points(mark)
        elif isinstance(mark, Rug):
            yield _rug(mark, panel.y)


def _trace(mode: str, x: Numbers, y: Numbers, label: str, hover: Sequence[str] = ()) -> dict[str, Any]:
    trace: dict[str, Any] = {"type": "scatter", "mode": mode, "x": list(x), "y": list(y), "showlegend": bool(label)}
    if label:
        trace["name"] = escape(label)
    if hover:
        trace |= {"text": [escape(text) for text in hover], "hoverinfo": "text+x+y" if mode != "markers" else "text"}
    return trace


def _stroke(look: Look) -> dict[str, Any]:
    return {"color": look.colour, "dash": DASHES[look.dash], "width": look.width + 0.3}


def _line(mark: Line) -> dict[str, Any]:
    look, mode = mark.look, "lines+markers" if mark.look.marker else "lines"
    trace = _trace(mode, mark.x, mark.y, mark.label, mark.hover)
    trace |= {"line": _stroke(look) | {"shape": "hv" if mark.steps else "linear"}, "opacity": look.opacity}
    if look.marker:
        trace["marker"] = {
            "symbol": SYMBOLS.get(look.marker, look.marker),
            "size": 7,
            "color": look.colour,
            "maxdisplayed": MARKED,
        }
    return trace


def _band(mark: Band) -> dict[str, Any]:
    """A polygon for every piece without a gap."""
    x: list[float | None] = []
    y: list[float | None] = []
    piece: list[tuple[float, float, float]] = []
    for place, low, high in (*zip(mark.x, mark.low, mark.high, strict=True), (None, None, None)):
        if place is not None and low is not None and high is not None:
            piece.append((place, low, high))
        elif piece:
            x += [p[0] for p in piece] + [p[0] for p in reversed(piece)] + [None]
            y += [p[1] for p in piece] + [p[2] for p in reversed(piece)] + [None]
            piece = []
    trace = _trace("lines", x[:-1], y[:-1], mark.label)
    trace |= {"fill": "toself", "hoverinfo": "skip", "line": {"width": 0}}
    trace["fillcolor"] = _rgba(mark.colour, mark.opacity)
    if mark.hatch:
        pattern = {"shape": mark.hatch, "fgcolor": mark.colour, "bgcolor": _rgba(mark.colour, mark.opacity)}
        trace["fillpattern"] = pattern | {"fgopacity": 0.6, "size": 9, "solidity": 0.12}
    return trace


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def _points(mark: Points) -> dict[str, Any]:
    look = mark.look
    if not look.marker:
        return _bars(mark)
    trace = _trace("markers", mark.x, mark.y, mark.label, mark.hover)
    symbol = SYMBOLS.get(look.marker, look.marker) + ("" if mark.filled else "-open")
    line = {"width": 0 if mark.filled else 1.5, "color": look.colour}
    trace["marker"] = {"symbol": symbol, "size": 9, "color": look.colour, "opacity": look.opacity, "line": line}
    if mark.low:
        middle = mark.x if mark.across else mark.y
        bars = {"type": "data", "symmetric": False, "color": look.colour, "thickness": look.width}
        bars["array"] = _lengths(mark.high, middle)
        bars["arrayminus"] = _lengths(middle, mark.low)
        trace["error_x" if mark.across else "error_y"] = bars
    return trace


def _lengths(above: Numbers, below: Numbers) -> list[float]:
    pairs = zip(above, below, strict=True)
    return [0.0 if high is None or low is None else max(high - low, 0.0) for high, low in pairs]


def _bars(mark: Points) -> dict[str, Any]:
    """Bars alone, as lines."""
    along: list[float | None] = [end for pair in zip(mark.low, mark.high, strict=True) for end in (*pair, None)]
    across: list[float | None] = [end for at in (mark.y if mark.across else mark.x) for end in (at, at, None)]
    x, y = (along, across) if mark.across else (across, along)
    trace = _trace("lines", x, y, mark.label, [text for text in mark.hover for _ in range(3)])
    return trace | {"line": _stroke(mark.look) | {"dash": "solid"}, "opacity": mark.look.opacity}


def _rule(mark: Rule, axis: str, legend: str) -> dict[str, Any]:
    along = {"xref": "x domain", "x0": 0, "x1": 1, "yref": axis, "y0": mark.at, "y1": mark.at}
    if not mark.level:
        along = {"xref": "x", "x0": mark.at, "x1": mark.at, "yref": f"{axis} domain", "y0": 0, "y1": 1}
    shape: dict[str, Any] = {"type": "line", "line": _stroke(mark.look), "layer": "above", **along}
    return shape | ({"showlegend": True, "name": escape(mark.label), "legend": legend} if mark.label else {})


def _rug(mark: Rug, axis: Axis) -> dict[str, Any]:
    low, high = axis.limits or (0.0, 1.0)
    place = low * (high / low) ** 0.97 if axis.log else low + 0.97 * (high - low)
    trace = _trace("markers", mark.x, [place] * len(mark.x), mark.label)
    return trace | {
        "marker": {"symbol": "line-ns-open", "size": 12, "color": BLACK, "line": {"width": 1}},
        "hoverinfo": "skip",
    }
