"""``zoscope check``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import zoscope
from zoscope.cli.options import Given, OutputOptions, takes_options
from zoscope.cli.output import (
    as_json,
    as_text,
    check_writable,
    illustrate,
    measuring,
    remember,
    say,
    show,
    warn,
    write_whole,
)
from zoscope.cli.validate import checked, choice
from zoscope.errors import UsageError
from zoscope.files import resolved
from zoscope.options import FORMATS, OPTIONS
from zoscope.text import clean, clean_json

if TYPE_CHECKING:
    from zoscope.analysis.check import Baseline
    from zoscope.analysis.check_results import CheckReport
    from zoscope.config.sources import ConfigError

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
        if any(resolved(target.file) == resolved(other.file) for other in found):
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
    plain: dict[str, Callable[[CheckReport], str]] = {
        "text": lambda report: as_text(report.report(verbose=True)),
        "json": as_json,
    }
    if name in plain:
        return plain[name]
    # Each in a module of its name, with an XML library behind one of them: loaded when it is used.
    writer: Callable[[CheckReport], str] = getattr(import_module("zoscope.report.check"), name)
    mend = clean_json if name == "sarif" else clean
    return lambda report: mend(writer(report))


def repository_path(file: str | None) -> str | None:
    """A path as GitHub wants it: relative to the root of the repository, even when a job runs in a folder of it."""
    workspace = os.environ.get(WORKSPACE_VARIABLE)
    if not workspace or file is None or not resolved(Path(file)).is_relative_to(resolved(Path(workspace))):
        return file
    return resolved(Path(file)).relative_to(resolved(Path(workspace))).as_posix()


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for whoever may read a pipe one day."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _append_summary(text: str) -> None:
    """GitHub concatenates the summaries of a job's steps in this file: it is appended to, never replaced."""
    file = os.environ.get(SUMMARY_VARIABLE)
    if not file:
        return
    try:
        with open(file, "a", encoding="utf-8", opener=_at_once) as summary:
            summary.write(f"{text}\n")
    except OSError as error:
        raise UsageError(f"{SUMMARY_VARIABLE}: cannot append to {file} ({error.strerror}).") from None


@takes_options("check")
def command(given: Given) -> None:
    """CI gate: is each configured step size inside the stable range?

    Exits 0 when all checks pass or warn, 1 when one fails, 3 when one could not be measured, 2 when a spec or the
    configuration is wrong; of several the worst, in the order 2 > 3 > 1 > 0. Every check runs.
    """
    if given.schema:
        from zoscope.config.keys import schema_text

        say(schema_text())
        return
    from zoscope.config.sources import ConfigError  # late, for a fast --help

    shown = _format(given.format, given.json)
    files = targets(given.output or [], default=shown)
    replaced = _replaced(given.baseline) if given.update_baseline else None
    options = _overrides(given)
    progress = measuring(max_hvps=options.get("max_hvps", 600), rtol=options.get("rtol", 0.02), quiet=given.quiet)
    try:
        with progress as on_progress:
            report = zoscope.check(
                given.config,
                only=given.only or (),
                hf_args=given.hf_args,
                baseline=None if given.update_baseline else given.baseline,
                max_drop=fraction(given.max_drop),
                cache=given.cache,
                on_progress=on_progress,
                **options,
            )
    except ConfigError as error:
        _annotate(error, shown, files)
        raise
    write_all(report, files)
    illustrate(report, given)
    if given.baseline is not None and given.update_baseline:
        from zoscope.analysis.check import baseline_document

        document = baseline_document(report, earlier=replaced, keep_absent=bool(given.only))
        write_whole(given.baseline, json.dumps(document, indent=2, allow_nan=False) + "\n", option="--baseline")
    if shown == "text":
        used = show(report.report(verbose=given.verbose, warnings=False))
        if not given.verbose:  # there each notice stands by its checks
            warn(report.warnings, OutputOptions(quiet=given.quiet), used=used)
    else:
        say(formatted(report, shown))
    from zoscope.result import encode  # late: it takes numpy

    remember(json.dumps({**report.to_dict(), "warnings": encode(report.warnings)}))
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _overrides(given: Given) -> dict[str, Any]:
    """What overrides every check of the configuration, or makes up one check without a file."""
    options = given.overrides()
    for name in ("betas", "max_memory"):  # texts here, and other values in a file
        if name in options:
            options[name] = checked(OPTIONS[name], options[name])
    if "settings" in options:
        from zoscope.spec import parse_settings

        options["settings"] = parse_settings(options["settings"])
    return options


def _format(given: str | None, as_json: bool) -> str:
    if as_json and given not in (None, "json"):
        raise UsageError(f"--json and --format {given} contradict each other. Use one, and --output FORMAT=FILE too.")
    return "json" if as_json else choice("--format", given or "text", FORMATS)


def _replaced(file: Path | None) -> Baseline | None:
    """The baseline that will be replaced; a file that is none is not overwritten, and that is known before the work."""
    if file is None:
        raise UsageError("--update-baseline needs --baseline FILE, the file to write.")
    check_writable(file)
    from zoscope.analysis.check import load_baseline

    return load_baseline(file) if file.is_file() else None


def fraction(text: str) -> float:
    """``20%`` or ``0.2``, strictly between 0 and 1."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100.0 if text.strip().endswith("%") else 1.0)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UsageError(f"--max-drop: got '{text}'. Expected a fraction such as 20% or 0.2.")
    return value


def _annotate(error: ConfigError, shown: str, files: list[Target]) -> None:
    """A broken configuration is annotated too: it is what a pull request most often breaks."""
    from zoscope.report.check import annotation

    file = repository_path(error.file)
    lines = [
        annotation(issue.message, level="error", title="zoscope: configuration", file=file, line=issue.line)
        for issue in error.issues
    ]
    text = clean("".join(f"{line}\n" for line in lines))
    for target in files:
        if target.format == "github":
            write_whole(target.file, text)
    if shown == "github":
        say(text)
