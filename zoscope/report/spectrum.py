"""The report of ``zoscope.spectrum``: eigenvalues per decade, the ends of the spectrum, trace by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.style import (
    MISSING,
    OPERATOR_NAMES,
    as_report,
    count,
    curvature_of,
    grid,
    header,
    heading,
    number_table,
    quantity,
    quantity_with_error,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.spectrum import LayerTrace, MomentsResult, SpectrumResult
    from zoscope.curvature.slq import Eigenvalue
    from zoscope.theory.density import Decade
    from zoscope.theory.spectrum import Estimate

NAME = "zoscope spectrum"
NOT_CONVERGED = "*"


@as_report
def render(result: SpectrumResult, width: int) -> Iterator[RenderableType]:
    """Everything, top to bottom."""
    yield header(result, result.spec or NAME, width=width, how=[result.curvature.method])
    yield heading(OPERATOR_NAMES.get(result.operator, result.operator), "± is the half-width of the 95 % interval")
    yield moments_table(result)
    yield heading("Ends of the spectrum", "± is the residual: an eigenvalue lies that near")
    yield ends_table(result)
    yield from _remarks(result)
    yield heading("Where the eigenvalues are", _resolution(result))
    yield decades_table(result)
    if result.layers is not None:
        yield heading("Trace by layer", "from the same products")
        yield layers_table(result.layers, result.curvature.trace)


@as_report
def render_moments(result: MomentsResult, width: int) -> Iterator[RenderableType]:
    """Everything, top to bottom."""
    found = result.moments
    how = "the same probe vectors for all examples"
    if found.pieces > 1:
        how = f"probe vectors of their own for {found.pieces} pieces of the data"
    yield header(result, result.spec or NAME, width=width, how=[how])
    yield heading(OPERATOR_NAMES.get(result.operator, result.operator), "± is the half-width of the 95 % interval")
    yield grid(
        [
            ("λ_max", quantity_with_error(found.lambda_max.value, found.lambda_max.residual)),
            ("trace", curvature_of(found.trace)),
            ("‖·‖_F²", curvature_of(found.frobenius_sq)),
        ]
    )


def moments_table(result: SpectrumResult) -> RenderableType:
    """Sums over all eigenvalues."""
    curvature = result.curvature
    return grid(
        [
            ("trace", curvature_of(curvature.trace)),
            ("  positive part", curvature_of(curvature.trace_positive)),
            ("  negative mass", quantity(curvature.negative_mass, digits=3)),
            ("‖·‖_F²", curvature_of(curvature.frobenius_sq)),
            ("effective rank", quantity(curvature.effective_rank, digits=3)),
        ]
    )


def ends_table(result: SpectrumResult) -> Table:
    """The largest and the smallest eigenvalues side by side."""
    table = number_table("", "largest", "smallest")
    for index, (high, low) in enumerate(zip_longest(result.top, result.bottom), start=1):
        table.add_row(str(index), _eigenvalue(high), _eigenvalue(low))
    return table


def _eigenvalue(eigenvalue: Eigenvalue | None) -> Text:
    if eigenvalue is None:
        return Text("")
    text = Text(quantity_with_error(eigenvalue.value, eigenvalue.residual))
    if not eigenvalue.converged:
        text.append(f" {NOT_CONVERGED}")
        text.stylize("dim")
    else:
        text.append("  ")  # keeps the numbers of a column aligned
    return text


def _remarks(result: SpectrumResult) -> Iterator[RenderableType]:
    if not all(eigenvalue.converged for eigenvalue in (*result.top, *result.bottom)):
        yield Text(f"{NOT_CONVERGED} not converged: the residual is above 1 % of the value.", style="dim")
    if result.curvature.method != "dense":
        yield Text("An eigenvalue that is repeated is listed once.", style="dim")


def _resolution(result: SpectrumResult) -> str:
    if result.curvature.method == "dense":
        return "every eigenvalue is known"
    known = len(result.outliers)
    return f"{known} are known one by one; resolved down to |λ| ≈ {quantity(result.density.scale, digits=1)}"


def decades_table(result: SpectrumResult) -> Table:
    """Counts and sums, from the largest eigenvalues down."""
    table = number_table("λ", "how many", "their sum")
    for part in reversed(result.decades):
        table.add_row(_interval(part), _count(part.count), curvature_of(part.total))
    return table


def _interval(part: Decade) -> str:
    return f"{quantity(part.lower, digits=1)} to {quantity(part.upper, digits=1)}"


def _count(estimate: Estimate) -> str:
    shown = count(max(estimate.value, 0.0))
    return shown if estimate.half_width < 0.5 else f"{shown} ± {count(math.ceil(estimate.half_width))}"


def layers_table(layers: tuple[LayerTrace, ...], trace: Estimate) -> Table:
    """A row per layer, and the whole."""
    table = number_table("", "parameters", "trace", "share")
    for layer in layers:
        share = MISSING if layer.share is None else f"{100 * layer.share:.1f} %"
        table.add_row(Text(layer.name), count(layer.num_params), curvature_of(layer.trace), share)
    table.add_section()
    table.add_row("all", count(sum(layer.num_params for layer in layers)), curvature_of(trace), "")
    return table
