"""The report of ``zoscope.bounds``: curvature, thresholds, horizons, mini-batches, and which step size to use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zoscope.analysis.advice import JUMPS, SHORT
from zoscope.analysis.explanations import PROVISIONAL
from zoscope.registry import optimizer_name
from zoscope.report.answer import as_report, one_line, ruler
from zoscope.report.console import CleanConsole
from zoscope.report.style import grid, header, heading, number_table
from zoscope.report.words import (
    MISSING,
    OPERATOR_NAMES,
    count,
    curvature_of,
    digits_for,
    duration,
    error,
    percent,
    quantity,
    quantity_with_error,
    step_range,
    step_size,
    step_size_at_most,
    step_size_of,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.estimate import CostEstimate
    from zoscope.analysis.minibatch import ForwardMiniBatch, MiniBatchBounds
    from zoscope.analysis.thresholds import BoundsResult, Floor, OptimizerBounds, Verdict
    from zoscope.curvature.slq import Curvature, Eigenvalue, ForwardCurvature
    from zoscope.planning.mu import PerturbationScale
    from zoscope.theory.spectrum import Estimate
    from zoscope.theory.stability import HorizonPoint

FIRST_ORDER = ("", "FO")
ASSUMING = ("paper's ZO\ninterval", "tight ZO\ninterval")
FOR_EVER = ("infinite\ntime, exact",)
DESCENT, COMPARED = "descent", "FO ÷\nbinding"


def curvature_table(result: BoundsResult) -> Table:
    """One column per operator."""
    entries = list(result.curvature.items())
    table = number_table("", *(OPERATOR_NAMES.get(name, name) for name, _ in entries))
    for label, cells in _curvature_rows([curvature for _, curvature in entries]):
        table.add_row(label, *cells)
    if result.num_check_hvps > 0:
        table.add_row("checks", f"{count(result.num_check_hvps)} HVPs", *[""] * (len(entries) - 1))
    return table


def _curvature_rows(entries: list[Curvature]) -> Iterator[tuple[str, list[str]]]:
    yield "trace", [curvature_of(entry.trace) for entry in entries]
    yield "  positive part", [curvature_of(entry.trace_positive) for entry in entries]
    yield "  negative mass", [quantity(entry.negative_mass, digits=3) for entry in entries]
    yield "λ_max", [_eigenvalue(entry.lambda_max) for entry in entries]
    yield "λ_min", [_eigenvalue(entry.lambda_min) for entry in entries]
    yield "‖·‖_F²", [curvature_of(entry.frobenius_sq) for entry in entries]
    yield "effective rank", [quantity(entry.effective_rank, digits=3) for entry in entries]
    yield "method", [entry.method for entry in entries]
    if any(entry.hvp for entry in entries):
        yield "products", [entry.hvp or "" for entry in entries]
    yield "cost", [f"{count(entry.num_hvps)} HVPs, {duration(entry.seconds)}" for entry in entries]


def _eigenvalue(eigenvalue: Eigenvalue) -> str:
    text = quantity_with_error(eigenvalue.value, eigenvalue.residual)
    return text if eigenvalue.converged else f"{text} (not converged)"


def bounds_table(result: BoundsResult) -> Table:
    """A row per optimizer and every bound in it; wide."""
    table = number_table(*FIRST_ORDER, *ASSUMING, _stable_for(result), *FOR_EVER, *_compared_with(result))
    for row in result.optimizers.values():
        table.add_row(
            *_first_order(result, row), *_intervals(row), _stable(row), step_size_of(row.exact), *_compared(row)
        )
    return table


SYMBOLS = {"beta": "β", "dampening": "τ", "weight_decay": "w", "betas": "β", "preconditioner": "P"}
"""Settings that the report shows where they are not 0."""


def planned_table(result: BoundsResult) -> Table:
    """The half of the bounds that is about the planned steps."""
    table = number_table(*FIRST_ORDER, _stable_for(result), *_compared_with(result))
    for row in result.optimizers.values():
        table.add_row(*_first_order(result, row), _stable(row), *_compared(row))
    return table


def infinite_time_table(result: BoundsResult) -> Table:
    """The half of the bounds that is about infinite time."""
    table = number_table("", *ASSUMING, *FOR_EVER)
    for row in result.optimizers.values():
        table.add_row(_name(row), *_intervals(row), step_size_of(row.exact))
    return table


def settings_line(result: BoundsResult) -> str:
    """What identifies the optimizers."""
    parts = []
    for row in result.optimizers.values():
        shown = [
            f"{SYMBOLS[key]} = {_setting(value)}" for key, value in row.settings.items() if value and key in SYMBOLS
        ]
        parts += [f"{_name(row)} {', '.join(shown)}"] if shown else []
    return "; ".join(parts)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_setting, value))})"
    return value if isinstance(value, str) else f"{value:g}"


def _name(row: OptimizerBounds) -> str:
    return optimizer_name(row.name)


def _fo(result: BoundsResult, row: OptimizerBounds) -> str:
    if row.fo is None:
        return MISSING
    largest = result.curvature[row.operator].lambda_max
    return step_size(row.fo, digits=digits_for(largest.value, largest.residual))


def _stable_for(result: BoundsResult) -> str:
    return f"stable for {count(result.steps)}\nsteps up to"


def _first_order(result: BoundsResult, row: OptimizerBounds) -> list[str]:
    return [_name(row), _fo(result, row)]


def _intervals(row: OptimizerBounds) -> list[str]:
    return [
        _with_ends(row.zo_lower, row.zo_upper, row.zo_ci95),
        _with_ends(row.lower_tight, row.upper_tight, row.tight_ci95),
    ]


def _with_ends(low: float | None, high: float | None, ends: tuple[float, float] | None) -> str:
    """A number, or an interval of two that were estimated, with the larger error of the two."""
    if low is None or high is None or ends is None:
        return step_range(low, high)
    known = [(value, abs(end - value)) for value, end in zip((low, high), ends, strict=True) if 0 < value < math.inf]
    value, half_width = max(known, key=lambda found: found[1] / found[0], default=(1.0, 0.0))
    return step_range(low, high, digits=min(digits_for(value, half_width), 3)) + error(value, half_width)


def _compared_with(result: BoundsResult) -> list[str]:
    """Columns of `_compared`: with mini-batches what binds is in a table of its own, and so is the ratio to it."""
    batches = any(row.minibatch for row in result.optimizers.values())
    return [DESCENT] if batches else [DESCENT, COMPARED]


UNEVEN = 1.5
"""Upper end of an interval over its value from which "±" would hide that the lower end is nearer."""


def _compared(row: OptimizerBounds) -> list[str]:
    descent, ends = _with_ends(row.descent, row.descent, row.descent_ci95), row.descent_ci95
    if row.descent is not None and ends is not None and UNEVEN * row.descent < ends[1] < math.inf:
        descent = step_range(*ends, digits=2)
    return [descent] if row.minibatch else [descent, _times_below_fo(row)]


def _times_below_fo(row: OptimizerBounds) -> str:
    return MISSING if row.times_below_fo is None else f"{quantity(row.times_below_fo, digits=2)} ×"


def _stable(row: OptimizerBounds) -> Text:
    if row.horizon is None:
        return Text(MISSING)
    point = row.horizon.planned
    widest = max((point.lower, point.upper), key=lambda end: end.half_width / end.value if end.value > 0 else 0.0)
    shown = step_range(point.lower.value, point.upper.value, digits=_digits(point))
    return Text(shown + error(widest.value, widest.half_width), style="bold")


def _digits(point: HorizonPoint) -> int:
    return min(digits_for(end.value, end.half_width) for end in (point.lower, point.upper))


def horizon_table(result: BoundsResult) -> Table:
    """η*(T), one row per horizon, the planned one set off, infinite time last."""
    columns = [(row, row.horizon.curve) for row in result.optimizers.values() if row.horizon is not None]
    table = number_table("T (steps)", *(_name(row) for row, _ in columns))
    digits = [min(_digits(point) for point in curve) for _, curve in columns]
    for points in zip(*(curve for _, curve in columns), strict=True):
        steps = points[0].steps
        cells = [
            step_range(point.lower.value, point.upper.value, digits=shown)
            for point, shown in zip(points, digits, strict=True)
        ]
        planned = steps == result.steps
        table.add_row(f"{count(steps)}{' ◂ planned' if planned else ''}", *cells, style="bold" if planned else None)
    for_ever = [
        MISSING if row.exact is None else step_size(row.exact.value, digits=shown)
        for (row, _), shown in zip(columns, digits, strict=True)
    ]
    table.add_row("∞", *for_ever)
    return table


def minibatch_section(result: BoundsResult) -> Iterator[RenderableType]:
    """Heading and table of a result with mini-batches."""
    rows = [(row, row.minibatch) for row in result.optimizers.values() if row.minibatch is not None]
    yield _batches_heading(rows[0][1])
    table = number_table("", _stable_for(result), "of full\nbatch", "infinite\ntime", DESCENT, COMPARED)
    for row, found in rows:
        table.add_row(
            _name(row),
            Text(_minibatch_stable(found), style="bold"),
            _share(row, found),
            step_size_of(found.exact),
            step_size_of(found.descent),
            _times_below_fo(row),
        )
    yield table


def _batches_heading(found: MiniBatchBounds | ForwardMiniBatch) -> Text:
    title = f"With mini-batches of {count(found.batch_size)} of {count(found.examples)} examples"
    return heading(title, "drawn anew at every step; what follows goes by these")


def _minibatch_stable(found: MiniBatchBounds) -> str:
    lower, upper = found.horizon.lower, found.horizon.upper
    return step_range(lower.value, upper.value, digits=_digits(found.horizon)) + error(upper.value, upper.half_width)


def _share(row: OptimizerBounds, found: MiniBatchBounds) -> str:
    if row.horizon is None or not 0 < row.horizon.upper < float("inf"):
        return MISSING
    return quantity(found.horizon.upper.value / row.horizon.upper, digits=2)


def forward_curvature_table(found: ForwardCurvature) -> Table:
    """What was measured, and how."""
    table = number_table("", "Hessian H")
    table.add_row("trace", curvature_of(found.trace))
    table.add_row("‖·‖_F²", curvature_of(found.frobenius_sq))
    table.add_row("along the gradient", MISSING if found.rayleigh is None else curvature_of(found.rayleigh))
    table.add_row("λ_max, λ_min", "not known")
    table.add_row("method", f"{found.method}, h = {quantity(found.step, digits=2)}")
    table.add_row("cost", f"{count(found.num_evaluations)} evaluations, {duration(found.seconds)}")
    return table


def forward_bounds_table(result: BoundsResult) -> Table:
    """A row per optimizer: the descent threshold and the two bounds of the infinite-time one."""
    table = number_table(
        "", "descent\nany H", "infinite time,\nat most; any H", "infinite time,\nat least; H ⪰ 0", justify="right"
    )
    possible = result.forward is None or result.forward.trace.value >= 0  # whether H ⪰ 0 may be
    for name, row in result.optimizers.items():
        if row.forward is not None:
            descent, upper, lower = (
                step_size_of(e) for e in (row.forward.descent, row.forward.upper, row.forward.lower)
            )
            table.add_row(optimizer_name(name), descent, upper, lower if possible else MISSING)
    return table


def forward_batches_section(result: BoundsResult) -> Iterator[RenderableType]:
    """Heading and table of what is known of mini-batches; nothing without."""
    rows = [
        (row.name, row.forward.minibatch)
        for row in result.optimizers.values()
        if row.forward is not None and row.forward.minibatch is not None
    ]
    if not rows:
        return
    yield _batches_heading(rows[0][1])
    table = number_table(
        "",
        "descent\nany H",
        "infinite time,\nat most; any H",
        f"{count(rows[0][1].steps)} steps,\nat least; positive part",
        justify="right",
    )
    for name, bounds in rows:
        table.add_row(
            optimizer_name(name), step_size_of(bounds.descent), step_size_of(bounds.upper), step_size_of(bounds.lower)
        )
    yield table


def forward_outlook(verdict: Verdict) -> str:
    """The outlook of a step size in words."""
    return {
        "stable": "below the threshold if H ⪰ 0",
        "uncertain": "not above the upper bound of the infinite-time threshold; forward passes cannot say more",
        "unstable": "above the infinite-time threshold: blows up in the long run",
    }[verdict.outlook]


NAMES = {"hessian": "hessian", "ggn": "ggn", "forward": "forward (2 passes each)"}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def cost(result: CostEstimate, width: int) -> Iterator[RenderableType]:
    """Header, a row per kind, the recommendation."""
    facts = [
        f"{count(result.num_params)} parameters",
        count(result.num_examples, "example"),
        f"{result.device} {result.dtype}",
        f"{memory(result.available)} free",
    ]
    head = Text.assemble((result.spec or "zoscope bounds --estimate", "bold"))
    yield head.append(f"\n{' · '.join(facts)}", style="dim")
    yield heading("Expected cost", f"from one micro-batch of {count(result.timed_examples)}")
    table = number_table(
        "--curvature", "products,\nabout", "at most", "seconds\neach", "seconds\nin all", "memory besides\nthe model"
    )
    for cost in result.kinds:
        cells = [MISSING] * 5
        if cost.seconds_each is not None and cost.seconds is not None:
            each, seconds = f"{cost.seconds_each:.2g} s", duration(cost.seconds)
            cells = [count(cost.products, rough=True), count(cost.most), each, seconds, memory(cost.total_bytes)]
        table.add_row(NAMES[cost.kind], *cells)
    yield table
    yield Text(f"\nUse --curvature {result.recommended}: {result.reason}.")


def cost_details(result: CostEstimate, width: int) -> Iterator[RenderableType]:
    """Why a kind is not available."""
    problems = [(cost.kind, cost.problem) for cost in result.kinds if cost.problem is not None]
    if problems:
        yield heading("Not available")
        yield grid(problems)


render_cost = as_report(cost, cost_details)


def memory(size: int | None) -> str:
    """Bytes in the unit that suits them: ``735 MiB``."""
    if size is None:
        return MISSING
    value, unit = float(size), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


ROOMY = 1000
"""Columns in which every table has its natural width."""

LITTLE_CURVATURE = "little-curvature"

PAPER = "the paper's interval assumes H ⪰ 0"


DROPPED = ((True, True), (False, True), (False, False))
"""The paper's interval and the errors: what the answer leaves out first where there is little room."""


