"""The tables of numbers in the report of ``zoscope.bounds``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.style import (
    MISSING,
    OPTIMIZER_NAMES,
    count,
    digits_for,
    duration,
    error,
    quantity,
    quantity_with_error,
    step_range,
    step_size,
    step_size_with_error,
)
from zoscope.report.tables import number_table

if TYPE_CHECKING:
    from rich.table import Table

    from zoscope.analysis.results import BoundsResult, OptimizerBounds
    from zoscope.curvature.results import Curvature, Eigenvalue
    from zoscope.theory.horizons import HorizonPoint
    from zoscope.theory.spectrum import Estimate

OPERATOR_NAMES = {
    "hessian": "Hessian H",
    "preconditioned_hessian": "P^-½ H P^-½ (Adam)",
    "ggn": "Gauss-Newton G",
    "preconditioned_ggn": "P^-½ G P^-½ (Adam)",
}


FIRST_ORDER = ("", "FO")
ASSUMING = ("paper's ZO\ninterval", "tight ZO\ninterval")
FOR_EVER = ("infinite\ntime, exact",)
COMPARED = ("descent", "FO ÷\nbinding")


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
    yield "trace", [_estimate(entry.trace) for entry in entries]
    yield "  positive part", [_estimate(entry.trace_positive) for entry in entries]
    yield "  negative mass", [quantity(entry.negative_mass, digits=3) for entry in entries]
    yield "λ_max", [_eigenvalue(entry.lambda_max) for entry in entries]
    yield "λ_min", [_eigenvalue(entry.lambda_min) for entry in entries]
    yield "‖·‖_F²", [_estimate(entry.frobenius_sq) for entry in entries]
    yield "effective rank", [quantity(entry.effective_rank, digits=3) for entry in entries]
    yield "method", [entry.method for entry in entries]
    if any(entry.hvp for entry in entries):
        yield "products", [entry.hvp or "" for entry in entries]
    yield "cost", [f"{count(entry.num_hvps)} HVPs, {duration(entry.seconds)}" for entry in entries]


def _estimate(estimate: Estimate) -> str:
    return quantity_with_error(estimate.value, estimate.half_width)


def _eigenvalue(eigenvalue: Eigenvalue) -> str:
    text = quantity_with_error(eigenvalue.value, eigenvalue.residual)
    return text if eigenvalue.converged else f"{text} (not converged)"


def bounds_table(result: BoundsResult) -> Table:
    """A row per optimizer and every bound in it; wide."""
    table = number_table(*FIRST_ORDER, *ASSUMING, _stable_for(result), *FOR_EVER, *COMPARED)
    for row in result.optimizers.values():
        table.add_row(*_first_order(result, row), *_intervals(row), _stable(row), _exact(row), *_compared(row))
    return table


def planned_table(result: BoundsResult) -> Table:
    """The half of the bounds that is about the planned steps."""
    table = number_table(*FIRST_ORDER, _stable_for(result), *COMPARED)
    for row in result.optimizers.values():
        table.add_row(*_first_order(result, row), _stable(row), *_compared(row))
    return table


def infinite_time_table(result: BoundsResult) -> Table:
    """The half of the bounds that is about infinite time."""
    table = number_table("", *ASSUMING, *FOR_EVER)
    for row in result.optimizers.values():
        table.add_row(_name(row), *_intervals(row), _exact(row))
    return table


def settings_line(result: BoundsResult) -> str:
    """What identifies the optimizers."""
    parts = []
    for name, row in result.optimizers.items():
        if name == "gdm":
            parts.append(f"GDM β = {row.settings['beta']:g}")
        elif name == "adam":
            beta1, beta2 = row.settings["betas"]
            parts.append(f"Adam β = ({beta1:g}, {beta2:g}), P = {row.settings['preconditioner']}")
    return "; ".join(parts)


def _name(row: OptimizerBounds) -> str:
    return OPTIMIZER_NAMES[row.name]


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


def _exact(row: OptimizerBounds) -> str:
    return MISSING if row.exact is None else step_size_with_error(row.exact.value, row.exact.half_width)


def _compared(row: OptimizerBounds) -> list[str]:
    times = MISSING if row.times_below_fo is None else f"{quantity(row.times_below_fo, digits=2)} ×"
    return [_with_ends(row.descent, row.descent, row.descent_ci95), times]


def _stable(row: OptimizerBounds) -> Text:
    if row.horizon is None:
        return Text(MISSING)
    point = row.horizon.planned
    widest = max((point.lower, point.upper), key=_relative_error)
    shown = step_range(point.lower.value, point.upper.value, digits=_digits(point))
    return Text(shown + error(widest.value, widest.half_width), style="bold")


def _relative_error(estimate: Estimate) -> float:
    """Relative half-width, for choosing the poorer one of two."""
    return estimate.half_width / estimate.value if estimate.value > 0 else 0.0


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
