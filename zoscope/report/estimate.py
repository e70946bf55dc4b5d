"""The report of ``zoscope bounds --estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from zoscope.report.style import MISSING, count, duration, rough_count
from zoscope.report.tables import grid, heading, number_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoscope.analysis.estimate_results import CostEstimate

NAMES = {"hessian": "hessian", "ggn": "ggn", "forward": "forward (2 passes each)"}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def render(result: CostEstimate) -> RenderableType:
    """Header, a row per kind, the recommendation."""
    head = Text.assemble((result.spec or "zoscope bounds --estimate", "bold"))
    head.append(
        f"\n{count(result.num_params)} parameters · {count(result.num_examples)} example"
        f"{'' if result.num_examples == 1 else 's'} · {result.device} "
        f"{result.dtype} · {memory(result.available)} free",
        style="dim",
    )
    table = number_table(
        "--curvature", "products,\nabout", "at most", "seconds\neach", "seconds\nin all", "memory besides\nthe model"
    )
    for cost in result.kinds:
        if cost.seconds_each is None or cost.seconds is None:
            table.add_row(NAMES[cost.kind], *[MISSING] * 5)
        else:
            each = f"{cost.seconds_each:.2g} s"
            table.add_row(
                NAMES[cost.kind],
                rough_count(cost.products),
                count(cost.most),
                each,
                duration(cost.seconds),
                memory(cost.total_bytes),
            )
    problems = [(cost.kind, cost.problem) for cost in result.kinds if cost.problem is not None]
    parts: list[RenderableType] = [
        head,
        heading("Expected cost", f"from one micro-batch of {count(result.timed_examples)}"),
        table,
        Text(f"\nUse --curvature {result.recommended}: {result.reason}."),
    ]
    if problems:
        parts += [heading("Not available"), grid(problems)]
    return Group(*parts)


def memory(size: int | None) -> str:
    """Bytes in the unit that suits them: ``735 MiB``."""
    if size is None:
        return MISSING
    value, unit = float(size), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {UNITS[unit]}"