def answer(result: BoundsResult, width: int) -> Iterator[RenderableType]:
    """One table and one ruler."""
    yield _title(result, width)
    tables = [_short_table(result, interval=interval, errors=errors) for interval, errors in DROPPED]
    yield next((table for table in tables if _natural_width(table) <= width), tables[-1])
    rulers = (_ruler(result, row, width) for row in result.optimizers.values())
    yield from itertools.islice(filter(None, rulers), 1)
    if result.perturbation is not None and result.mu is not None:
        yield grid([_judged_mu(result.perturbation, result.mu)])


def _judged_mu(scale: PerturbationScale, asked: float) -> tuple[str, str | Text]:
    """Whether slopes are right at the μ asked about, and which one to use where they are not."""
    right = f"slopes right within {percent(scale.tolerance)} with {scale.range}"
    if scale.allows(asked):
        return "μ", Text(f"{asked:.3g} is right", style="bold green") + Text(f"   {right}")
    best = "" if scale.best is None else f"; use {scale.best:.2g}"
    return "μ", Text(f"{asked:.3g} is not right", style="bold red") + Text(f"   {right}{best}")


def _title(result: BoundsResult, width: int) -> Text:
    problem = result.problem
    examples = count(problem.num_examples, "example")
    for row in result.optimizers.values():
        batch = row.minibatch or (None if row.forward is None else row.forward.minibatch)
        if batch is not None:
            examples = f"batches of {count(batch.batch_size)} of {examples}"
            break
    facts = [result.spec or "zoscope bounds", count(problem.num_params, "parameter"), examples]
    return one_line([*facts, f"loss {quantity(problem.loss)}", duration(result.seconds)], width=width)


