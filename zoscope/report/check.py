"""``zoscope check`` on a terminal, in Markdown, as GitHub annotations, JUnit XML and SARIF."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree as ET

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from zoscope.analysis.check_results import SEVERITY
from zoscope.report.answer import MOST_LINES, as_report
from zoscope.report.words import duration

if TYPE_CHECKING:
    from zoscope.analysis.check_results import CheckReport, CheckResult

MARKS = {"pass": "✅ pass", "warn": "⚠️ warn", "fail": "❌ fail", "error": "💥 error"}
HEADER = ("check", "optimizer", "lr", "threshold", "95 % interval", "ratio", "status", "passes up to")

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def markdown(report: CheckReport) -> str:
    """A table of the checks and a list of what there is to say."""
    rows = [
        (escape(c.name), c.optimizer, f"{c.lr:.3g}", *threshold_cells(c), MARKS[c.status], advice_cell(c))
        for c in report.checks
    ]
    lines = ["### zoscope check", "", _row(HEADER), _row(("---",) * len(HEADER)), *(_row(row) for row in rows), ""]
    for check in report.checks:
        if check.status != "pass" or check.baseline is not None:
            lines.append(f"- **{escape(place(check))}**: {escape(check.message)}")
    for notice, names in shared_notices(report).items():
        lines.append(f"- note ({escape(', '.join(names))}): {escape(notice)}")
    return "\n".join(lines).rstrip("\n") + "\n"


def escape(text: str) -> str:
    """Text as itself: no markup, no table cell, no line of its own."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


LEVELS = {"warn": "warning", "fail": "error", "error": "error"}


def github(report: CheckReport) -> str:
    """Annotations, one per line; nothing for a check that passes."""
    lines = [_annotation(check) for check in report.checks if check.status in LEVELS]
    return "".join(f"{line}\n" for line in lines)


def annotation(message: str, *, level: str, title: str, file: str | None, line: int | None) -> str:
    """One workflow command, with every character escaped that has a meaning in it."""
    properties = {"file": file, "line": line if file is not None else None, "title": title}
    listed = ",".join(f"{name}={_property(str(value))}" for name, value in properties.items() if value is not None)
    return f"::{level} {listed}::{_data(message)}"


def _annotation(check: CheckResult) -> str:
    title = f"zoscope: {check.name}: {check.status}"
    return annotation(check.message, level=LEVELS[check.status], title=title, file=check.file, line=check.line)


def _data(text: str) -> str:
    # the percent sign first: the other escapes contain one
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


# What XML 1.0 cannot hold even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: CheckReport) -> str:
    """One ``testcase`` per check: ``failure`` for fail, ``error`` for error, else ``system-out`` with the words."""
    counts = report.counts()
    totals = {
        "tests": str(len(report.checks)),
        "failures": str(counts["fail"]),
        "errors": str(counts["error"]),
        "time": f"{report.seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "zoscope", **totals})
    suite = ET.SubElement(
        root, "testsuite", {"name": _clean(report.config or "zoscope check"), "skipped": "0", **totals}
    )
    for check in report.checks:
        _case(suite, check)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, check: CheckResult) -> None:
    attributes = {"name": check.name, "classname": f"zoscope.{check.spec}", "time": f"{check.seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", {name: _clean(value) for name, value in attributes.items()})
    if check.status in ("fail", "error"):
        kind = "failure" if check.status == "fail" else "error"
        problem = ET.SubElement(case, kind, {"message": _clean(check.message), "type": f"zoscope.{check.status}"})
        problem.text = _clean("\n".join(_lines(check)))
    else:
        ET.SubElement(case, "system-out").text = _clean("\n".join([f"{check.status}: {check.message}", *check.notices]))


def _lines(check: CheckResult) -> list[str]:
    where = [] if check.file is None else [f"{check.file}:{check.line}" if check.line is not None else check.file]
    return [*where, check.message, *check.notices, *([check.details] if check.details else [])]


def _clean(text: str) -> str:
    return _FORBIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = (
    ("ZOS001", "UnstableStepSize", "The configured step size is above the stable range.", "error"),
    ("ZOS002", "NarrowMargin", "The configured step size is inside the safety margin of the stable range.", "warning"),
    ("ZOS003", "ThresholdDropped", "The stability threshold fell below its baseline.", "error"),
    ("ZOS004", "CheckError", "The check could not be done.", "error"),
)


