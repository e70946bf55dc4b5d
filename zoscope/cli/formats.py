"""Formats of a check report, and where each one goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from zoscope.cli.output import as_json, as_text, check_writable, write_whole
from zoscope.cli.validate import choice
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.checking.results import CheckReport

FORMATS = ("text", "json", "junit", "github", "sarif", "markdown")
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
WORKSPACE_VARIABLE = "GITHUB_WORKSPACE"
FROM_REPOSITORY = ("github", "sarif")
"""Formats whose paths are read by someone who knows the repository and not the working folder."""


@dataclass(frozen=True)
class Target:
    """A file and the format that goes into it."""

    format: str
    file: Path


def targets(outputs: Sequence[str], *, default: str) -> list[Target]:
    """``--output FORMAT=FILE``, or ``FILE`` alone in the format of stdout; every file is known to be writable.

    Raises:
        UsageError: For an unknown format, a file that cannot be written, or one that is named twice.
    """
    found: list[Target] = []
    for item in outputs:
        name, equals, file = item.partition("=")
        if not equals:
            name, file = default, item
        if not file:
            raise UsageError(f"--output: got '{item}'. Expected FORMAT=FILE, such as junit=zoscope.xml.")
        target = Target(choice("--output", name, FORMATS), Path(file))
        if any(target.file.resolve() == other.file.resolve() for other in found):
            raise UsageError(f"--output: {file} is named twice. Expected one file per format.")
        check_writable(target.file)
        found.append(target)
    return found


def write_all(report: CheckReport, files: Sequence[Target]) -> None:
    """Write every file, whole or not at all, and the job summary where GitHub asks for one."""
    for target in files:
        write_whole(target.file, formatted(report, target.format))
    _append_summary(_writer("markdown")(report))


def formatted(report: CheckReport, name: str) -> str:
    """A report in one of the formats."""
    if name in FROM_REPOSITORY:
        checks = tuple(replace(check, file=repository_path(check.file)) for check in report.checks)
        report = replace(report, checks=checks)
    return _writer(name)(report)


def _writer(name: str) -> Callable[[CheckReport], str]:
    plain: dict[str, Callable[[CheckReport], str]] = {"text": as_text, "json": as_json}
    if name in plain:
        return plain[name]
    # Each in a module of its name, with an XML library behind one of them: loaded when it is used.
    writer: Callable[[CheckReport], str] = getattr(import_module(f"zoscope.report.{name}"), name)
    return writer


def repository_path(file: str | None) -> str | None:
    """A path as GitHub wants it: relative to the root of the repository, even when a job runs in a folder of it."""
    workspace = os.environ.get(WORKSPACE_VARIABLE)
    if not workspace or file is None or not Path(file).resolve().is_relative_to(Path(workspace).resolve()):
        return file
    return Path(file).resolve().relative_to(Path(workspace).resolve()).as_posix()


def _append_summary(text: str) -> None:
    """GitHub concatenates the summaries of a job's steps in this file: it is appended to, never replaced."""
    file = os.environ.get(SUMMARY_VARIABLE)
    if not file:
        return
    try:
        with open(file, "a", encoding="utf-8") as summary:
            summary.write(f"{text}\n")
    except OSError as error:
        raise UsageError(f"{SUMMARY_VARIABLE}: cannot append to {file} ({error.strerror}).") from None