def _short_table(result: BoundsResult, *, interval: bool, errors: bool) -> Table:
    """What the answer shows of every optimizer: what a step size asked about does, or else the paper's interval."""
    rows = list(result.optimizers.values())
    asked = next((row.verdict.lr for row in rows if row.verdict is not None), None)
    judged = [] if asked is None else [f"lr = {asked:g}"]
    if result.forward is not None:
        table = number_table("", "descent", "ZO for ever, from", "to", *judged, "use lr")
        possible = result.forward.trace.value >= 0  # whether H ⪰ 0 may be, as the lower end needs
        for row in rows:
            if row.forward is not None:
                lower, upper, descent = (_about(estimate, errors) for estimate in row.forward.met)
                table.add_row(
                    _name(row), descent, lower if possible else MISSING, upper, *_judged(row), _use(result, row)
                )
        return table
    paper = ["paper's interval"] if interval and not judged and not any(row.minibatch for row in rows) else []
    table = number_table("", "FO", "ZO for ever", *paper, f"ZO, {count(result.steps, 'step')}", *judged, "use lr")
    for row in rows:
        for_ever = _about(row.exact if row.minibatch is None else row.minibatch.exact, errors)
        shown = [step_range(row.zo_lower, row.zo_upper)] if paper else []
        table.add_row(_name(row), step_size(row.fo), for_ever, *shown, _planned(row), *_judged(row), _use(result, row))
    return table


