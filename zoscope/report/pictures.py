"""What the pictures of results show: curves, zones and points from JSON documents, for whatever draws them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from statistics import median
from typing import Any

import numpy as np

from zoscope.config.load import AUTOMATIC, Schedule, StepSizes, step_sizes, training_step_sizes
from zoscope.registry import OPTIMIZERS, family_of, is_zeroth_order, optimizer_name, term_of
from zoscope.report.words import OPERATOR_NAMES, count, quantity, step_size, step_size_at_most
from zoscope.text import clean
from zoscope.theory.density import position_of

Document = Mapping[str, Any]
Numbers = Sequence[float | None]
"""Places or heights; ``None`` leaves a gap."""

# Okabe and Ito: distinct for every common kind of colour blindness. In print dashes and markers tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = COLOURS
GREY = "#777777"
DASHES = ("solid", "dashed", "dashdot", "dotted")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "star", "down")


@dataclass(frozen=True)
class Look:
    """How a line or points look; no marker where ``marker`` is empty."""

    colour: str = BLACK
    dash: str = "solid"
    marker: str = ""
    width: float = 1.5
    opacity: float = 1.0


def look_of(number: int) -> Look:
    """One of 28 looks: colour and marker go round by seven, dashes by four."""
    return Look(COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        x: Places.
        y: Heights.
        label: Its name in the legend; none where it is empty.
        look: How it looks; markers are set at about ten places.
        steps: Whether every height holds from its place to the next one, in place of straight lines between them.
        hover: What to say about each point.
    """

    x: Numbers
    y: Numbers
    label: str = ""
    look: Look = Look()
    steps: bool = False
    hover: Sequence[str] = ()


@dataclass(frozen=True)
class Band:
    """The area between two curves, or a zone of a ruler."""

    x: Numbers
    low: Numbers
    high: Numbers
    label: str = ""
    colour: str = BLUE
    opacity: float = 0.2
    hatch: str = ""


@dataclass(frozen=True)
class Points:
    """Points alone, with bars from ``low`` to ``high``: along x where ``across``, else along y.

    Args:
        x: Places.
        y: Heights.
        label: Name in the legend.
        look: How they look.
        low: Lower ends of their bars; empty for no bars.
        high: Upper ends.
        across: Whether bars lie along x.
        filled: Whether markers are full.
        hover: What to say about each.
    """

    x: Numbers
    y: Numbers
    label: str = ""
    look: Look = Look(marker="circle")
    low: Numbers = ()
    high: Numbers = ()
    across: bool = False
    filled: bool = True
    hover: Sequence[str] = ()


@dataclass(frozen=True)
class Rule:
    """A line across the panel, at a place of the x axis or, with ``level``, at a height."""

    at: float
    label: str = ""
    look: Look = Look(GREY, "dotted", width=1.0)
    level: bool = False


@dataclass(frozen=True)
class Rug:
    """Short marks along the upper edge."""

    x: Numbers
    label: str = ""


