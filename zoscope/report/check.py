"""``zoscope check`` on a terminal: a table of the checks, and a paragraph for each that did not simply pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from zoscope.analysis.checking.results import CheckReport, CheckResult

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "error": "bold magenta"}


def render(report: CheckReport) -> RenderableType:
    """Table, explanations, summary."""
    parts: list[RenderableType] = [_table(report)]
    parts += [_paragraph(check) for check in report.checks if _needs_words(check)]
    parts += [_note(notice, names) for notice, names in shared_notices(report).items()]
    parts.append(_summary(report))
    return Group(*parts)


def _table(report: CheckReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("check", overflow="fold", min_width=8)
    table.add_column("optimizer", no_wrap=True)
    table.add_column("lr", justify="right", no_wrap=True)
    table.add_column("threshold [95 %]", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("passes up to", justify="right", no_wrap=True)
    for check in report.checks:
        status = Text(check.status, style=STYLES[check.status])
        value, interval, ratio = threshold_cells(check)
        threshold = Text(f"{value}\n{interval}".strip())
        table.add_row(
            Text(check.name), check.optimizer, f"{check.lr:.3g}", threshold, ratio, status, advice_cell(check)
        )
    return table


def threshold_cells(check: CheckResult) -> tuple[str, str, str]:
    """Threshold, its interval and the ratio, for a table; empty where there is none."""
    threshold = check.threshold
    if threshold is None or check.ratio is None:
        return "", "", ""
    if threshold.low == threshold.high:
        return f"{threshold.value:.3g}".replace("inf", "∞"), "", f"{check.ratio:.2f}"
    interval = f"[{threshold.low:.3g}, {threshold.high:.3g}]".replace("inf", "∞")
    return f"{threshold.value:.3g}", interval, f"{check.ratio:.2f}"


def advice_cell(check: CheckResult) -> str:
    """The largest step size that passes, in a table."""
    if check.threshold is None:
        return ""
    if check.largest_lr is None:
        return "any" if check.threshold.low == float("inf") else "none"
    return f"{check.largest_lr:g}"


def _needs_words(check: CheckResult) -> bool:
    return check.status != "pass" or check.baseline is not None or check.probe is not None


def shared_notices(report: CheckReport) -> dict[str, list[str]]:
    """Each notice once, with the names of the checks that it is about."""
    found: dict[str, list[str]] = {}
    for check in report.checks:
        for notice in check.notices:
            found.setdefault(notice, []).append(check.name)
    return found


def _note(notice: str, names: list[str]) -> RenderableType:
    return Text(f"note ({', '.join(names)}): {notice}", style="dim")


def _paragraph(check: CheckResult) -> RenderableType:
    text = Text()
    text.append(f"{check.status} ", style=STYLES[check.status])
    text.append(place(check), style="bold")
    text.append(f": {check.message}")
    if not check.details:
        return text
    return Group(text, Padding(Text(check.details.rstrip("\n"), style="dim"), (0, 0, 0, 2)))


def place(check: CheckResult) -> str:
    """Name of a check with its line in the configuration."""
    if check.file is None:
        return check.name
    return f"{check.name} ({check.file}:{check.line})" if check.line is not None else f"{check.name} ({check.file})"


def _summary(report: CheckReport) -> Text:
    counts = report.counts()
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    total = len(report.checks)
    seconds = f" in {report.seconds:.1f} s" if report.seconds else ""
    return Text(f"{total} check{'s' if total != 1 else ''}: {', '.join(parts)}{seconds}", style=STYLES[report.status])
