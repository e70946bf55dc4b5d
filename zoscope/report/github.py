"""GitHub workflow commands: an annotation at the line of the configuration for each check that does not pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoscope.analysis.checking.results import CheckReport, CheckResult

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