Mark = Line | Band | Points | Rule | Rug


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        label: What it shows, with its unit.
        log: Whether it is logarithmic.
        limits: Its ends; ``None`` for what the marks take.
        ticks: Places and their texts, where they are not left to whoever draws.
        whole: Whether there is nothing between whole numbers.
    """

    label: str = ""
    log: bool = False
    limits: tuple[float, float] | None = None
    ticks: tuple[tuple[float, ...], tuple[str, ...]] | None = None
    whole: bool = False


@dataclass(frozen=True)
class Panel:
    """Marks over one vertical axis; ``height`` is relative to those of other panels."""

    y: Axis
    marks: tuple[Mark, ...]
    height: float = 3.0


@dataclass(frozen=True)
class Chart:
    """Panels above one another that share a horizontal axis."""

    x: Axis
    panels: tuple[Panel, ...]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """Charts above one another."""

    title: str
    charts: tuple[Chart, ...]


def picture_of(document: Document) -> Picture:
    """The picture of a result.

    Args:
        document: Its JSON document.

    Raises:
        ValueError: If there is none of such documents.
    """
    schema = document.get("schema")
    if schema not in _PICTURES:
        raise ValueError(f"there is no picture of {schema!r}")
    return _PICTURES[str(schema)](document)


LONGEST = 60
"""Characters of a name in a title or a legend."""


def name_of(text: Any, most: int = LONGEST) -> str:
    """A name from outside, made fit for a title: its end where it is long."""
    shown = clean(" ".join(str(text or "").split()))
    return shown if len(shown) <= most else f"…{shown[1 - most :]}"


def _title(document: Document, *parts: str) -> str:
    return ", ".join([name_of(document.get("spec") or "problem"), *parts])


def _positive(values: Iterable[Any]) -> list[float]:
    return [value for value in values if value is not None and 0 < value < math.inf]


# --- bounds -----------------------------------------------------------------------------------------------------------

HALF = 0.3
"""Half the height of a row of the ruler."""


def _bounds(document: Document) -> Picture:
    rows = list(document["optimizers"].items())
    charts = [_ruler(document, rows)]
    if any(_has_horizon(row) for _, row in rows):
        charts.append(_horizons(document, rows))
    return Picture(_title(document, "step sizes"), tuple(charts))


def _verdict_lr(rows: Sequence[tuple[str, Document]]) -> float | None:
    return next((row["verdict"]["lr"] for _, row in rows if row.get("verdict")), None)


def _ruler(document: Document, rows: Sequence[tuple[str, Document]]) -> Chart:
    asked = _verdict_lr(rows)
    known = _positive([asked, *(value for _, row in rows for value in _landmarks(row))])
    low, high = (min(known) / 4, max(known) * 2.5) if known else (1e-3, 1.0)
    marks: list[Mark] = [*_zones(rows, low=low)]
    heights = range(len(rows) - 1, -1, -1)
    found: dict[str, list[tuple[float, float, float, float]]] = {"best": [], "edge": [], "first": []}
    for height, (_, row) in zip(heights, rows, strict=True):
        found["best"] += _recommended(row, height)
        limit = row["zo"]["limit"]
        if limit and limit["value"] is not None:
            ends = limit["ci95"] or (None, None)
            bottom = limit["value"] if ends[0] is None else max(ends[0], low)
            found["edge"].append((limit["value"], height, bottom, high if ends[1] is None else ends[1]))
        if row["fo"] is not None:
            found["first"].append((row["fo"], height, row["fo"], row["fo"]))
    labels = (
        ("best", "lr to use, at most", Look(GREEN, marker="circle"), True),
        ("edge", "edge, 95 %", Look(ORANGE, marker="diamond"), True),
        ("first", "first-order bound", Look(BLACK, marker="square"), False),
    )
    for key, label, look, filled in labels:
        points = found[key]
        if points:
            x, y, bottoms, tops = zip(*points, strict=True)
            bars = (bottoms, tops) if key != "first" else ((), ())
            marks.append(Points(x, y, label, look, *bars, across=True, filled=filled, hover=[step_size(v) for v in x]))
    if asked is not None:
        marks.append(Rule(asked, f"lr = {asked:g}", Look(PINK, "dashed", width=1.5)))
    names = tuple(f"ZO-{OPTIMIZERS[family].label}" if family in OPTIMIZERS else name_of(family) for family, _ in rows)
    axis = Axis("", limits=(-0.6, len(rows) - 0.4), ticks=(tuple(map(float, heights)), names))
    panel = Panel(axis, tuple(marks), height=1.0 + 0.5 * len(rows))
    title = "Which step sizes do what" if known else "Nothing limits the step size here"
    return Chart(Axis("step size", log=True, limits=(low, high)), (panel,), title)


def _landmarks(row: Document) -> Iterator[float | None]:
    zo = row["zo"]
    yield from (row["fo"], zo["recommended"])
    if zo["limit"]:
        yield zo["limit"]["value"]
        yield from zo["limit"]["ci95"] or ()
    yield from zo["recommended_range"] or ()


def _recommended(row: Document, height: float) -> Iterator[tuple[float, float, float, float]]:
    best, span = row["zo"]["recommended"], row["zo"]["recommended_range"]
    if best is not None:
        yield best, height, span[0] if span else best, best


def _zones(rows: Sequence[tuple[str, Document]], *, low: float) -> Iterator[Band]:
    """Zones of every row, each kind named once."""
    kinds = (
        ("the loss falls", GREEN, 0.45, ""),
        ("close to the edge", YELLOW, 0.4, "/"),
        ("diverges; first order would be stable", ORANGE, 0.15, "x"),
    )
    named: set[str] = set()
    for height, (_, row) in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        zo, limit = row["zo"], row["zo"]["limit"]
        best, edge = zo["recommended"], limit["value"] if limit else None
        ends = (low, best, edge, row["fo"])
        for (label, colour, opacity, hatch), (left, right) in zip(kinds, pairwise(ends), strict=True):
            if left is not None and right is not None and left < right:
                bottom, top = (height - HALF,) * 2, (height + HALF,) * 2
                shown = "" if label in named else label
                named.add(label)
                yield Band((left, right), bottom, top, shown, colour, opacity, hatch)


def _has_horizon(row: Document) -> bool:
    """Whether any η*(T) is a number: not where only forward passes were made, and not where nothing limits it."""
    horizon = row["zo"]["horizon"]
    return horizon is not None and bool(_positive(point["upper"] for point in horizon["curve"]))


def _horizons(document: Document, rows: Sequence[tuple[str, Document]]) -> Chart:
    """η*(T), with the paper's interval and the exact threshold at infinity."""
    known = [(number, name, row["zo"]) for number, (name, row) in enumerate(rows) if _has_horizon(row)]
    times = sorted({point["steps"] for _, _, zo in known for point in zo["horizon"]["curve"]})
    last = times[-1]
    marks: list[Mark] = []
    for number, name, zo in known:
        label = optimizer_name(f"zo-{name}") if name in OPTIMIZERS else name_of(name)
        curve, look = zo["horizon"]["curve"], replace(look_of(number), dash="solid")
        x = [point["steps"] for point in curve]
        low, high = ([point[end] for point in curve] for end in ("lower", "upper"))
        marks.append(Band(x, low, high, colour=look.colour, opacity=0.15))
        hover = [f"{label}: {step_size(a)} to {step_size(b)}" for a, b in zip(low, high, strict=True)]
        marks.append(Line(x, high, f"{label}, η*(N)", look, hover=hover))
        marks.append(Line(x, low, "", replace(look, dash="dashed", width=1.0, marker="")))
        if zo["lower"] is not None and zo["upper"] is not None:
            place = last * 10 ** (0.5 + 0.15 * number)
            ends = ((zo["lower"],), (zo["upper"],))
            text = f"{label}, the paper's interval: {step_size(zo['lower'])} to {step_size(zo['upper'])}"
            middle = math.sqrt(zo["lower"] * zo["upper"])
            marks.append(Points((place,), (middle,), "", replace(look, marker=""), *ends, hover=(text,)))
            text = f"{label}, exact: {step_size(zo['exact'])}"
            marks.append(Points((place,), (zo["exact"],), "", look, hover=(text,)))
    marks.append(
        Line((None,), (None,), "dashed: all eigenvalues; solid: positive ones", Look(GREY, "dashed", width=1.0))
    )
    marks.append(Points((None,), (None,), "N → ∞: exact; bar: the paper's interval", Look(GREY, marker="circle")))
    marks.append(Rule(document["steps"], f"planned: {count(document['steps'])} steps"))
    decades = [10.0**power for power in range(math.ceil(math.log10(times[0])), math.floor(math.log10(last)) + 1)]
    infinity = last * 10 ** (0.5 + 0.075 * (len(rows) - 1))
    ticks = ((*decades, infinity), (*map(power_of_ten, decades), "∞"))
    axis = Axis("steps N", log=True, limits=(times[0] / 1.3, last * 10 ** (0.8 + 0.15 * (len(rows) - 1))), ticks=ticks)
    panel = Panel(Axis("largest stable step size η*", log=True), tuple(marks), height=3.4)
    whole = " with all examples at every step" if any(row["zo"].get("minibatch") for _, row in rows) else ""
    return Chart(axis, (panel,), f"Stable for how many steps{whole}")


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(value: float) -> str:
    """``10⁻³``."""
    return f"10{str(round(math.log10(value))).translate(SUPERSCRIPTS)}"