def sarif(report: CheckReport) -> str:
    """The log as JSON text."""
    results = [_result(check) for check in report.checks if check.status != "pass"]
    driver = {"name": "zoscope", "version": report.version, "rules": [_rule(*rule) for rule in RULES]}
    invocation = {"executionSuccessful": all(check.status != "error" for check in report.checks)}
    run = {
        "tool": {"driver": driver},
        "invocations": [{**invocation, "exitCode": report.exit_code}],
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _rule(identifier: str, name: str, description: str, level: str) -> dict[str, Any]:
    return {
        "id": identifier,
        "name": name,
        "shortDescription": {"text": description},
        "defaultConfiguration": {"level": level},
    }


def _rule_of(check: CheckResult) -> int:
    """Index of the rule that a check breaks."""
    if check.status == "error":
        return 3
    if check.baseline is not None and check.baseline.failed:
        return 2
    return 0 if check.status == "fail" else 1


def _result(check: CheckResult) -> dict[str, Any]:
    index = _rule_of(check)
    result: dict[str, Any] = {
        "ruleId": RULES[index][0],
        "ruleIndex": index,
        "level": "warning" if check.status == "warn" else "error",
        "message": {"text": f"{check.name}: {check.message}"},
        # so that an alert is followed over commits by the name of its check, not by its line
        "partialFingerprints": {"checkName/v1": hashlib.sha256(check.name.encode(errors="replace")).hexdigest()},
        "properties": {"status": check.status, "optimizer": check.optimizer, "lr": check.lr},
    }
    location = _location(check)
    if location is not None:
        result["locations"] = [location]
    return result


def _location(check: CheckResult) -> dict[str, Any] | None:
    """The line of the configuration, or the first of the spec where there is no configuration."""
    file, line = check.file, check.line
    if file is None:
        found = re.match(r"(.+\.py)(?::|$)", check.spec)
        if found is None:
            return None
        file, line = found[1], None
    place = {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": line or 1}}
    return {"physicalLocation": place}


def _uri(file: str) -> str:
    path = PurePath(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix(), errors="replace")


LONGEST_NAME = 24
"""Columns of the name of a check in the answer."""

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "error": "bold magenta"}


def answer(result: CheckReport, width: int) -> Iterator[RenderableType]:
    """A line on all checks and one for each, the worst first; errors have all of their words where there is room."""
    yield _summary(result)
    room = MOST_LINES - 1 - bool(result.warnings)
    worst = sorted(result.checks, key=lambda check: -SEVERITY.index(check.status))
    shown = worst
    if any(check.status == "error" for check in worst):
        shown = [check for check in worst if check.status != "pass"]
    if len(shown) > room or len(shown) < len(worst):
        shown = shown[: room - 1]
    yield _lines_of(shown, width=width, room=room)
    rest = [check.status for check in worst[len(shown) :]]
    if rest:
        counts = ", ".join(f"{rest.count(status)} {status}" for status in dict.fromkeys(rest))
        yield Text(f"+{len(rest)} more: {counts}")


def _lines_of(checks: list[CheckResult], *, width: int, room: int) -> Table:
    names = min(max((len(check.name) for check in checks), default=0), LONGEST_NAME)
    optimizers = max((len(check.optimizer) for check in checks), default=0)
    statuses = max(map(len, STYLES))
    table = Table.grid(padding=(0, 2, 0, 0))
    for size in (statuses, names, optimizers):
        table.add_column(no_wrap=True, width=size, overflow="ellipsis")
    table.add_column(overflow="fold")
    wrap = len(checks) <= room // 2
    for check in checks:
        sentence = _sentence(check)
        if not wrap:
            sentence.truncate(max(width - statuses - names - optimizers - 6, 10), overflow="ellipsis")
        table.add_row(Text(check.status, style=STYLES[check.status]), Text(check.name), check.optimizer, sentence)
    return table


def _sentence(check: CheckResult) -> Text:
    """What a line says of a check."""
    if check.threshold is None:
        return Text(" ".join(check.message.split()))
    if check.ratio is None or math.isinf(check.threshold.value):
        return Text(f"lr {check.lr:g}; nothing limits the step size here")
    text = f"lr {check.lr:g} is {check.ratio:.2g} × threshold {check.threshold.value:.3g}"
    if check.status != "pass":
        text += ", none passes" if check.largest_lr is None else f", ≤ {check.largest_lr:g} passes"
        if check.baseline is not None and check.baseline.failed:
            text += f". {check.baseline.message}"
    return Text(text)


def details(result: CheckReport, width: int) -> Iterator[RenderableType]:
    """Table, explanations, notices."""
    yield _table(result)
    yield from (_paragraph(check) for check in result.checks if _needs_words(check))
    yield from (_note(notice, names) for notice, names in shared_notices(result).items())


render = as_report(answer, details)


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
    parts = [f"{count} {status}" for status, count in report.counts().items() if count]
    total = len(report.checks)
    seconds = f" in {duration(report.seconds)}" if report.seconds else ""
    return Text(f"{total} check{'s' if total != 1 else ''}: {', '.join(parts)}{seconds}", style=STYLES[report.status])