OUTLOOKS = {"stable": ("stable", "green"), "uncertain": ("may diverge", "yellow"), "unstable": ("diverges", "red")}
TO_THE_FLOOR = {"stable": ("falls", "green"), "uncertain": ("near floor", "yellow"), "unstable": ("rises", "red")}
"""Of a run that never diverges on a quadratic, and stalls at its floor."""


def _judged(row: OptimizerBounds) -> list[Text]:
    """What the step size asked about does, in a word: ``1.25 × may diverge``; nothing where none was."""
    if row.verdict is None:
        return []
    words, colour = (OUTLOOKS if row.rule.is_linear else TO_THE_FLOOR)[row.verdict.outlook]
    if words == "diverges" and row.doubts:  # the threshold is that of the start, which a run may leave alive
        words, colour = "diverges?", "yellow"
    ratio = "" if row.verdict.ratio is None else f"{quantity(row.verdict.ratio, digits=3)} × "
    return [Text(f"{ratio}{words}", style=colour)]


def _about(estimate: Estimate | None, errors: bool) -> str:
    if estimate is None:
        return MISSING
    digits = min(digits_for(estimate.value, estimate.half_width), 3)
    shown = step_size(estimate.value, digits=digits)
    return shown + error(estimate.value, estimate.half_width) if errors else shown