# --- plan -------------------------------------------------------------------------------------------------------------

MOST_PATHS = 6
"""Loss curves of a plan that are drawn."""


PAST_EDGE = 2.5
"""Step sizes above so many times the edge, where the search began, are left out: all runs diverge there."""


def _plan(document: Document) -> Picture:
    question, answer = document["question"], document["answer"]
    title = _title(document, optimizer_name(question["optimizer"]), f"{count(question['steps'])} steps")
    charts = [_losses_by_size(document)] if document["curve"] else []
    paths = _chosen_paths(document)
    if paths:
        marks: list[Mark] = [
            Line(
                path["steps"],
                path["loss"],
                _path_name(path["lr"], answer["lr"]),
                replace(look_of(number), width=2.4 if path["lr"] == answer["lr"] else 1.3),
            )
            for number, path in enumerate(paths)
        ]
        marks.append(Rule(answer["loss_start"], "loss at the start", level=True))
        axis = Axis("loss, mean of the runs that stay", log=_all_positive(path["loss"] for path in paths))
        charts.append(
            Chart(Axis("step", whole=True), (Panel(axis, tuple(marks)),), "Predicted loss curves by step size")
        )
    return Picture(title, tuple(charts))


def _path_name(lr: float, answer: float | None) -> str:
    return f"{step_size_at_most(lr)} (the answer)" if lr == answer else step_size(lr)


def _losses_by_size(document: Document) -> Chart:
    answer, edge = document["answer"], document["edge"]
    most = PAST_EDGE * (edge["lr"] or math.inf)
    curve = [point for point in document["curve"] if point["lr"] <= most] or document["curve"]
    lrs = [point["lr"] for point in curve]
    low, high, mean = ([point[key] for point in curve] for key in ("loss_lo", "loss_hi", "loss_mean"))
    risk = [point["risk"] for point in curve]
    shared: list[Mark] = []
    if answer["lr"] is not None:
        shared.append(Rule(answer["lr"], f"the answer: {step_size_at_most(answer['lr'])}", Look(GREEN, width=1.8)))
    if edge["lr"] is not None:
        shared.append(Rule(edge["lr"], f"half diverge: {step_size(edge['lr'])}", Look(ORANGE, "dashed")))
    hover = [f"{point['left']} of {point['runs']} diverged" for point in curve]
    losses = (
        Band(lrs, low, high, "lowest to highest", BLUE, 0.2),
        Line(lrs, mean, "final loss, mean of the runs that stay", Look(BLUE, marker="circle"), hover=hover),
        Rule(answer["loss_start"], "loss at the start", level=True),
        *shared,
    )
    unnamed = tuple(replace(rule, label="") for rule in shared if isinstance(rule, Rule))
    risks: tuple[Mark, ...] = (
        Band(lrs, [0.0] * len(lrs), risk, colour=ORANGE, opacity=0.3),
        Line(lrs, risk, "risk: share of runs that diverge", Look(ORANGE, marker="square")),
        *unnamed,
    )
    if edge["ci95"]:
        ends = [value for value in edge["ci95"] if value is not None]
        if len(ends) == 2:
            look = Look(BLACK, marker="diamond")
            risks += (Points((edge["lr"],), (0.5,), "half diverge, 95 %", look, (ends[0],), (ends[1],), across=True),)
    top = Panel(Axis("final loss", log=_all_positive((low, high, mean))), losses)
    return Chart(
        Axis("step size", log=True),
        (top, Panel(Axis("risk", limits=(0.0, 1.05)), risks, height=1.5)),
        "Loss and risk by step size",
    )


