"""What the report of ``zoscope.bounds`` shows where only forward passes were made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zoscope.report.style import (
    MISSING,
    OPTIMIZER_NAMES,
    count,
    duration,
    quantity,
    quantity_with_error,
    step_size_with_error,
)
from zoscope.report.tables import heading, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.optimizer_bounds import Verdict
    from zoscope.analysis.results import BoundsResult
    from zoscope.curvature.results import ForwardCurvature
    from zoscope.theory.spectrum import Estimate


def forward_curvature_table(found: ForwardCurvature) -> Table:
    """What was measured, and how."""
    table = number_table("", "Hessian H")
    table.add_row("trace", _estimate(found.trace))
    table.add_row("‖·‖_F²", _estimate(found.frobenius_sq))
    table.add_row("along the gradient", MISSING if found.rayleigh is None else _estimate(found.rayleigh))
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
            descent, upper, lower = (_step_size(e) for e in (row.forward.descent, row.forward.upper, row.forward.lower))
            table.add_row(OPTIMIZER_NAMES[name], descent, upper, lower if possible else MISSING)
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
    found = rows[0][1]
    title = f"With mini-batches of {count(found.batch_size)} of {count(found.examples)} examples"
    yield heading(title, "drawn anew at every step; what follows goes by these")
    table = number_table(
        "",
        "descent\nany H",
        "infinite time,\nat most; any H",
        f"{count(found.steps)} steps,\nat least; positive part",
        justify="right",
    )
    for name, bounds in rows:
        descent = MISSING if bounds.descent is None else _step_size(bounds.descent)
        table.add_row(OPTIMIZER_NAMES[name], descent, _step_size(bounds.upper), _step_size(bounds.lower))
    yield table


def forward_outlook(verdict: Verdict) -> str:
    """The outlook of a step size in words."""
    return {
        "stable": "below the threshold if H ⪰ 0",
        "uncertain": "not above the upper bound of the infinite-time threshold; forward passes cannot say more",
        "unstable": "above the infinite-time threshold: blows up in the long run",
    }[verdict.outlook]


def _estimate(estimate: Estimate) -> str:
    return quantity_with_error(estimate.value, estimate.half_width)


def _step_size(estimate: Estimate) -> str:
    return step_size_with_error(estimate.value, estimate.half_width)
