"""The report of ``zoscope.probe``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.registry import family_of, optimizer_name, term_of
from zoscope.report.answer import as_report, one_line
from zoscope.report.style import grid, header, heading, number_table
from zoscope.report.words import MISSING, count, duration, quantity, step_range, step_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.probe_results import Edge, EndState, ProbeResult, ProbeRun

OUTCOME_STYLES = {"confirmed": "bold green", "refuted": "bold red", "inconclusive": "bold yellow"}
VERDICT_STYLES = {True: "green", False: "red", None: "yellow"}
BOTH_ENDS = "all eigenvalues – positive ones"
THRESHOLD_NAMES = {
    "exact": "infinite-time threshold of the mean square",
    "horizon": "η*(steps), the threshold for a run of this length",
    "descent": "descent threshold",
    "first-order": "first-order threshold",
    "assumed": "assumed threshold",
}


MOST_RUNS = 6
"""Runs, or step sizes of an edge, that the answer lists."""


def answer(result: ProbeResult, width: int) -> Iterator[RenderableType]:
    """The verdict, the threshold, and a row per run."""
    problem = result.problem
    facts = [_name(result), count(problem.num_params, "parameter"), count(problem.num_examples, "example")]
    yield one_line([*facts, f"loss {quantity(problem.loss)}", duration(result.seconds)], width=width)
    yield verdict_line(result)
    threshold = result.threshold
    yield Text(f"Threshold {step_size(threshold.value)}: {THRESHOLD_NAMES[threshold.name]}.")
    if result.runs:
        yield runs_table(result, short=True)
    lost = [run for run in result.runs if run.verdict == "stable" and run.diverged]
    if lost:
        some = f"{sum(run.diverged for run in lost)} of {count(sum(run.replicas for run in lost), 'run')}"
        yield Text(f"{some} that are called stable diverged all the same: zoscope plan says which step size is safe.")
    if result.edge is not None:
        yield Text(_edge_line(result, result.edge))


def details(result: ProbeResult, width: int) -> Iterator[RenderableType]:
    """Everything, top to bottom."""
    yield Text("")
    yield header(result, _name(result), width=width)
    yield heading("Predicted")
    yield predictions(result)
    if result.runs:
        yield heading("Runs", "on the quadratic model" if result.linearized else "")
        yield runs_table(result)
        yield heading("What they say")
        yield grid((_label(run), remark(run)) for run in result.runs)
        ends = list(end_rows(result))
        if ends:
            yield heading("Curvature measured again at the end")
            yield grid(ends)
    if result.edge is not None:
        yield heading("Edge", f"where half of the replicas diverge within {count(result.edge.steps)} steps")
        yield edge_summary(result.edge)
        yield edge_table(result.edge)
        if result.edge.end is not None:
            lowest = min(point.lr for point in result.edge.points if point.lost)
            yield heading("Curvature measured again", "where the first run was just before it diverged")
            yield grid([(f"η {step_size(lowest)}", _end(result, result.edge.end, lowest))])


render = as_report(answer, details)


def _name(result: ProbeResult) -> str:
    return f"{result.spec or 'problem'}: {optimizer_name(result.optimizer)}"


def _edge_line(result: ProbeResult, edge: Edge) -> str:
    if not edge.found:
        return f"Edge not found with {len(edge.points)} step sizes."
    ratio = edge.value / result.threshold.value
    within = f"half of the runs diverge within {count(edge.steps)} steps"
    return f"Edge {step_size(edge.value)}, {ratio:.2f} × the threshold: {within}."


def predictions(result: ProbeResult) -> Table:
    """The thresholds, the one under test first."""
    threshold = result.threshold
    rows: list[tuple[str, str | Text]] = [
        ("under test", f"{step_size(threshold.value, digits=4)}, the {THRESHOLD_NAMES[threshold.name]}")
    ]
    if result.estimator is not None:
        if threshold.horizon is not None:
            rows.append((_horizon_label(result), f"{step_range(*threshold.horizon, digits=4)}  ({BOTH_ENDS})"))
            if threshold.horizon_ci95 is not None and threshold.horizon_ci95 != threshold.horizon:
                rows.append(("  95 %", step_range(*threshold.horizon_ci95)))
        if threshold.exact_ci95 is not None:
            low, high = threshold.exact_ci95
            known = "" if low == high else f"  (95 %: {step_range(low, high, digits=4)})"
            rows.append(("infinite time", f"{step_size(threshold.exact, digits=4)}{known}"))
        rows.append(("descent", step_size(threshold.descent, digits=4)))
    return grid(rows)


def _horizon_label(result: ProbeResult) -> str:
    steps = result.runs[0].steps if result.runs else result.edge.steps if result.edge is not None else None
    return "η*" if steps is None else f"η*({count(steps)})"


def runs_table(result: ProbeResult, *, short: bool = False) -> Table:
    """One row per step size and variant; for the answer without the columns on the prediction, and not too many."""
    runs = result.runs[:MOST_RUNS] if short else result.runs
    columns: dict[str, list[str | Text]] = {
        "step size": [_label(run) for run in runs],
        "η": [step_size(run.lr) for run in runs],
        "ρ per step": [MISSING if r.rate_predicted is None else f"{r.rate_predicted:.4f}" for r in runs],
        "steps": [_steps(run) for run in runs],
        "diverged": [f"{run.diverged} of {run.replicas}" for run in runs],
        "loss at end": [quantity(run.loss_end, digits=3) for run in runs],
        "curve off by": [_curve_error(run) for run in runs],
        "verdict": [Text(_verdict(run), style=VERDICT_STYLES[run.as_predicted]) for run in runs],
    }
    unknown = [name for name in ("ρ per step", "curve off by") if short or set(columns[name]) == {MISSING}]
    shown = {name: cells for name, cells in columns.items() if name not in unknown}
    table = number_table(*shown)
    table.columns[-1].no_wrap = True
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    if len(runs) < len(result.runs):
        table.add_row(f"+{len(result.runs) - len(runs)} more")
    return table


def _verdict(run: ProbeRun) -> str:
    return "mostly stable" if run.verdict == "stable" and run.diverged else run.verdict


def _steps(run: ProbeRun) -> str:
    return count(run.steps) if run.steps_done == run.steps else f"{count(run.steps_done)} of {count(run.steps)}"


def remark(run: ProbeRun) -> str:
    """What happened, beside what the model said about growth."""
    text = run.reason
    if run.left_at is not None:
        text += f", at about step {count(run.left_at, rough=True)}"
    growth = run.growth_predicted
    if run.side == "above" and run.variant != "adaptive" and growth is not None and growth > 1:
        text += f"; predicted growth of the mean square {quantity(growth, digits=2)}"
    return text


def end_rows(result: ProbeResult) -> Iterator[tuple[str, str | Text]]:
    """The threshold at the end of each run, and for Adam what P did."""
    for run in result.runs:
        if run.end is not None:
            yield _label(run), _end(result, run.end, run.lr)


def _end(result: ProbeResult, end: EndState, lr: float) -> str:
    text = (
        f"step {count(end.step)}: threshold {step_size(end.threshold)} "
        f"({lr / end.threshold if end.threshold else float('inf'):.2f} × it); "
        f"{term_of(f'zo-{family_of(result.optimizer)}')} {quantity(end.term)} against trace {quantity(end.trace)}, "
        f"λ_max {quantity(end.lambda_max)}"
    )
    if end.preconditioner_mean is not None:
        text += f"; mean P {quantity(end.preconditioner_mean, digits=3)}"
    return text


def edge_summary(edge: Edge) -> Table:
    """The edge against the thresholds."""
    rows: list[tuple[str, str | Text]] = [
        ("empirical", f"{step_size(edge.value, digits=4)}, between {step_size(edge.lo)} and {step_size(edge.hi)}"),
    ]
    if not edge.found:
        rows = [("empirical", "not found: the step sizes tried all went the same way, or there was no time")]
    elif edge.ratio_to_exact is not None:
        rows.append(("to the threshold", f"{edge.ratio_to_exact:.3f} ×, infinite time"))
    if edge.found and edge.ratio_to_horizon is not None:
        full, positive = edge.ratio_to_horizon
        rows.append(
            (f"to η*({count(edge.steps)})", f"{full:.3f} × (all eigenvalues), {positive:.3f} × (positive ones)")
        )
    if edge.ratio_to_predicted is not None:
        typical = f"{step_size(edge.predicted, digits=4)}, where half of the quadratic model's own runs diverge"
        rows.append(("to single runs", f"{edge.ratio_to_predicted:.3f} × {typical}"))
    return grid(rows)


def edge_table(edge: Edge) -> Table:
    """Every step size tried, with the time to blow-up."""
    table = number_table("η", "diverged", "at step", "predicted (all – positive)")
    for point in edge.points:
        full, positive = point.blow_up
        predicted = f"{count(full, rough=True)} – {count(positive, rough=True)}"
        left = MISSING if point.left_at is None else count(point.left_at, rough=True)
        table.add_row(step_size(point.lr, digits=4), f"{point.diverged} of {point.replicas}", left, predicted)
    return table


def verdict_line(result: ProbeResult) -> Text:
    """The outcome in a sentence."""
    text = Text()
    text.append(result.outcome.capitalize(), style=OUTCOME_STYLES[result.outcome])
    text.append(f": {result.reason}.")
    if result.interrupted:
        text.append(" Interrupted; this is what was known by then.", style="yellow")
    return text


def _label(run: ProbeRun) -> str:
    label = f"{run.ratio:.3g} ×"
    return f"{label} {run.variant}" if run.variant in ("frozen", "adaptive") else label


def _curve_error(run: ProbeRun) -> str:
    if run.prediction is None or run.prediction.relative is None:
        return MISSING
    if run.verdict in ("diverged", "rises") and run.side == "above":
        same = run.prediction.predicted_change * run.prediction.measured_change > 0
        return "same sign" if same else "wrong sign"
    return f"{100 * run.prediction.relative:.0f} % at {count(run.prediction.step)}"
