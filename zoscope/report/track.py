"""The report of ``zoscope.track``: header, measurements, how the run ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zoscope.report.style import MISSING, OPTIMIZER_NAMES, count, counted, duration, quantity, step_size
from zoscope.report.tables import grid, heading, number_table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

    from zoscope.analysis.tracking.record import Record
    from zoscope.analysis.tracking.results import TrackResult

MOST_ROWS = 20
MOST_STEP_SIZES = 4
STATUS_STYLES = {"finished": "bold green", "target": "bold green", "diverged": "bold red"}


@dataclass(frozen=True)
class TrackReport:
    """Lays a run out.

    Args:
        result: What to show.
        warnings: Whether to end with the warnings.
    """

    result: TrackResult
    warnings: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Everything, top to bottom."""
        result = self.result
        yield header(result)
        if result.records:
            shown = thinned(result.records)
            remark = f"the term is {term_name(result)}"
            if len(shown) < len(result.records):
                remark = f"{len(shown)} of {count(len(result.records))}; {remark}"
            yield heading("Measurements", remark)
            yield table(result, shown)
        yield Text()
        yield grid(facts(result))
        if self.warnings and result.warnings:
            yield heading("Warnings")
            yield grid(("•", notice.message) for notice in result.warnings)


def render(result: TrackResult, *, warnings: bool = True) -> TrackReport:
    """The report of a result, for ``rich``; ``warnings=False`` leaves them to another stream."""
    return TrackReport(result, warnings=warnings)


def optimizer_name(name: str) -> str:
    """``ZO-Adam`` for ``zo-adam``."""
    family = OPTIMIZER_NAMES[name.removeprefix("zo-")]
    return f"ZO-{family}" if name.startswith("zo-") else family


def header(result: TrackResult) -> Text:
    """What was trained, and what it took."""
    name = Text(f"{result.spec or 'problem'}: {optimizer_name(result.optimizer)}", style="bold")
    facts = [
        f"{count(result.num_params)} parameters",
        counted(result.num_examples, "example"),
        f"lr {step_sizes_named(result.config['lr'])}",
        f"{result.device} {result.dtype}",
        f"{count(result.num_hvps)} HVPs",
        duration(result.seconds),
    ]
    return name + Text("\n" + " · ".join(facts), style="default")


def step_sizes_named(lr: float | str | Mapping[str, Any]) -> str:
    """Step sizes of a configuration in a few words."""
    if isinstance(lr, Mapping):
        return f"{lr['schedule']}, peak {lr['peak']:g}"
    parts = str(lr).split(",")
    if len(parts) <= MOST_STEP_SIZES:
        return ",".join(parts)
    return f"{parts[0]},…,{parts[-1]} ({len(parts)} values)"


def thinned(records: Sequence[Record], most: int = MOST_ROWS) -> list[Record]:
    """At most ``most`` of them, evenly spread, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    picked = sorted({round(index * (len(records) - 1) / (most - 1)) for index in range(most)})
    return [records[index] for index in picked]


def table(result: TrackResult, records: Sequence[Record]) -> Table:
    """One row per measurement."""
    columns = number_table("step", "loss", "η", "trace", "λ_max", "lower", "term", "upper", "η*", "η/η*")
    for record in records:
        columns.add_row(
            count(record.step),
            quantity(record.loss, digits=3),
            step_size(record.lr),
            quantity(record.trace, digits=3),
            quantity(record.lambda_max, digits=3),
            quantity(record.lower, digits=3),
            _term(record),
            quantity(record.upper, digits=3),
            step_size(record.exact),
            quantity(record.ratio, digits=2),
        )
    return columns


def _term(record: Record) -> Text:
    style = {True: "green", False: "", None: "dim"}[record.in_band]
    return Text(quantity(record.threshold, digits=3), style=style)


def term_name(result: TrackResult) -> str:
    """What the step size allows, as a formula."""
    if result.optimizer == "zo-gdm":
        return "2(1−β)/η"
    return {"gdm": "2(1+β)/η", "adam": "2(1+β₁)/((1−β₁)η)"}.get(result.optimizer, "2/η")


def _products(result: TrackResult) -> str:
    spent = [record.num_hvps for record in result.records if record.num_hvps]
    if len(spent) < 2:
        return ""
    return f" ({count(sum(spent) / len(spent))} each)"


def _band(result: TrackResult) -> str:
    term, band = term_name(result), result.band
    if band.since is None:
        return f"not reached: {term} stays above 1.1 upper"
    return (
        f"{term} within [0.9 lower, 1.1 upper] at {band.inside} of {counted(band.of, 'measurement')} since step "
        f"{count(band.since)}, where the curvature reached it"
    )


def facts(result: TrackResult) -> Iterator[tuple[str, str | Text]]:
    """How it ended and what it cost."""
    yield (
        "run",
        Text(result.status, style=STATUS_STYLES.get(result.status, "bold yellow"))
        + Text(f": {result.reason}", style="default"),
    )
    yield "band", _band(result)
    share = f"{100 * result.measuring_seconds / result.seconds:.0f} %" if result.seconds > 0 else MISSING
    per = _products(result)
    yield "measuring", f"every {count(result.every)} steps, {count(result.num_hvps)} HVPs{per}, {share} of the time"
    if result.folder is not None:
        yield "folder", str(result.folder)
