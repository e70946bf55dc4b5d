"""The report of ``zoscope.spectrum``: header, moments, eigenvalues, counts by decade, layers, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.bounds_tables import OPERATOR_NAMES
from zoscope.report.style import MISSING, count, quantity, quantity_with_error
from zoscope.report.tables import grid, header, heading, number_table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from zoscope.analysis.density_results import LayerTrace, SpectrumResult
    from zoscope.analysis.moments import MomentsResult
    from zoscope.curvature.results import Eigenvalue
    from zoscope.theory.density import Decade
    from zoscope.theory.spectrum import Estimate

NAME = "zoscope spectrum"
NOT_CONVERGED = "*"


@dataclass(frozen=True)
class SpectrumReport:
    """Lays a result out for the width that it is printed at.

    Args:
        result: What to show.
        warnings: Whether to end with the warnings.
    """

    result: SpectrumResult
    warnings: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Everything, top to bottom."""
        result = self.result
        yield header(result, result.spec or NAME, width=options.max_width, how=[result.curvature.method])
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
        if self.warnings and result.warnings:
            yield heading("Warnings")
            yield grid(("•", notice.message) for notice in result.warnings)


def render(result: SpectrumResult, *, warnings: bool = True) -> SpectrumReport:
    """The report of a result, for ``rich``; ``warnings=False`` leaves them to another stream."""
    return SpectrumReport(result, warnings=warnings)


@dataclass(frozen=True)
class MomentsReport:
    """Lays a result of ``zoscope.moments`` out for the width that it is printed at.

    Args:
        result: What to show.
        warnings: Whether to end with the warnings.
    """

    result: MomentsResult
    warnings: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Everything, top to bottom."""
        result, found = self.result, self.result.moments
        how = "the same probe vectors for all examples"
        if found.pieces > 1:
            how = f"probe vectors of their own for {found.pieces} pieces of the data"
        yield header(result, result.spec or NAME, width=options.max_width, how=[how])
        yield heading(OPERATOR_NAMES.get(result.operator, result.operator), "± is the half-width of the 95 % interval")
        yield grid(
            [
                ("λ_max", quantity_with_error(found.lambda_max.value, found.lambda_max.residual)),
                ("trace", _estimate(found.trace)),
                ("‖·‖_F²", _estimate(found.frobenius_sq)),
            ]
        )
        if self.warnings and result.warnings:
            yield heading("Warnings")
            yield grid(("•", notice.message) for notice in result.warnings)


def render_moments(result: MomentsResult, *, warnings: bool = True) -> MomentsReport:
    """The report of a result of ``zoscope.moments``, for ``rich``."""
    return MomentsReport(result, warnings=warnings)


def moments_table(result: SpectrumResult) -> RenderableType:
    """Sums over all eigenvalues."""
    curvature = result.curvature
    return grid(
        [
            ("trace", _estimate(curvature.trace)),
            ("  positive part", _estimate(curvature.trace_positive)),
            ("  negative mass", quantity(curvature.negative_mass, digits=3)),
            ("‖·‖_F²", _estimate(curvature.frobenius_sq)),
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
        table.add_row(_interval(part), _count(part.count), _estimate(part.total))
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
        table.add_row(Text(layer.name), count(layer.num_params), _estimate(layer.trace), share)
    table.add_section()
    table.add_row("all", count(sum(layer.num_params for layer in layers)), _estimate(trace), "")
    return table


def _estimate(estimate: Estimate) -> str:
    return quantity_with_error(estimate.value, estimate.half_width)
