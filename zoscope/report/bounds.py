"""The report of ``zoscope.bounds``: header, curvature, bounds, horizon, advice, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.analysis.notices import PROVISIONAL
from zoscope.analysis.recommend import SHORT
from zoscope.report.bounds_tables import (
    bounds_table,
    curvature_table,
    horizon_table,
    infinite_time_table,
    planned_table,
    settings_line,
)
from zoscope.report.style import (
    OPTIMIZER_NAMES,
    count,
    digits_for,
    quantity,
    rough_count,
    step_range,
    step_size,
    step_size_at_most,
)
from zoscope.report.tables import grid, header, heading

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from zoscope.analysis.results import BoundsResult, OptimizerBounds, Verdict

ROOMY = 1000
"""Columns in which every table has its natural width."""

LITTLE_CURVATURE = "little-curvature"

PAPER = "the paper's interval assumes H ⪰ 0"


@dataclass(frozen=True)
class BoundsReport:
    """Lays a result out for the width that it is printed at.

    Args:
        result: What to show.
        warnings: Whether to end with the warnings.
    """

    result: BoundsResult
    warnings: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Everything, top to bottom."""
        result = self.result
        yield _header(result, width=options.max_width)
        yield heading("Curvature", "± is the half-width of the 95 % interval")
        if result.forward is not None:
            # Late, as are mini-batches: what only some results have takes time to load.
            from zoscope.report.forward import (
                forward_batches_section,
                forward_bounds_table,
                forward_curvature_table,
            )

            yield forward_curvature_table(result.forward)
            yield heading("Step-size bounds", settings_line(result))
            yield forward_bounds_table(result)
            yield from forward_batches_section(result)
        else:
            yield curvature_table(result)
            yield from _bounds(result, console, options)
            yield heading("Stable for how many steps", "η*(T): all eigenvalues – positive ones only")
            yield horizon_table(result)
            if any(row.minibatch for row in result.optimizers.values()):
                from zoscope.report.minibatch import minibatch_section

                yield from minibatch_section(result)
        yield heading(f"For {count(result.steps)} steps")
        yield advice(result)
        if any(row.verdict for row in result.optimizers.values()):
            yield from verdicts(result)
        told = [notice.message for notice in result.warnings if notice.code != PROVISIONAL]  # that is above
        if self.warnings and told:
            yield heading("Warnings")
            yield grid(("•", message) for message in told)