def _planned(row: OptimizerBounds) -> str:
    """What limits the planned steps: η*(N) with both ends, or the descent threshold where that is smaller."""
    point = row.minibatch.horizon if row.minibatch else row.horizon.planned if row.horizon else None
    if row.binding is not None and row.binding.name == "descent":
        half_width = 0.0 if row.limit is None else row.limit.error
        digits = min(digits_for(row.binding.value, half_width), 3)
        return f"{step_size(row.binding.value, digits=digits)} (descent)"
    if point is None:
        return MISSING
    return step_range(point.lower.value, point.upper.value, digits=min(_digits(point), 3))


def _use(result: BoundsResult, row: OptimizerBounds) -> Text:
    """The step size to use: ``≤ 1.15e-2``, ``≤ 1.1e-2 ?`` where it is provisional, ``from 3e-3 ?`` where to begin."""
    if any(notice.code == JUMPS for notice in result.warnings):
        return Text("not known", style="bold yellow")
    if row.recommended is None:
        unlimited = row.limit is not None and math.isinf(row.limit.value)
        return Text("no limit here" if unlimited else "not known", style="bold yellow")
    digits = 1 if LITTLE_CURVATURE in row.doubts else 2 if row.doubts else 3
    if row.recommended_range is not None:
        low = step_size_at_most(row.recommended_range[0], digits=min(digits, 2))
        return Text(f"from {low} ?", style="bold yellow")
    at_most = f"≤ {step_size_at_most(row.recommended, digits=digits)}"
    return Text(f"{at_most} ?", style="bold yellow") if row.doubts else Text(at_most, style="bold green")


