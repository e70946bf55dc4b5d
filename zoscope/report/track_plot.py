"""The picture of a run: its loss, and the threshold term between the two ends of the band; several runs overlaid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.report.figures import COLOURS, gaps, new_figure, require_matplotlib, save
from zoscope.report.style import step_size
from zoscope.report.track import optimizer_name, term_name

if TYPE_CHECKING:
    from zoscope.analysis.tracking.compare import Comparison
    from zoscope.analysis.tracking.record import Record
    from zoscope.analysis.tracking.results import TrackResult

BLUE, ORANGE, GREEN = COLOURS[:3]
BLACK = COLOURS[-1]

STYLES = ("-", "--", "-.", ":")

MOST_JUMPS = 12
"""More changes of the step size than these are a schedule that glides: they are not marked one by one."""

JUMP = 1e-6
"""Relative change that is one, and not rounding."""

HEADROOM = 1.5
"""Top of the curvature's axis over the largest value of the band: a term far above it, at small steps, is cut off."""

FAR = 5.0
"""A term that never comes nearer than this many times the band is left outside."""

BLOWN_UP = 30.0
"""Losses above this many times the first one are those of a run that diverged, and would flatten all others."""


def draw(result: TrackResult, paths: Sequence[Path], *, option: str = "--plot") -> None:
    """Write the picture of a run, once for every path; the format follows the file name.

    Raises:
        UsageError: If matplotlib is not installed, does not know a format, or a file cannot be written.
    """
    require_matplotlib(option)
    figure: Any = new_figure(width=8, height=6)
    losses, curvature = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    _draw_loss(losses, result.records, colour=BLACK, label="loss")
    _cap(losses, [result.records])
    _draw_band(curvature, result)
    for axes in (losses, curvature):
        _mark_jumps(axes, result.records, named=axes is losses)
    losses.set_ylabel("loss")
    curvature.set_xlabel("step")
    curvature.set_ylabel("curvature (loss/param²)" if "adam" not in result.optimizer else "curvature of P⁻¹H")
    figure.suptitle(f"{result.spec or 'problem'}: {optimizer_name(result.optimizer)}", fontsize="medium")
    for path in paths:
        save(figure, path, option=option)


def draw_comparison(comparison: Comparison, paths: Sequence[Path], *, option: str = "--plot") -> None:
    """Write the runs over one another: their losses, and their step sizes in units of the exact threshold.

    Raises:
        UsageError: As `draw`.
    """
    require_matplotlib(option)
    figure: Any = new_figure(width=8, height=6)
    losses, ratios = figure.subplots(2, 1, sharex=True)
    for number, (label, result) in enumerate(comparison.results):
        colour = COLOURS[number % len(COLOURS)]
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        _draw_loss(losses, result.records, colour=colour, label=label, style=style)
        steps = [record.step for record in result.records]
        ratios.plot(steps, gaps(record.ratio for record in result.records), style, color=colour, linewidth=1.4)
    _cap(losses, [result.records for _, result in comparison.results])
    ratios.set_ylim(0, min(2.0, ratios.get_ylim()[1]))
    ratios.axhline(1.0, color="0.4", linewidth=0.9)
    ratios.set_ylabel("step size / exact threshold η*")
    ratios.set_xlabel("step")
    losses.set_ylabel("loss")
    losses.legend(fontsize="small", frameon=False, ncols=2 if len(comparison.results) > 4 else 1)
    for path in paths:
        save(figure, path, option=option)


def _draw_loss(axes: Any, records: Sequence[Record], *, colour: str, label: str, style: str = "-") -> None:
    steps = [record.step for record in records]
    values = [record.loss for record in records]
    axes.plot(steps, gaps(values), style, color=colour, linewidth=1.4, label=label)
    highest = [record.loss_max if record.loss_max is not None else record.loss for record in records]
    axes.plot(steps, gaps(highest), color=colour, linewidth=0.6, alpha=0.4)  # spikes between two measurements
    if all(value is None or value > 0 for value in values):
        axes.set_yscale("log")


def _cap(axes: Any, runs: Sequence[Sequence[Record]]) -> None:
    """Keep what a run that diverges does from flattening everything before."""
    starts = [records[0].loss or 0.0 for records in runs if records]
    if starts and min(starts) > 0:
        axes.set_ylim(top=min(BLOWN_UP * max(starts), axes.get_ylim()[1]))


def _draw_band(axes: Any, result: TrackResult) -> None:
    """The paper's figure: lower term solid, upper one dash-dotted, threshold dashed; the exact threshold between."""
    records = [record for record in result.records if record.lower is not None]
    steps = [record.step for record in records]
    lower = gaps(record.lower for record in records)
    upper = gaps(record.upper for record in records)
    first_order = not result.optimizer.startswith("zo-")
    if first_order:
        axes.plot(steps, lower, color=BLUE, linewidth=1.6, label="λ_max")
        axes.plot(steps, gaps(r.trace for r in records), color=ORANGE, linewidth=1.4, linestyle="-.", label="trace")
    else:
        axes.fill_between(steps, lower, upper, color=BLUE, alpha=0.12, linewidth=0)
        axes.plot(steps, lower, color=BLUE, linewidth=1.6, label="lower term: trace")
        axes.plot(steps, upper, color=ORANGE, linewidth=1.4, linestyle="-.", label="upper term")
        exact = [_exact_term(record) for record in records]
        axes.plot(steps, gaps(exact), color=GREEN, linewidth=1.4, linestyle=":", label="exact threshold")
    changes = _staircase(records)
    axes.plot(*changes, color=BLACK, linewidth=1.4, linestyle="--", label=term_name(result))
    tops = [record.lower if first_order else record.upper for record in records]
    known = [value for value in tops if value is not None and value > 0]
    if known and not first_order:
        nearest = min(changes[1], default=0.0)  # of a term that stays above: shown as well, if not far
        top = max(HEADROOM * max(known), 1.1 * nearest if nearest < FAR * max(known) else 0.0)
        axes.set_ylim(min(0.0, *(value for value in lower if value == value)), top)
    elif known:
        axes.set_yscale("log")
    axes.legend(fontsize="small", frameon=False, ncols=2)


def _exact_term(record: Record) -> float | None:
    """The exact threshold in the unit of the term, which is inversely proportional to the step size."""
    if record.threshold is None or record.ratio is None:
        return None
    return record.threshold * record.ratio


def _staircase(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """The term over steps, with both values where the step size jumps at a measurement."""
    steps: list[float] = []
    terms: list[float] = []
    for record in records:
        if record.threshold is None:
            continue
        steps.append(record.step)
        terms.append(record.threshold)
        if _jumps(record.lr, record.lr_next) and record is not records[-1]:
            steps.append(record.step)
            terms.append(record.threshold * record.lr / record.lr_next)
    return steps, terms


def _jumps(before: float, after: float) -> bool:
    return abs(after / before - 1) > JUMP


def _mark_jumps(axes: Any, records: Sequence[Record], *, named: bool) -> None:
    jumps = [(record.step, record.lr_next) for record in records[:-1] if _jumps(record.lr, record.lr_next)]
    jumps += [(b.step, b.lr) for a, b in pairwise(records) if _jumps(a.lr_next, b.lr)]  # between two measurements
    if len(jumps) > MOST_JUMPS:
        return
    for step, lr in jumps:
        axes.axvline(step, color="0.6", linewidth=0.8, zorder=0)
        if named:
            axes.annotate(
                f"η = {step_size(lr)}",
                (step, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(3, -4),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize="x-small",
                color="0.3",
            )
