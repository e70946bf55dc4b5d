"""The comparison as tables for a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from .compare import MOST, Comparison, Timing, geometric_mean, ratio

MOMENTS = ("lambda_max", "trace", "frobenius_sq")


def tables(comparisons: Sequence[Comparison]) -> RenderableType:
    """Both questions, one row a workload and tool."""
    return Group(
        _table("λ_max ± 1 %, trace ± 1 %, ‖H‖² ± 3 %", comparisons, moments=True),
        _table("η*(1000) and infinite-time threshold ± 2 %, GD and GDM", comparisons, moments=False),
    )


def _table(title: str, comparisons: Sequence[Comparison], *, moments: bool) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("workload", "tool"):
        table.add_column(name)
    for name in ("products", "s / product", "seconds", "× zoscope", "largest error"):
        table.add_column(name, justify="right")
    ratios = []
    for comparison in comparisons:
        timings = comparison.moments if moments else comparison.bounds
        for timing in timings:
            table.add_row(comparison.workload.name if timing is timings[0] else "", *_cells(timing, timings[0]))
        table.add_section()
        found = ratio(timings)
        if found is not None:
            ratios.append(found)
    if ratios:
        mean = geometric_mean([min(value, MOST) for value in ratios])
        table.caption = (
            f"Fastest peer over zoscope: {', '.join(_times(value) for value in ratios)}; geometric mean "
            f"{'≥ ' if max(ratios) > MOST else ''}{mean:.1f} ×. ~ projected: products times the seconds of one."
        )
    return table


def _cells(timing: Timing, own: Timing) -> list[str]:
    errors = [f"{100 * value:.1f}" for value in timing.errors.values()]
    return [
        timing.tool + (f" (wider intervals in {timing.missed} rounds)" if timing.missed else ""),
        f"{timing.products:,}",
        "" if timing.product_seconds is None else f"{timing.product_seconds:.3g}",
        f"{'~ ' if timing.projected else ''}{timing.seconds:,.1f}",
        "1" if timing is own else _times(timing.seconds / own.seconds),
        f"{' · '.join(errors)} %" if errors else "",
    ]


def _times(value: float) -> str:
    return f"> {MOST:.0f}" if value > MOST else f"{value:.2f}"