def _ruler(result: BoundsResult, row: OptimizerBounds, width: int) -> Text | None:
    if row.recommended is None:
        return None
    asked = None if row.verdict is None else row.verdict.lr
    edge = None if row.limit is None else row.limit.value if row.limit.edge is None else row.limit.edge
    use = row.recommended if row.recommended_range is None else row.recommended_range[0]
    marks = {"use": use, "edge": edge, "lr": asked, "FO": row.fo}
    return ruler(marks, width=width, label=f"{_name(row)} " if len(result.optimizers) > 1 else "")


def details(result: BoundsResult, width: int) -> Iterator[RenderableType]:
    """Everything, top to bottom."""
    yield Text("")
    yield _header(result, width=width)
    yield heading("Curvature", "± is the half-width of the 95 % interval")
    if result.forward is not None:
        yield forward_curvature_table(result.forward)
        yield heading("Step-size bounds", settings_line(result))
        yield forward_bounds_table(result)
        yield from forward_batches_section(result)
    else:
        yield curvature_table(result)
        yield from _bounds(result, width)
        yield heading("Stable for how many steps", "η*(T): all eigenvalues – positive ones only")
        yield horizon_table(result)
        if any(row.minibatch for row in result.optimizers.values()):
            yield from minibatch_section(result)
    yield from floors(result)
    yield heading(f"For {count(result.steps)} steps")
    yield advice(result)
    if any(row.verdict for row in result.optimizers.values()):
        yield from verdicts(result)


render = as_report(answer, details)


def _natural_width(table: Table) -> int:
    return CleanConsole(width=ROOMY).measure(table).maximum


def _bounds(result: BoundsResult, width: int) -> Iterator[RenderableType]:
    """One table where it fits, else two: a number that is cut is worse than one further down."""
    wide = bounds_table(result)
    settings = settings_line(result)
    if _natural_width(wide) <= width:
        yield heading("Step-size bounds", "; ".join(filter(None, (settings, PAPER))))
        yield wide
    else:
        yield heading("Step-size bounds", settings)
        yield planned_table(result)
        yield heading("Step-size bounds for infinite time", PAPER)
        yield infinite_time_table(result)


def floors(result: BoundsResult) -> Iterator[RenderableType]:
    """Where runs of adaptive optimizers stall."""
    rows = [(_name(row), row.floor) for row in result.optimizers.values() if row.floor is not None]
    if rows:
        yield heading("Floor of adaptive runs", "steps keep their size while ‖g‖ falls, until it stalls")
        yield grid((name, _floor(found)) for name, found in rows)


def _floor(found: Floor) -> Text:
    here = quantity(found.grad_norm, digits=3)
    if not math.isfinite(found.lr.value):
        return Text(f"None from here: Tr H is not positive, and ‖g‖ = {here}.")
    text = Text(f"lr below {step_size_of(found.lr)} keeps it below ‖g‖ = {here} here")
    if found.asked is not None and found.grad_norm_at_lr is not None:
        text.append(f"; lr = {found.asked:g} stalls at ‖g‖ = {quantity(found.grad_norm_at_lr, digits=2)}")
    return text.append(".")


