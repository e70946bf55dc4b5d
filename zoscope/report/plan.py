"""A plan in a few lines: the step size, what it costs to take more, and what was tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.registry import optimizer_name
from zoscope.report.answer import as_report, one_line, ruler
from zoscope.report.style import grid, heading, lines_of, number_table
from zoscope.report.words import MISSING, count, duration, percent, quantity, step_range, step_size, step_size_at_most

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.plan import PlanResult
    from zoscope.planning.mu import PerturbationScale


def answer(result: PlanResult, width: int) -> Iterator[RenderableType]:
    """The step size, what it costs to take more, and where runs diverge."""
    yield one_line([_name(result), *_question(result), duration(result.seconds)], width=width)
    yield grid(_answer(result))
    marks = {"best": result.answer.lr, "edge": result.edge.lr}
    drawn = ruler(marks, width=width)
    if drawn is not None:
        yield drawn
    if result.schedules:
        yield schedules_table(result)


def details(result: PlanResult, width: int) -> Iterator[RenderableType]:
    """Every step size that was tried, and what it took."""
    yield heading("Run")
    yield Text("\n".join(lines_of([*_question(result), *_problem(result)], width=width)), style="dim")
    yield grid([("looked ahead by", _method(result))])
    yield heading("Step sizes tried", f"up to {count(result.replicas)} runs each, {result.method}")
    yield curve_table(result)


render = as_report(answer, details)


def _name(result: PlanResult) -> str:
    return f"{result.spec or 'problem'}: {optimizer_name(result.question['optimizer'])}"


def _question(result: PlanResult) -> list[str]:
    question = result.question
    batch = "all examples" if question["batch_size"] is None else f"batches of {count(question['batch_size'])}"
    warmup = f", warm-up {question['warmup']:g}" if question["warmup"] else ""
    schedule = "constant step size" if question["schedule"] == "constant" else question["schedule"]
    return [f"{count(question['steps'])} steps", batch, f"{schedule}{warmup}"]


def _problem(result: PlanResult) -> list[str]:
    problem = result.problem
    return [
        count(problem.num_params, "parameter"),
        count(problem.num_examples, "example"),
        f"{result.device} {result.dtype}",
    ]


def _answer(result: PlanResult) -> Iterator[tuple[str, str | Text]]:
    answer, edge = result.answer, result.edge
    constant = result.question["schedule"] == "constant" and not result.question["warmup"]
    label = "use lr" if constant else "use peak lr"
    if answer.lr is None:
        known = any(notice.code == "noise-floor" for notice in result.warnings)
        yield label, Text("none lowers the loss" if known else "not known yet", style="bold yellow")
    else:
        lr = Text(step_size_at_most(answer.lr), style="bold green")
        losses = f"loss {quantity(answer.loss_start)} → {quantity(answer.expected_loss, digits=3)} expected"
        yield label, lr + Text(f"   {losses}, {percent(answer.risk)} of runs diverge")
        if result.safe.lr is not None and result.safe.lr < answer.lr:
            yield "safer", f"{step_size_at_most(result.safe.lr)}   {percent(result.safe.risk)} of runs diverge"
    if edge.lr is not None:
        interval = "" if edge.ci95 is None else f" (95 %: {step_range(*edge.ci95)})"
        yield "edge", f"{step_size(edge.lr)}   half of the runs diverge{interval}"
    if result.perturbation is not None:
        yield _mu(result.perturbation, asked=result.question["mu"])
    yield "cost", _runs(result)
    if result.interrupted:
        yield "stopped", Text("interrupted: this is what was known by then", style="yellow")


def _runs(result: PlanResult) -> str:
    """What it took, in runs of the training, beside a sweep."""
    cost, each = result.cost, count(result.replicas, "run")
    took, sweep = quantity(cost.forward_passes / cost.run, digits=2), quantity(cost.sweep / cost.run, digits=3)
    return f"that of {took} runs; a sweep of 15 step sizes, {each} each: {sweep}"


def _mu(scale: PerturbationScale, *, asked: float | None = None) -> tuple[str, str | Text]:
    """The μ to use, which is the one asked for wherever slopes are right at it."""
    right = f"slopes right within {percent(scale.tolerance)} with"
    best = asked if asked is not None and scale.allows(asked) else scale.best
    if best is None:
        return "use μ", Text(f"{right} {scale.range} tried", style="bold yellow")
    return "use μ", Text(f"{best:.2g}", style="bold green") + Text(f"   {right} {scale.range}")


def scale_answer(result: PerturbationScale, width: int) -> Iterator[RenderableType]:
    """The range of μ."""
    batch = "all examples" if result.batch_size is None else f"batches of {count(result.batch_size)}"
    evaluated = f"{count(result.num_evaluations)} losses"
    yield one_line(["μ, MeZO's ε", batch, result.dtype, evaluated, duration(result.seconds)], width=width)
    yield grid([_mu(result)])


def scale_details(result: PerturbationScale, width: int) -> Iterator[RenderableType]:
    """Every μ that was tried."""
    table = number_table("μ", "slopes off by", "loss higher by")
    for mu, error, rise in zip(result.tried, result.slope_errors, result.loss_rises, strict=True):
        table.add_row(Text(f"{mu:.2g}", style="bold green" if mu == result.best else ""), _off(error), _off(rise))
    yield table


def _off(share: float) -> str:
    return MISSING if not math.isfinite(share) else f"{100 * share:.2g} %"


render_scale = as_report(scale_answer, scale_details)


def _method(result: PlanResult) -> str:
    tried = count(len(result.curve), "step size")
    passes = f"{count(result.cost.forward_passes, rough=True)} forward passes"
    if result.method == "rehearsal":
        return f"rehearsals, {tried}, {count(result.cost.gradients)} gradients, in all as {passes}"
    return f"real runs, {tried}, up to {count(result.replicas)} runs each, {passes}"


def schedules_table(result: PlanResult) -> Table:
    """One row per schedule."""
    table = number_table("schedule", "peak lr", "expected loss", "diverge", "half diverge at")
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
    table = number_table("step size", "final loss", "range", "diverged", "risk")
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
