"""``zoscope check``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import zoscope
from zoscope.cli.check_options import OverrideOptions
from zoscope.cli.flatten import flatten
from zoscope.cli.formats import FORMATS, Target, formatted, repository_path, targets, write_all
from zoscope.cli.options import Quiet
from zoscope.cli.output import PipeConsole, check_writable, write_whole
from zoscope.cli.progress import measuring
from zoscope.cli.validate import choice
from zoscope.config.located import ConfigError
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.checking.baseline import Baseline

Config = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG",
        help="zoscope.yaml, or a pyproject.toml with \\[tool.zoscope]. Left out: that of this folder, unless --spec.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="Only the check of this name; repeatable.")
]
HfArgs = Annotated[
    Path | None,
    typer.Option("--hf-args", metavar="FILE", help="TrainingArguments, JSON or YAML, that override the configuration."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar=" | ".join(FORMATS), help="Format of stdout.", rich_help_panel="Output"),
]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.", rich_help_panel="Output")]
Output = Annotated[
    list[str] | None,
    typer.Option(metavar="FORMAT=FILE", help="Write this format to FILE too; repeatable.", rich_help_panel="Output"),
]
Schema = Annotated[
    bool,
    typer.Option("--schema", help="Print the JSON Schema of the configuration and exit.", rich_help_panel="Output"),
]
BaselineFile = Annotated[
    Path | None,
    typer.Option(
        "--baseline", metavar="FILE", help="Earlier thresholds to compare with.", rich_help_panel="Baseline and cache"
    ),
]
MaxDrop = Annotated[
    str,
    typer.Option("--max-drop", help="Largest fall of a threshold allowed.", rich_help_panel="Baseline and cache"),
]
UpdateBaseline = Annotated[
    bool,
    typer.Option("--update-baseline", help="Write --baseline instead.", rich_help_panel="Baseline and cache"),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Keep measurements here.", rich_help_panel="Baseline and cache"),
]


@flatten
def command(
    overrides: OverrideOptions,
    config: Config = None,
    only: Only = None,
    hf_args: HfArgs = None,
    format: Format = None,
    json_output: Json = False,
    output: Output = None,
    schema: Schema = False,
    baseline: BaselineFile = None,
    max_drop: MaxDrop = "20%",
    update_baseline: UpdateBaseline = False,
    cache: CacheFolder = None,
    quiet: Quiet = False,
) -> None:
    """CI gate: is each configured step size inside the stable range?

    Exits 0 when all checks pass or warn, 1 when one fails, 3 when one could not be measured, 2 when a spec or the
    configuration is wrong; of several the worst, in the order 2 > 3 > 1 > 0. Every check runs.
    """
    if schema:
        from zoscope.config.schema import schema_text

        sys.stdout.write(schema_text())
        return
    shown = _format(format, json_output)
    files = targets(output or [], default=shown)
    replaced = _replaced(baseline) if update_baseline else None
    given = overrides.given()
    try:
        with measuring(max_hvps=given.get("max_hvps", 600), rtol=given.get("rtol", 0.02), quiet=quiet) as on_progress:
            report = zoscope.check(
                config,
                only=only or (),
                hf_args=hf_args,
                baseline=None if update_baseline else baseline,
                max_drop=fraction(max_drop),
                cache=cache,
                on_progress=on_progress,
                **given,
            )
    except ConfigError as error:
        _annotate(error, shown, files)
        raise
    write_all(report, files)
    if baseline is not None and update_baseline:
        from zoscope.analysis.checking.baseline import baseline_document

        document = baseline_document(report, earlier=replaced, keep_absent=bool(only))
        write_whole(baseline, json.dumps(document, indent=2, allow_nan=False) + "\n", option="--baseline")
    if shown == "text":
        PipeConsole().print(report)
    else:
        sys.stdout.write(formatted(report, shown))
    sys.stdout.flush()
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _format(given: str | None, as_json: bool) -> str:
    if as_json and given not in (None, "json"):
        raise UsageError(f"--json and --format {given} contradict each other. Use one, and --output FORMAT=FILE too.")
    return "json" if as_json else choice("--format", given or "text", FORMATS)


def _replaced(file: Path | None) -> Baseline | None:
    """The baseline that will be replaced; a file that is none is not overwritten, and that is known before the work."""
    if file is None:
        raise UsageError("--update-baseline needs --baseline FILE, the file to write.")
    check_writable(file)
    from zoscope.analysis.checking.baseline import load_baseline

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
    from zoscope.report.github import annotation

    file = repository_path(error.file)
    lines = [
        annotation(issue.message, level="error", title="zoscope: configuration", file=file, line=issue.line)
        for issue in error.issues
    ]
    text = "".join(f"{line}\n" for line in lines)
    for target in files:
        if target.format == "github":
            write_whole(target.file, text)
    if shown == "github":
        sys.stdout.write(text)
        sys.stdout.flush()