def _chosen_paths(document: Document) -> list[Document]:
    """The answer's curve first, then others spread over the step sizes."""
    most = PAST_EDGE * (document["edge"]["lr"] or math.inf)
    paths = [path for path in document["paths"] if path["lr"] <= most]
    step = max(1, -(-len(paths) // (MOST_PATHS - 1)))
    answers = [entry for entry in paths if entry["lr"] == document["answer"]["lr"]]
    return answers + [entry for n, entry in enumerate(paths) if entry not in answers and n % step == 0]


def _all_positive(rows: Iterable[Numbers]) -> bool:
    values = [value for row in rows for value in row if value is not None]
    return bool(values) and min(values) > 0


# --- probe ------------------------------------------------------------------------------------------------------------

MOST_REPLICAS = 16
"""Replicas that are drawn of a run."""


def _probe(document: Document) -> Picture:
    charts = []
    runs = [run for run in document["runs"] if run.get("curves")]
    if runs:
        charts.append(_curves(document, runs))
    if document["edge"] and document["edge"]["points"]:
        charts.append(_edge(document["edge"]))
    return Picture(_title(document, optimizer_name(document["optimizer"]), document["outcome"]), tuple(charts))


def _curves(document: Document, runs: Sequence[Document]) -> Chart:
    ratios = sorted({run["ratio"] for run in runs})
    losses: list[Mark] = []
    distances: list[Mark] = []
    for run in runs:
        look = look_of(ratios.index(run["ratio"]))
        adaptive = run["variant"] == "adaptive"
        look = replace(look, dash="dotted" if adaptive else "solid", width=0.9, opacity=0.6)
        label = f"{run['ratio']:.3g} × threshold{', adaptive P' if adaptive else ''}"
        curves = run["curves"]
        for marks, key in ((losses, "losses"), (distances, "distances")):
            columns = list(zip(*curves[key], strict=True))[:MOST_REPLICAS]
            for number, column in enumerate(columns):
                shown = look if number == 0 else replace(look, marker="")
                marks.append(Line(curves["steps"], column, f"{label}, runs" if number == 0 else "", shown))
        if any(value is not None for value in curves["predicted"]):
            ceiling = 10.0 * abs(run["loss_start"]) + run["loss_start"]
            seen = [value for row in curves["losses"] for value in row if value is not None]
            floor = min(seen, default=0.0)
            floor = 0.0 if floor > 0 else floor - abs(run["loss_start"])  # a quadratic model may fall for ever
            inside = [v if v is not None and floor < v < ceiling else None for v in curves["predicted"]]
            predicted = replace(look, dash="dashed", width=2.2, opacity=1.0)
            losses.append(Line(curves["steps"], inside, f"{label}, predicted", predicted))
    losses.append(Rule(document["problem"]["loss"], "loss at the start", level=True))
    distances = [replace(mark, label="", y=_above_zero(mark.y)) for mark in distances if isinstance(mark, Line)]
    log = _all_positive(mark.y for mark in losses if isinstance(mark, Line))
    return Chart(
        Axis("step", whole=True),
        (
            Panel(Axis("loss", log=log), tuple(losses)),
            Panel(Axis("‖θ − θ₀‖²", log=True), tuple(distances), height=2.0),
        ),
        "Runs and their predicted mean",
    )


def _above_zero(values: Numbers) -> list[float | None]:
    return [value if value is not None and value > 0 else None for value in values]


def _edge(edge: Document) -> Chart:
    points = edge["points"]
    shares = [point["diverged"] / point["replicas"] for point in points]
    hover = [f"{point['diverged']} of {point['replicas']} diverged" for point in points]
    marks: list[Mark] = [
        Line([p["lr"] for p in points], shares, "runs that diverged", Look(BLUE, marker="circle"), hover=hover)
    ]
    if edge["found"]:
        marks.append(Rule(edge["value"], f"edge of runs: {step_size(edge['value'])}", Look(ORANGE)))
    if edge["predicted"] is not None:
        marks.append(Rule(edge["predicted"], f"predicted: {step_size(edge['predicted'])}", Look(GREEN, "dashed")))
    panel = Panel(Axis("share", limits=(-0.03, 1.03)), tuple(marks), 2.0)
    return Chart(Axis("step size", log=True), (panel,), "Where runs diverge")


# --- track ------------------------------------------------------------------------------------------------------------

HEADROOM = 1.5
"""Top of the curvature's axis over the largest value of the band: a term far above it, at small steps, is cut off."""

FAR = 5.0
"""A term that never comes nearer than this many times the band is left outside."""

BLOWN_UP = 30.0
"""Losses above this many times the first one are those of a run that diverged, and would flatten all others."""

SAMPLES = 400
"""Points of a step size that glides."""


def _track(document: Document) -> Picture:
    records = document["records"]
    panels = [_loss_panel(records)]
    sizes = step_sizes_of(document)
    panels.append(_sizes_panel(records, sizes))
    panels.append(_curvature_panel(document, records, sizes))
    if any(record.get("floor") is not None for record in records):
        panels.append(_floor_panel(records))
    title = _title(document, optimizer_name(document["optimizer"]))
    return Picture(title, (Chart(Axis("step", whole=True), tuple(panels)),))


def _steps(records: Sequence[Document]) -> list[int]:
    return [record["step"] for record in records]


def _values(records: Sequence[Document], key: str) -> list[float | None]:
    return [record.get(key) for record in records]


def _path(records: Sequence[Document]) -> list[tuple[int, float | None, float | None]]:
    return [tuple(point) for record in records for point in record.get("path") or ()]


def _loss_panel(records: Sequence[Document]) -> Panel:
    path, loss = _path(records), Look(BLACK, marker="circle")
    marks: list[Mark] = []
    if path:
        marks.append(Line([p[0] for p in path], [p[1] for p in path], "loss of the steps", Look(BLUE, width=1.0)))
        marks.append(Points(_steps(records), _values(records, "loss"), "loss of all examples", loss))
    else:
        marks.append(Line(_steps(records), _values(records, "loss"), "loss of all examples", loss))
    spikes = [(record["step"], record["loss_max"]) for record in records if _has_spike(record)]
    if spikes:
        x, y = zip(*spikes, strict=True)
        marks.append(Points(x, y, "largest of one step", Look(ORANGE, marker="down"), filled=False))
    return Panel(_loss_axis([records]), tuple(marks))


SPIKE = 1.05
"""A loss of one step this many times above the means of neighbours is marked."""


def _has_spike(record: Document) -> bool:
    drawn = [point[1] for point in record.get("path") or () if point[1] is not None]
    largest = record.get("loss_max")
    return bool(drawn) and largest is not None and largest > SPIKE * max(drawn) > 0


def _loss_axis(runs: Sequence[Sequence[Document]]) -> Axis:
    """Logarithmic where it can be; what a run that diverges does does not flatten everything before."""
    values = [r["loss"] for records in runs for r in records] + [p[1] for records in runs for p in _path(records)]
    known = [value for value in values if value is not None]
    starts = [records[0]["loss"] or 0.0 for records in runs if records]
    if starts and min(starts) > 0 and max(known) > BLOWN_UP * max(starts) and min(known) > 0:
        return Axis("loss", log=True, limits=(min(known) / 1.2, BLOWN_UP * max(starts)))
    return Axis("loss", log=_all_positive([values]))


def step_sizes_of(document: Document) -> tuple[list[int], list[float]]:
    """Steps from which on a step size holds, and the step sizes; at last the end of the run.

    They are what the options of the run say, to the step; of one that set itself, what the steps' own records say.
    """
    config, done = document["config"], document["steps"]
    planned = _planned(config.get("lr"))
    if planned is None:
        path = [point for point in _path(document["records"]) if point[2]]
        starts = [0, *(point[0] for point in path)][: len(path)]
        return _closed(starts, [point[2] for point in path], done)
    total = config.get("steps", done)
    changes = [step for step in planned.changes(steps=total) if step < done]
    glides = isinstance(planned, Schedule) and planned.describe() is not None
    some = np.linspace(0, max(done - 1, 0), min(max(done, 1), SAMPLES)).round() if glides else [0]
    starts = sorted({*map(int, some), *changes})
    return _closed(starts, [planned.lr_at(step, steps=total) for step in starts], done)


def _closed(starts: list[int], values: list[Any], done: int) -> tuple[list[int], list[float]]:
    return ([*starts, done], [*values, values[-1]]) if values else ([], [])


def _planned(lr: Any) -> StepSizes | None:
    """The step sizes that a configuration says; ``None`` for one that sets itself."""
    if lr in AUTOMATIC:
        return None
    if isinstance(lr, Mapping):
        return Schedule(lr["schedule"], lr["peak"], lr.get("warmup", 0.0))
    return training_step_sizes(lr) if isinstance(lr, str) else step_sizes([0], [lr])


def _sizes_panel(records: Sequence[Document], sizes: tuple[Sequence[int], Sequence[float]]) -> Panel:
    marks: list[Mark] = [Line(*sizes, "step size", Look(BLACK, width=1.6), steps=True)]
    seen = [(r["step"], r["auto"]["edge"]) for r in records if r.get("auto") and r["auto"].get("edge")]
    if seen:
        x, y = zip(*seen, strict=True)
        marks.append(Line(x, y, "edge, as the run saw it", Look(BLUE, "dashed", "square")))
    for key, label, look in (
        ("exact", "edge η*, from HVPs, 95 %", Look(GREEN, "dotted", "diamond", width=1.2)),
        ("exact_batches", "the same with mini-batches", Look(PINK, "dashdot", "triangle", width=1.2)),
    ):
        known = [
            (r["step"], r[key], *(r.get(f"{key}_ci95") or (None, None))) for r in records if r.get(key) is not None
        ]
        if known:
            x, y, low, high = zip(*known, strict=True)
            marks.append(Points(x, y, label, look, low, high))
            marks.append(Line(x, y, "", replace(look, marker="")))
    counts = [(r["step"], r["auto"]["rollbacks"]) for r in records if r.get("auto")]
    label = "brought back since the measurement before"
    for (_, before), (step, after) in pairwise([(0, 0), *counts]):
        if after > before:
            marks.append(Rule(step, label, Look(ORANGE, "dashdot", width=1.0)))
            label = ""
    values = (*sizes[1], *map(edge_of, records))
    return Panel(Axis("step size", log=bool(_positive(values))), tuple(marks), 2.2)


def _term(
    records: Sequence[Document], sizes: tuple[Sequence[int], Sequence[float]]
) -> tuple[list[int], list[float | None]]:
    """The term at every step size: it is inversely proportional to it, by a factor that measurements tell."""
    factors = [r["threshold"] * r["lr"] for r in records if r.get("threshold") is not None and r.get("lr")]
    if not factors:
        return [], []
    factor = median(factors)
    return list(sizes[0]), [factor / lr if lr else None for lr in sizes[1]]


def _curvature_panel(
    document: Document, records: Sequence[Document], sizes: tuple[Sequence[int], Sequence[float]]
) -> Panel:
    """The paper's figure: both terms, the exact threshold between them, and what the step size allows."""
    optimizer = document["optimizer"]
    known = [record for record in records if record.get("lower") is not None]
    steps, first_order = _steps(known), not is_zeroth_order(optimizer)
    lower, upper = _values(known, "lower"), _values(known, "upper")
    marks: list[Mark] = []
    tops = upper
    if first_order:
        marks.append(Line(steps, lower, "λ_max", Look(BLUE, marker="circle")))
        marks.append(Line(steps, _values(known, "trace"), "trace", Look(ORANGE, "dashdot", "square")))
    elif known:
        marks.append(Band(steps, lower, upper, colour=BLUE, opacity=0.12))
        marks.append(Line(steps, lower, "lower term: trace", Look(BLUE, marker="circle")))
        marks.append(Line(steps, upper, "upper term", Look(ORANGE, "dashdot", "square")))
        exact = [_exact_term(record, "exact") for record in known]
        marks.append(Line(steps, exact, "exact threshold", Look(GREEN, "dotted", "diamond")))
        batches = [_exact_term(record, "exact_batches") for record in known]
        tops = upper + batches
        if any(value is not None for value in batches):
            marks.append(Line(steps, batches, "the same with mini-batches", Look(PINK, "dashdot", "triangle")))
    else:
        marks.append(Line(_steps(records), _values(records, "trace"), "trace", Look(BLUE, marker="circle")))
        marks.append(Line(_steps(records), _values(records, "lambda_max"), "λ_max", Look(ORANGE, "dashdot", "square")))
    term = _term(records, sizes)
    if term[0]:
        marks.append(Line(*term, term_of(optimizer), Look(BLACK, width=1.3), steps=True))
    preconditioned = OPTIMIZERS[family_of(optimizer)].preconditioned
    label = "curvature of P⁻¹H" if preconditioned else "curvature (loss/param²)"
    return Panel(_curvature_axis(label, lower, lower if first_order else tops, term[1], first_order), tuple(marks))


def _curvature_axis(label: str, lower: Numbers, tops: Numbers, term: Numbers, first_order: bool) -> Axis:
    largest = max(_positive(tops), default=0.0)
    if first_order or not largest:
        return Axis(label, log=first_order and bool(largest))
    nearest = min((value for value in term if value is not None), default=0.0)  # a term that stays above, if not far
    top = max(HEADROOM * largest, 1.1 * nearest if nearest < FAR * largest else 0.0)
    return Axis(label, limits=(min(0.0, *(value for value in lower if value is not None)), top))


def _exact_term(record: Document, key: str) -> float | None:
    """The exact threshold in the unit of the term, which is inversely proportional to the step size."""
    if record.get("threshold") is None or not record.get(key):
        return None
    return float(record["threshold"] * record["lr"] / record[key])


def edge_of(record: Document) -> float | None:
    """What a measurement holds the step size against: the exact threshold, or a lower one of mini-batches."""
    return min(_positive((record.get("exact"), record.get("exact_batches"))), default=None)


def _floor_panel(records: Sequence[Document]) -> Panel:
    norms, floors = _values(records, "grad_norm"), _values(records, "floor")
    marks = (
        Line(_steps(records), norms, "‖g‖", Look(BLUE, marker="circle")),
        Line(_steps(records), floors, "floor, where it stalls", Look(ORANGE, "dashed", "square")),
    )
    return Panel(Axis("‖g‖ (loss/param)", log=_all_positive((norms, floors))), marks, 2.0)


MOST_RUNS = 28
"""Runs over one another; there are no more looks."""


def _comparison(document: Document) -> Picture:
    runs = [run for run in document["runs"] if run.get("records")]
    losses: list[Mark] = []
    ratios: list[Mark] = [Rule(1.0, "the edge", Look(BLACK, width=1.0), level=True)]
    for number, run in enumerate(runs[:MOST_RUNS]):
        look, records = look_of(number), run["records"]
        path = _path(records) or [(record["step"], record["loss"], None) for record in records]
        losses.append(Line([p[0] for p in path], [p[1] for p in path], name_of(run["label"], 40), look))
        ratios.append(Line(*_ratios(run), "", look, steps=True))
    highest = max(_positive(value for mark in ratios if isinstance(mark, Line) for value in mark.y), default=1.0)
    panels = (
        Panel(_loss_axis([run["records"] for run in runs]), tuple(losses)),
        Panel(Axis("step size / exact threshold η*", limits=(0.0, min(2.0, 1.1 * max(highest, 1.0)))), tuple(ratios)),
    )
    left_out = f" ({MOST_RUNS} of {len(runs)} shown)" if len(runs) > MOST_RUNS else ""
    return Picture(f"{len(runs)} runs{left_out}", (Chart(Axis("step", whole=True), panels),))


def _ratios(run: Document) -> tuple[list[int], list[float]]:
    """Step size over the exact threshold, wherever either is known to change; up to the last measurement."""
    known = [(record["step"], edge) for record in run["records"] if (edge := edge_of(record)) is not None]
    starts, sizes = step_sizes_of(run)
    if not known or not starts:
        return [], []
    steps, exact = (list(part) for part in zip(*known, strict=True))
    places = sorted({*steps, *(step for step in starts if step <= steps[-1])})
    held = [sizes[bisect_right(starts, place) - 1] for place in places]
    between = np.interp(places, steps, exact)
    return places, [lr / edge for lr, edge in zip(held, between.tolist(), strict=True)]


# --- check ------------------------------------------------------------------------------------------------------------

MOST_CHECKS = 60
"""Checks in one picture; of more, those with the largest ratios."""

STATUSES = {
    "pass": Look(GREEN, marker="circle"),
    "warn": Look(YELLOW, marker="triangle"),
    "fail": Look(ORANGE, marker="cross"),
    "error": Look(BLACK, marker="star"),
}


def _check(document: Document) -> Picture:
    checks = document["checks"]
    shown = list(range(len(checks)))
    if len(checks) > MOST_CHECKS:
        worst = sorted(shown, key=lambda n: -(checks[n]["ratio"] or 0.0))[:MOST_CHECKS]
        shown = sorted(worst)
    rows = [(height, checks[n]) for height, n in zip(range(len(shown) - 1, -1, -1), shown, strict=True)]
    known = _positive(value for _, check in rows for value in (check["lr"], check["threshold"], *(check["ci95"] or ())))
    limits = (min(known) / 2, max(known) * 2) if known else (1e-3, 1.0)
    held = [(c["threshold"], height, *_ends(c, limits[1])) for height, c in rows if c["threshold"] is not None]
    marks: list[Mark] = []
    if held:
        x, y, low, high = zip(*held, strict=True)
        look, hover = Look(BLUE, marker="diamond", width=2.0), [f"threshold {step_size(value)}" for value in x]
        marks.append(Points(x, y, "threshold, 95 %", look, low, high, across=True, filled=False, hover=hover))
    passing = [(c["largest_lr"], height) for height, c in rows if c["largest_lr"] is not None]
    if passing:
        x, y = zip(*passing, strict=True)
        low = (limits[0],) * len(x)
        look = Look(GREEN, width=5.0, opacity=0.35)
        marks.append(Points(x, y, "passes up to here", look, low, x, across=True))
    for status, look in STATUSES.items():
        found = [(c["lr"], height, c) for height, c in rows if c["status"] == status]
        if found:
            x, y, entries = zip(*found, strict=True)
            marks.append(Points(x, y, f"lr: {status}", look, hover=[c["message"] for c in entries]))
    ticks = (tuple(float(height) for height, _ in rows), tuple(name_of(c["name"], 30) for _, c in rows))
    axis = Axis("", limits=(-0.7, len(rows) - 0.3), ticks=ticks)
    panel = Panel(axis, tuple(marks), height=0.9 + 0.35 * len(rows))
    chart = Chart(Axis("step size", log=True, limits=limits), (panel,))
    left_out = f", {MOST_CHECKS} of {len(checks)} shown" if len(checks) > MOST_CHECKS else ""
    name = name_of(document.get("config") or "checks")
    return Picture(f"{name}: {document['status']}{left_out}", (chart,))


def _ends(check: Document, highest: float) -> tuple[float, float]:
    """Ends of the interval of a threshold; an upper end that is infinite lies at the end of the axis."""
    low, high = check["ci95"] or (check["threshold"],) * 2
    return check["threshold"] if low is None else low, highest if high is None else high


# --- spectrum ---------------------------------------------------------------------------------------------------------

LOWEST = 0.2
"""Where the axis of the density begins, eigenvalues per decade; one eigenvalue alone rises to 2.7."""

MOST_MARKS = 300
"""More outliers than these are a bulk: then only the ends are marked."""

RESOLVED = 0.03
"""A smallest eigenvalue nearer to zero than this is zero in the picture, in units of its scale."""

TICK_DISTANCE = 0.06
"""Least distance of two ticks, in units of the axis."""


def _spectrum(document: Document) -> Picture:
    ((operator, curvature),) = document["curvature"].items()
    density = document["density"]
    scale, positions = density["scale"], density["position"]
    below = curvature["lambda_min"]["value"] < -RESOLVED * scale
    marks: list[Mark] = []
    edges = position_of(np.array([-scale, scale]), scale=scale)
    top = 3 * max(density["upper"])
    linear = f"|λ| < {quantity(scale, digits=1)}: linear axis"
    marks.append(Band(edges.tolist(), (LOWEST,) * 2, (top,) * 2, linear, GREY, 0.15))
    for colour, dash, label, sign in ((ORANGE, "dashed", "negative", -1), (BLUE, "solid", "positive", 1)):
        side = [n for n, place in enumerate(positions) if sign * place >= 0]
        if side and (sign > 0 or below):  # the kernel goes below zero around eigenvalues at zero
            marks += _density_side(density, side, colour, dash, label, exact=curvature["method"] == "dense")
    marks.append(Rule(0.0, "", Look(GREY, "solid", width=0.8)))
    rug, name = document["outliers"], "known one by one"
    if len(rug) > MOST_MARKS:
        rug, name = [e["value"] for e in (*document["top"], *document["bottom"])], "ends of the spectrum"
    if rug:
        marks.append(Rug(position_of(np.array(rug), scale=scale).tolist(), name))
    shown = [place for place, upper in zip(positions, density["upper"], strict=True) if upper > LOWEST] or positions
    left, right = shown[0] if below else max(shown[0], 0.0), shown[-1]
    axis = Axis("eigenvalue λ (loss/param²)", limits=(left, right), ticks=_ticks(left, right, scale=scale))
    panel = Panel(Axis("eigenvalues per decade, smoothed", log=True, limits=(LOWEST, top)), tuple(marks), 4.0)
    title = f"{OPERATOR_NAMES.get(operator, operator)}, {count(document['problem']['num_params'])} eigenvalues"
    return Picture(_title(document, title), (Chart(axis, (panel,)),))


def _density_side(
    density: Document, side: Sequence[int], colour: str, dash: str, label: str, *, exact: bool
) -> Iterator[Mark]:
    """The curve of one sign with its band, above the foot of the axis."""
    x = [density["position"][n] for n in side]
    low, high, line = ([max(density[key][n], LOWEST) for n in side] for key in ("lower", "upper", "value"))
    yield Band(x, (LOWEST,) * len(x), line, "", colour, 0.12)
    yield Band(x, low, high, "" if exact else f"{label}, 95 % band", colour, 0.35)
    if max(line) > LOWEST:
        hover = [f"λ = {quantity(density['eigenvalue'][n], digits=2)}" for n in side]
        yield Line(x, [value if value > LOWEST else None for value in line], label, Look(colour, dash), hover=hover)


def _ticks(left: float, right: float, *, scale: float) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Places and labels of zero and of powers of ten of both signs; where they crowd, the larger ones."""
    places, labels = [0.0], ["0"]
    span = max(-left, right)
    first, last = (math.floor(math.log10(scale)) - 1, math.ceil(math.log10(scale) + span))
    for power, (sign, mark) in product(range(last, first, -1), ((1, ""), (-1, "−"))):
        place = float(position_of(np.array([sign * 10.0**power]), scale=scale)[0])
        apart = min(abs(place - other) for other in places) >= TICK_DISTANCE * (right - left)
        if left <= place <= right and apart:
            places.append(place)
            labels.append(f"{mark}{power_of_ten(10.0**power)}")
    return tuple(places), tuple(labels)


_PICTURES: dict[str, Callable[[Document], Picture]] = {
    "zoscope.bounds/1": _bounds,
    "zoscope.plan/1": _plan,
    "zoscope.probe/1": _probe,
    "zoscope.track/1": _track,
    "zoscope.track-comparison/1": _comparison,
    "zoscope.check/1": _check,
    "zoscope.spectrum/1": _spectrum,
}
