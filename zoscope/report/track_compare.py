"""Several tracked runs in one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from zoscope.report.style import MISSING, count, quantity, step_size
from zoscope.report.tables import grid, heading, number_table
from zoscope.report.track import STATUS_STYLES

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from zoscope.analysis.tracking.compare import Comparison
    from zoscope.analysis.tracking.results import TrackResult

SHOWN = (
    "spec",
    "set",
    "optimizer",
    "lr",
    "beta",
    "betas",
    "mu",
    "queries",
    "directions",
    "batch_size",
    "seed",
    "steps",
)
"""Options that are named where they differ between runs."""


LABEL, NUMBERS = 28, 62
"""Longest label, and the width of everything beside it."""


@dataclass(frozen=True)
class ComparisonReport:
    """Lays runs out, one row each.

    Args:
        comparison: What to show.
    """

    comparison: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The table, what the columns are, what failed."""
        yield heading("Runs", "each at its last measurement")
        yield table(self.comparison, width=options.max_width)
        same = differing(self.comparison)
        if same and len(self.comparison.results) > 1:
            yield Text(f"They differ in {', '.join(same)}.", style="dim")
        ended = [(label, f"{r.status}: {r.reason}") for label, r in self.comparison.results if r.status != "finished"]
        if ended:
            yield heading("Not finished")
            yield grid(ended)
        if self.comparison.failed:
            yield heading("Failed")
            yield grid((entry.label, entry.error or "") for entry in self.comparison.failed)


def render(comparison: Comparison) -> ComparisonReport:
    """The report of a comparison, for ``rich``."""
    return ComparisonReport(comparison)


def differing(comparison: Comparison) -> list[str]:
    """Options in which the runs differ."""
    configs = [result.config for _, result in comparison.results]
    found = [key for key in SHOWN if len({repr(config.get(key)) for config in configs}) > 1]
    settings = [config.get("set") or {} for config in configs]
    names = dict.fromkeys(name for setting in settings for name in setting)
    named = [f"set.{name}" for name in names if len({repr(setting.get(name)) for setting in settings}) > 1]
    return [word for key in found for word in (named if key == "set" else [key])]


def table(comparison: Comparison, *, width: int) -> Table:
    """One row per run; where there is little room, labels are cut rather than numbers."""
    columns = number_table("run", "steps", "loss", "η", "trace", "λ_max", "term", "η/η*", "in band")
    for label, result in comparison.results:
        columns.add_row(_short(label, min(LABEL, max(width - NUMBERS, LABEL // 2))), *_cells(result))
    return columns


def _cells(result: TrackResult) -> list[str | Text]:
    # After a divergence nothing is left to measure: the last curvature that was.
    measured = [record for record in result.records if record.trace is not None]
    last = measured[-1] if measured else None
    numbers: list[str | Text] = [MISSING] * 5
    if last is not None:
        values = (last.trace, last.lambda_max, last.threshold)
        numbers = [step_size(last.lr), *(quantity(value, digits=3) for value in values), quantity(last.ratio, digits=2)]
    loss = result.records[-1].loss if result.records else None
    band = result.band
    steps = Text(count(result.steps_done), style=STATUS_STYLES.get(result.status, "yellow"))
    return [steps, quantity(loss, digits=3), *numbers, f"{band.inside} of {band.of}" if band.of else MISSING]


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"
