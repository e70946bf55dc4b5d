"""A plan in a few lines: the step size, what it costs to take more, and what was tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.style import (
    MISSING,
    Report,
    count,
    counted,
    duration,
    grid,
    heading,
    lines_of,
    number_table,
    optimizer_name,
    quantity,
    rough_count,
    step_range,
    step_size,
    step_size_at_most,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.plan import PlanResult


def render(result: PlanResult, *, warnings: bool = True, verbose: bool = True) -> Report[PlanResult]:
    """The answer; with ``verbose`` also every step size that was tried."""

    def sections(result: PlanResult, width: int) -> Iterator[RenderableType]:
        yield _header(result, width)
        yield Text("")
        yield grid(_answer(result))
        if result.schedules:
            yield heading("Schedules", "lowest expected loss first")
            yield schedules_table(result)
        if verbose:
            yield heading("Step sizes tried", f"up to {count(result.replicas)} runs each, {result.method}")
            yield curve_table(result)

    return Report(result, sections, warnings)


def _header(result: PlanResult, width: int) -> Text:
    question, problem = result.question, result.problem
    batch = "all examples" if question["batch_size"] is None else f"batches of {count(question['batch_size'])}"
    warmup = f", warm-up {question['warmup']:g}" if question["warmup"] else ""
    facts = [
        f"{count(question['steps'])} steps",
        batch,
        f"{question['schedule']} step size{warmup}",
        f"{counted(problem.num_params, 'parameter')}",
        counted(problem.num_examples, "example"),
        f"{result.device} {result.dtype}",
    ]
    text = Text.assemble((f"{result.spec or 'problem'}: {optimizer_name(result.question['optimizer'])}", "bold"))
    for line in lines_of(facts, width=width):
        text.append(f"\n{line}", style="dim")
    return text


def _answer(result: PlanResult) -> Iterator[tuple[str, str | Text]]:
    answer, edge = result.answer, result.edge
    peak = (
        "step size" if result.question["schedule"] == "constant" and not result.question["warmup"] else "peak step size"
    )
    if answer.lr is None:
        yield peak, Text("none lowers the loss", style="bold yellow")
    else:
        lr = Text(step_size_at_most(answer.lr), style="bold green")
        yield (
            peak,
            lr + Text(f"   loss {quantity(answer.loss_start)} → {quantity(answer.expected_loss, digits=3)} expected"),
        )
        yield (
            "risk",
            f"{percent(answer.risk)} of runs leave at it; {percent(result.safe.risk)} at {step_size(result.safe.lr)}",
        )
    if edge.lr is not None:
        interval = "" if edge.ci95 is None else f"   95 %: {step_range(*edge.ci95)}"
        yield "half leave at", f"{step_size(edge.lr)}{interval}"
    yield "looked ahead by", _method(result)
    yield "cost", _cost(result)


def _method(result: PlanResult) -> str:
    tried = counted(len(result.curve), "step size")
    if result.method == "rehearsal":
        return f"rehearsals, {tried}, {count(result.cost.gradients)} gradients, {duration(result.seconds)}"
    return f"real runs, {tried}, {count(result.replicas)} runs each, {duration(result.seconds)}"


def _cost(result: PlanResult) -> str:
    cost = result.cost
    sweep = f"a sweep of 15 step sizes, {count(result.replicas)} runs each"
    times = cost.sweep / cost.forward_passes if cost.forward_passes else 1.0
    compared = "takes as many" if 0.8 < times < 1.25 else f"takes {quantity(times, digits=2)} times as many"
    passes, runs = rough_count(cost.forward_passes), quantity(cost.forward_passes / cost.run, digits=3)
    return f"{passes} forward passes, as {runs} runs; {sweep}, {compared}"


def percent(share: float | None) -> str:
    """A share of runs: ``< 0.1 %``, ``0.5 %``, ``12 %``."""
    if share is None:
        return MISSING
    if share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def schedules_table(result: PlanResult) -> Table:
    """One row per schedule."""
    table = number_table("schedule", "peak step size", "expected loss", "risk", "half leave at")
    for row in result.schedules:
        table.add_row(
            row.schedule,
            step_size(row.lr),
            quantity(row.expected_loss, digits=3),
            percent(row.risk),
            step_size(row.edge),
        )
    return table


def curve_table(result: PlanResult) -> Table:
    """One row per step size."""
    table = number_table("step size", "final loss", "range", "left", "risk")
    for point in result.curve:
        best = point.lr == result.answer.lr
        spread = MISSING if point.loss_lo is None else f"{quantity(point.loss_lo)} – {quantity(point.loss_hi)}"
        table.add_row(
            Text(step_size(point.lr), style="bold green" if best else ""),
            quantity(point.loss_mean),
            spread,
            f"{point.left} of {point.runs}",
            percent(point.risk),
        )
    return table