def _header(result: BoundsResult, *, width: int) -> RenderableType:
    estimator = result.estimator
    queries = "" if estimator.queries == 1 else f", {estimator.queries} queries per step"
    cost = "HVPs" if result.forward is None else "directions, two forward passes each"
    more = [f"{estimator.directions} directions{queries}"]
    if estimator.one_sided_mu is not None:
        more.append(f"one-sided differences: μ ≪ {quantity(estimator.one_sided_mu, digits=2)}")
    return header(result, result.spec or "zoscope bounds", width=width, cost=cost, more=more)


def advice(result: BoundsResult) -> RenderableType:
    """Which threshold binds each optimizer, and the step size to use."""
    rows = [(optimizer_name(row.name), _advice(row, result.steps)) for row in result.optimizers.values()]
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
        low, high = (step_size_at_most(end, digits=shown) for end in row.recommended_range)
        text.append("begin with lr = ").append(low, style="bold yellow").append(f"; up to {high} may do: probe it")
    elif row.doubts:
        at_most = step_size_at_most(row.recommended, digits=shown)
        text.append("use lr ≤ ").append(at_most, style="bold yellow").append(" for now")
    else:
        text.append("use lr ≤ ").append(step_size_at_most(row.recommended), style="bold green")
    if LITTLE_CURVATURE in row.doubts:
        text.append(", and measure again after warm-up")
    if row.predicted_lr is not None:
        lowest = step_size(row.predicted_lr, digits=2)
        text.append(f". If the curvature stayed as it is, the loss would be lowest at {lowest}")
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
    yield grid((optimizer_name(row.name), _verdict(verdict, row)) for row, verdict in judged)


def _verdict(verdict: Verdict, row: OptimizerBounds) -> Text:
    colour = {"stable": "green", "uncertain": "yellow", "unstable": "red"}[verdict.outlook]
    if verdict.outlook == "stable" and (row.doubts or _passes_horizon(verdict)):
        colour = "yellow"
    which = "provisional" if row.doubts else "binding"
    times = "" if verdict.ratio is None else f"{quantity(verdict.ratio, digits=3)} × the {which} threshold: "
    text = Text.assemble(times, (_outlook(verdict) if row.rule.is_linear else _towards_floor(verdict), colour))
    if verdict.descends is False:
        text.append("; the expected loss rises at first, since this is above the descent threshold")
    return text.append(".")


def _passes_horizon(verdict: Verdict) -> bool:
    """Whether a run blows up by η*(N) of the positive part, whichever threshold was asked for."""
    return verdict.blow_up is not None and verdict.blow_up[1] <= verdict.steps


def _towards_floor(verdict: Verdict) -> str:
    if verdict.outlook == "stable":
        return "the gradient falls to the floor"
    return "the floor is near" if verdict.ratio is None or verdict.ratio <= 1 else "the gradient rises to the floor"


def _outlook(verdict: Verdict) -> str:
    planned = count(verdict.steps)
    if verdict.blow_up is None:
        return forward_outlook(verdict)
    first, last = verdict.blow_up
    if not _passes_horizon(verdict):
        if verdict.outlook == "unstable":
            return f"above it, though it does not blow up within {planned} steps"
        if verdict.outlook == "stable":
            return f"does not blow up within {planned} steps"
        if first <= verdict.steps <= SHORT:
            return f"may blow up after about {count(first, rough=True)} steps, or not within {planned}"
        where = "close to it" if verdict.ratio is None or verdict.ratio <= 1 else "above it"
        return f"{where}, may blow up within {planned} steps, as curvature usually rises"
    first, last = verdict.blow_up if verdict.doubling is None else verdict.doubling
    if math.isinf(first):
        return f"above η*({planned}), but the loss is not predicted to double within {planned} steps"
    if verdict.outlook == "uncertain" or math.isinf(last):
        return f"may blow up after about {count(first, rough=True)} steps, or not within {planned}"
    span = dict.fromkeys((count(first, rough=True), count(last, rough=True)))
    below = "below it, but " if verdict.outlook == "stable" else ""
    return f"{below}blows up after about {'–'.join(span)} {'step' if last == 1 else 'steps'}"
