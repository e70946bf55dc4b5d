"""The report of ``zoscope.spectrum``: eigenvalues per decade, the ends of the spectrum, trace by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.answer import as_report, one_line
from zoscope.report.style import grid, header, heading, number_table
from zoscope.report.words import MISSING, OPERATOR_NAMES, count, curvature_of, duration, quantity, quantity_with_error

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zoscope.analysis.spectrum import LayerTrace, MomentsResult, SpectrumResult
    from zoscope.curvature.slq import Eigenvalue
    from zoscope.theory.density import Decade
    from zoscope.theory.spectrum import Estimate

NAME = "zoscope spectrum"
NOT_CONVERGED = "*"


LISTED = 4
"""Eigenvalues of each end, and layers, in the answer."""

BARS = 24
"""Longest bar of a decade, in columns."""

DECADES = 4
"""Decades of the answer, those with most curvature."""


def answer(result: SpectrumResult, width: int) -> Iterator[RenderableType]:
    """Both ends, the sums, and where the curvature is."""
    yield _title(result, width)
    curvature = result.curvature
    negative = quantity(-curvature.negative_mass, digits=3)
    rank = f"{quantity(curvature.effective_rank, digits=3)} of {count(result.problem.num_params)}"
    yield grid(
        [
            ("largest", ", ".join(_value(eigenvalue) for eigenvalue in result.top[:LISTED])),
            ("smallest", ", ".join(_value(eigenvalue) for eigenvalue in result.bottom[:LISTED]) or MISSING),
            ("trace", f"{curvature_of(curvature.trace)}, of which negative {negative}; effective rank {rank}"),
        ]
    )
    if result.layers is not None:
        yield _layers_line(result.layers)
    yield _decades(result)


def _value(eigenvalue: Eigenvalue) -> str:
    text = quantity_with_error(eigenvalue.value, eigenvalue.residual)
    return text if eigenvalue.converged else f"{text} {NOT_CONVERGED}"


def _title(result: SpectrumResult | MomentsResult, width: int) -> Text:
    problem, name = result.problem, OPERATOR_NAMES.get(result.operator, result.operator)
    facts = [f"{result.spec or NAME}: {name}", count(problem.num_params, "parameter")]
    facts += [count(problem.num_examples, "example"), f"loss {quantity(problem.loss)}", duration(result.seconds)]
    return one_line(facts, width=width)


def _layers_line(layers: tuple[LayerTrace, ...]) -> Text:
    largest = sorted((layer for layer in layers if layer.share is not None), key=lambda layer: -abs(layer.share or 0.0))
    shares = [f"{layer.name} {100 * (layer.share or 0.0):.0f} %" for layer in largest[:LISTED]]
    more = f", +{len(layers) - len(shares)} more" if len(layers) > len(shares) else ""
    return Text(f"trace by layer  {', '.join(shares)}{more}")


def _decades(result: SpectrumResult) -> Table:
    """The decades with most curvature, from the largest eigenvalues down, each with its share of Σ|λ|."""
    whole = sum(abs(part.total.value) for part in result.decades) or 1.0
    largest = sorted(result.decades, key=lambda part: -abs(part.total.value))[:DECADES]
    table = number_table("λ", "how many", "share of Σ|λ|")
    for part in reversed(result.decades):
        if part in largest:
            share = abs(part.total.value) / whole
            bar = Text(f"{'█' * round(BARS * share)} {100 * share:.0f} %")
            table.add_row(_interval(part), _count(part.count), bar)
    table.columns[-1].justify = "left"
    return table


def details(result: SpectrumResult, width: int) -> Iterator[RenderableType]:
    """Everything, top to bottom."""
    yield Text("")
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


render = as_report(answer, details)


def moments_answer(result: MomentsResult, width: int) -> Iterator[RenderableType]:
    """Three numbers."""
    found = result.moments
    yield _title(result, width)
    yield grid(
        [
            ("λ_max", quantity_with_error(found.lambda_max.value, found.lambda_max.residual)),
            ("trace", curvature_of(found.trace)),
            ("‖·‖_F²", curvature_of(found.frobenius_sq)),
        ]
    )


def moments_details(result: MomentsResult, width: int) -> Iterator[RenderableType]:
    """What was measured, and how."""
    found = result.moments
    how = "the same probe vectors for all examples"
    if found.pieces > 1:
        how = f"probe vectors of their own for {found.pieces} pieces of the data"
    yield Text("")
    yield header(result, result.spec or NAME, width=width, how=[how])
    yield heading(OPERATOR_NAMES.get(result.operator, result.operator), "± is the half-width of the 95 % interval")


render_moments = as_report(moments_answer, moments_details)


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