def _bounds(result: BoundsResult, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
    """One table where it fits, else two: a number that is cut is worse than one further down."""
    wide = bounds_table(result)
    settings = settings_line(result)
    if console.measure(wide, options=options.update(max_width=ROOMY)).maximum <= options.max_width:
        yield heading("Step-size bounds", "; ".join(filter(None, (settings, PAPER))))
        yield wide
    else:
        yield heading("Step-size bounds", settings)
        yield planned_table(result)
        yield heading("Step-size bounds for infinite time", PAPER)
        yield infinite_time_table(result)


def render(result: BoundsResult, *, warnings: bool = True) -> BoundsReport:
    """The report of a result, for ``rich``; ``warnings=False`` leaves them to another stream."""
    return BoundsReport(result, warnings=warnings)


def _header(result: BoundsResult, *, width: int) -> RenderableType:
    estimator = result.estimator
    queries = "" if estimator.queries == 1 else f", {estimator.queries} queries per step"
    cost = "HVPs" if result.forward is None else "directions, two forward passes each"
    more = [f"{estimator.directions} directions{queries}"]
    return header(result, result.spec or "zoscope bounds", width=width, cost=cost, more=more)


def advice(result: BoundsResult) -> RenderableType:
    """Which threshold binds each optimizer, and the step size to use."""
    rows = [(OPTIMIZER_NAMES[row.name], _advice(row, result.steps)) for row in result.optimizers.values()]
    reasons = dict.fromkeys(row.recommended_reason for row in result.optimizers.values() if row.recommended is not None)
    table = grid(rows)
    for reason in reasons:
        table.add_row("", Text(f"Recommended: {reason}.", style="dim"))
    for notice in result.warnings:
        if notice.code == PROVISIONAL:
            table.add_row("", Text(notice.message, style="yellow"))
    return table


def _advice(row: OptimizerBounds, steps: int) -> Text:
    if row.binding is None or row.recommended is None:
        return Text(f"{row.recommended_reason[0].upper()}{row.recommended_reason[1:]}.")
    name, value, digits = _threshold_name(row, steps), row.binding.value, 3
    if row.limit is not None:
        value, digits = row.limit.value, min(digits_for(row.limit.value, row.limit.error), 3)
    name = name if name.startswith("η") else f"{name[0].upper()}{name[1:]}"
    text = Text(f"{name} binds at {step_size(value, digits=digits)}")
    if row.ends is not None:  # no single number: both ends
        text.append(f", and what limits lr is only known to lie in {step_range(*row.ends, digits=min(digits, 2))}")
    text.append(": ")
    shown = 1 if digits == 1 or LITTLE_CURVATURE in row.doubts else 2
    if row.recommended_range is not None:
        low, high = row.recommended_range
        span = f"{step_size_at_most(low, digits=shown)} to {step_size_at_most(high, digits=shown)}"
        text.append("use lr from ").append(span, style="bold yellow")
        text.append(". Start low, and probe higher ones")
    elif row.doubts:
        at_most = step_size_at_most(row.recommended, digits=shown)
        text.append("use lr ≤ ").append(at_most, style="bold yellow").append(" for now")
    else:
        text.append("use lr ≤ ").append(step_size_at_most(row.recommended), style="bold green")
    if LITTLE_CURVATURE in row.doubts:
        text.append(", and measure again after warm-up")
    if row.predicted_lr is not None:
        text.append(f"; the predicted loss is lowest at {step_size(row.predicted_lr, digits=2)}")
    return text.append(".")


def _threshold_name(row: OptimizerBounds, steps: int) -> str:
    name = row.limit.name if row.limit is not None else "" if row.binding is None else row.binding.name
    return {
        "horizon": f"η*({count(steps)})",
        "short-horizon": f"η*({count(min(steps, SHORT))}) of all eigenvalues",
        "descent": "the descent threshold",
        "exact": "the infinite-time threshold",
        "forward": "the upper bound for infinite time",
    }.get(name, "no threshold")


def verdicts(result: BoundsResult) -> Iterator[RenderableType]:
    """What the step size asked about does."""
    judged = [(row, row.verdict) for row in result.optimizers.values() if row.verdict is not None]
    yield heading(f"lr = {judged[0][1].lr:g}")
    yield grid((OPTIMIZER_NAMES[row.name], _verdict(verdict, row)) for row, verdict in judged)


def _verdict(verdict: Verdict, row: OptimizerBounds) -> Text:
    colour = {"stable": "green", "uncertain": "yellow", "unstable": "red"}[verdict.outlook]
    if verdict.outlook == "stable" and (row.doubts or _passes_horizon(verdict)):
        colour = "yellow"
    which = "provisional" if row.doubts else "binding"
    times = "" if verdict.ratio is None else f"{quantity(verdict.ratio, digits=3)} × the {which} threshold: "
    text = Text.assemble(times, (_outlook(verdict), colour))
    if verdict.descends is False:
        text.append("; the expected loss rises at first, since this is above the descent threshold")
    return text.append(".")


def _passes_horizon(verdict: Verdict) -> bool:
    """Whether a run blows up by η*(N) of the positive part, whichever threshold was asked for."""
    return verdict.blow_up is not None and verdict.blow_up[1] <= verdict.steps


def _outlook(verdict: Verdict) -> str:
    planned = count(verdict.steps)
    if verdict.blow_up is None:
        from zoscope.report.forward import forward_outlook

        return forward_outlook(verdict)
    first, last = verdict.blow_up
    if not _passes_horizon(verdict):
        if verdict.outlook == "unstable":
            return f"above it, though it does not blow up within {planned} steps"
        if verdict.outlook == "stable":
            return f"does not blow up within {planned} steps"
        if first <= verdict.steps <= SHORT:
            return f"may blow up after about {rough_count(first)} steps, or not within {planned}"
        where = "close to it" if verdict.ratio is None or verdict.ratio <= 1 else "above it"
        return f"{where}, may blow up within {planned} steps, as curvature usually rises"
    first, last = verdict.blow_up if verdict.doubling is None else verdict.doubling
    if math.isinf(first):
        return f"above η*({planned}), but the loss is not predicted to double within {planned} steps"
    if verdict.outlook == "uncertain" or math.isinf(last):
        return f"may blow up after about {rough_count(first)} steps, or not within {planned}"
    span = dict.fromkeys((rough_count(first), rough_count(last)))
    below = "below it, but " if verdict.outlook == "stable" else ""
    return f"{below}blows up after about {'–'.join(span)} {'step' if last == 1 else 'steps'}"
