"""The report of ``zoscope.bounds``: header, curvature, bounds, horizon, advice, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.bounds_tables import (
    bounds_table,
    curvature_table,
    horizon_table,
    infinite_time_table,
    planned_table,
    settings_line,
)
from zoscope.report.style import OPTIMIZER_NAMES, count, quantity, rough_count, step_size
from zoscope.report.tables import grid, header, heading

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from zoscope.analysis.results import BoundsResult, OptimizerBounds, Verdict

ROOMY = 1000
"""Columns in which every table has its natural width."""

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
        if self.warnings and result.warnings:
            yield heading("Warnings")
            yield grid(("•", notice.message) for notice in result.warnings)


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
    return table


def _advice(row: OptimizerBounds, steps: int) -> Text:
    if row.binding is None or row.recommended is None:
        return Text(f"{row.recommended_reason[0].upper()}{row.recommended_reason[1:]}.")
    name = _threshold_name(row, steps)
    name = name if row.binding.name == "horizon" else name.capitalize()
    known = math.isfinite(row.binding.value)
    binds = f"{name} binds at {step_size(row.binding.value)}" if known else "Negative curvature"
    text = Text.assemble(f"{binds}: use lr ≤ ", (step_size(row.recommended), "bold green"))
    lower = None if row.horizon is None else row.horizon.lower
    if row.minibatch is not None:
        lower = row.minibatch.horizon.lower.value
    if lower is not None and lower < row.recommended and known:
        text.append(f"; only below {step_size(lower)} also if all negative curvature feeds the noise")
    if row.predicted_lr is not None:
        text.append(f"; the predicted loss is lowest at {step_size(row.predicted_lr, digits=2)}")
    return text.append(".")


def _threshold_name(row: OptimizerBounds, steps: int) -> str:
    name = "" if row.binding is None else row.binding.name
    return {
        "horizon": f"η*({count(steps)})",
        "descent": "the descent threshold",
        "exact": "the infinite-time threshold",
        "forward": "the upper bound for infinite time",
    }.get(name, "no threshold")


def verdicts(result: BoundsResult) -> Iterator[RenderableType]:
    """What the step size asked about does."""
    judged = [(row, row.verdict) for row in result.optimizers.values() if row.verdict is not None]
    yield heading(f"lr = {judged[0][1].lr:g}")
    yield grid((OPTIMIZER_NAMES[row.name], _verdict(verdict)) for row, verdict in judged)


def _verdict(verdict: Verdict) -> Text:
    colour = {"stable": "green", "uncertain": "yellow", "unstable": "red"}[verdict.outlook]
    if verdict.descends is False and verdict.outlook == "stable":
        colour = "yellow"
    times = "" if verdict.ratio is None else f"{quantity(verdict.ratio, digits=3)} × the binding threshold: "
    text = Text.assemble(times, (_outlook(verdict), colour))
    if verdict.descends is False:
        text.append("; the expected loss rises at first, since this is above the descent threshold")
    return text.append(".")


def _outlook(verdict: Verdict) -> str:
    planned = count(verdict.steps)
    if verdict.blow_up is None:
        from zoscope.report.forward import forward_outlook

        return forward_outlook(verdict)
    if verdict.outlook == "stable":
        return f"does not blow up within {planned} steps"
    first, last = verdict.blow_up if verdict.doubling is None else verdict.doubling
    if math.isinf(first):
        whose = "" if verdict.outlook == "unstable" else " of all eigenvalues"
        return f"above η*({planned}){whose}, but the loss is not predicted to double within {planned} steps"
    if verdict.outlook == "uncertain" or math.isinf(last):
        return f"may blow up after about {rough_count(first)} steps, or not within {planned}"
    span = dict.fromkeys((rough_count(first), rough_count(last)))
    return f"blows up after about {'–'.join(span)} {'step' if last == 1 else 'steps'}"
