"""The part of the report of ``zoscope.bounds`` that is about mini-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.style import (
    MISSING,
    OPTIMIZER_NAMES,
    count,
    digits_for,
    error,
    quantity,
    step_range,
    step_size_with_error,
)
from zoscope.report.tables import heading, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.minibatch_results import MiniBatchBounds
    from zoscope.analysis.results import BoundsResult, OptimizerBounds
    from zoscope.theory.spectrum import Estimate


def minibatch_section(result: BoundsResult) -> Iterator[RenderableType]:
    """Heading and table of a result with mini-batches."""
    found = next(row.minibatch for row in result.optimizers.values() if row.minibatch is not None)
    title = f"With mini-batches of {count(found.batch_size)} of {count(found.examples)} examples"
    yield heading(title, "drawn anew at every step; what follows goes by these")
    yield _table(result)


def _table(result: BoundsResult) -> Table:
    table = number_table(
        "", f"stable for {count(result.steps)}\nsteps up to", "of full\nbatch", "infinite\ntime", "descent"
    )
    for row in result.optimizers.values():
        if row.minibatch is not None:
            table.add_row(
                OPTIMIZER_NAMES[row.name],
                Text(_stable(row.minibatch), style="bold"),
                _share(row, row.minibatch),
                _estimate(row.minibatch.exact),
                _estimate(row.minibatch.descent),
            )
    return table


def _stable(found: MiniBatchBounds) -> str:
    lower, upper = found.horizon.lower, found.horizon.upper
    digits = min(digits_for(end.value, end.half_width) for end in (lower, upper))
    return step_range(lower.value, upper.value, digits=digits) + error(upper.value, upper.half_width)


def _share(row: OptimizerBounds, found: MiniBatchBounds) -> str:
    if row.horizon is None or not 0 < row.horizon.upper < float("inf"):
        return MISSING
    return quantity(found.horizon.upper.value / row.horizon.upper, digits=2)


def _estimate(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else step_size_with_error(estimate.value, estimate.half_width)
