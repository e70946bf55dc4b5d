"""Options of ``zoscope check``. All default to "not given": what is not said here is left to the configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

import zoscope
from zoscope.cli import validate
from zoscope.cli.options import CURVATURES, DIRECTIONS, DTYPES, HVPS, METHODS, OPTIMIZERS, THRESHOLDS, Quiet, flatten
from zoscope.cli.output import PipeConsole, as_json, as_text, check_writable, measuring, write_whole
from zoscope.cli.validate import choice
from zoscope.config.sources import ConfigError
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.check import Baseline
    from zoscope.analysis.check_results import CheckReport

ON_WARN = ("pass", "fail")


def _option(*names: str, panel: str, help: str, metavar: str | None = None) -> Any:
    return Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True)
class OverrideOptions:
    """What overrides every check of the configuration, or makes up one check without a file."""

    spec: Annotated[
        str | None, _option("--spec", metavar="SPEC", panel="Check", help="Check this spec, without a file.")
    ] = None
    settings: Annotated[
        list[str] | None,
        _option("--set", metavar="KEY=VALUE", panel="Check", help="Argument for the spec's callable; repeatable."),
    ] = None
    checkpoint: Annotated[
        Path | None, _option("--checkpoint", metavar="FILE", panel="Check", help="Weights to load first.")
    ] = None
    params: Annotated[
        str | None, _option("--params", metavar="REGEX", panel="Check", help="Only parameters whose name matches.")
    ] = None
    optimizer: Annotated[
        str | None, _option("--optimizer", metavar=" | ".join(OPTIMIZERS), panel="Check", help="Optimizer.")
    ] = None
    lr: Annotated[float | None, _option("--lr", metavar="LR", panel="Check", help="Step size to check.")] = None
    steps: Annotated[
        int | None, _option("--steps", metavar="N", panel="Check", help="Training steps planned: the horizon.")
    ] = None
    beta: Annotated[float | None, _option("--beta", panel="Check", help="Momentum of GDM.")] = None
    betas: Annotated[str | None, _option("--betas", metavar="B1,B2", panel="Check", help="Adam's coefficients.")] = None
    eps: Annotated[float | None, _option("--eps", panel="Check", help="ε of Adam.")] = None
    preconditioner: Annotated[
        str | None,
        _option("--preconditioner", metavar="expected|state:FILE", panel="Check", help="Adam's preconditioner."),
    ] = None
    directions: Annotated[
        str | None,
        _option("--directions", metavar=" | ".join(DIRECTIONS), panel="Check", help="Law of the directions."),
    ] = None
    queries: Annotated[
        int | None, _option("--queries", metavar="Q", panel="Check", help="Two-point queries averaged per step.")
    ] = None
    mu: Annotated[float | None, _option("--mu", panel="Check", help="Perturbation scale of the estimate.")] = None
    batch_size: Annotated[
        int | None, _option("--batch-size", metavar="B", panel="Check", help="Examples per step of training.")
    ] = None
    threshold: Annotated[
        str | None,
        _option("--threshold", metavar=" | ".join(THRESHOLDS), panel="Policy", help="Threshold of zo- optimizers."),
    ] = None
    margin: Annotated[
        float | None,
        _option("--margin", panel="Policy", help="Pass when lr <= margin × lower end of the 95 % interval (0.8)."),
    ] = None
    on_warn: Annotated[
        str | None,
        _option("--on-warn", metavar=" | ".join(ON_WARN), panel="Policy", help="What an lr in between does."),
    ] = None
    probe: Annotated[
        bool | None, Option("--probe/--no-probe", help="Add a short training probe.", rich_help_panel="Policy")
    ] = None
    rtol: Annotated[float | None, _option("--rtol", panel="Measurement", help="Relative 95 % half-width wanted.")] = (
        None
    )
    max_hvps: Annotated[
        int | None, _option("--max-hvps", panel="Measurement", help="Most Hessian-vector products per operator.")
    ] = None
    curvature: Annotated[
        str | None, _option("--curvature", metavar=" | ".join(CURVATURES), panel="Measurement", help="Which matrix.")
    ] = None
    method: Annotated[
        str | None, _option("--method", metavar=" | ".join(METHODS), panel="Measurement", help="How it is measured.")
    ] = None
    hvp: Annotated[
        str | None, _option("--hvp", metavar=" | ".join(HVPS), panel="Measurement", help="How products are computed.")
    ] = None
    device: Annotated[
        str | None, _option("--device", metavar="auto|cpu|cuda[:i]", panel="Measurement", help="Where to compute.")
    ] = None
    dtype: Annotated[
        str | None, _option("--dtype", metavar=" | ".join(DTYPES), panel="Measurement", help="Floating-point type.")
    ] = None
    seed: Annotated[int | None, _option("--seed", panel="Measurement", help="Seed of the probe vectors.")] = None
    micro_batch: Annotated[
        int | None, _option("--micro-batch", metavar="N", panel="Measurement", help="Examples per forward pass.")
    ] = None
    max_memory: Annotated[
        str | None,
        _option(
            "--max-memory", metavar="SIZE", panel="Measurement", help="Most memory that this process may hold, as 2GB."
        ),
    ] = None
    shard_basis: Annotated[
        bool | None,
        Option(
            "--shard-basis/--no-shard-basis",
            help="With torchrun: spread the Lanczos vectors over the processes.",
            rich_help_panel="Measurement",
        ),
    ] = None
    strict: Annotated[
        bool | None,
        Option("--strict/--no-strict", help="Error when --rtol is not reached.", rich_help_panel="Measurement"),
    ] = None

    def given(self) -> dict[str, Any]:
        """Options that were given, as keyword arguments of ``zoscope.check``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        if self.betas is not None:
            given["betas"] = validate.pair("--betas", self.betas)
        if self.max_memory is not None:
            given["max_memory"] = validate.size("--max-memory", self.max_memory)
        if self.settings is not None:
            from zoscope.spec import parse_settings

            given["settings"] = parse_settings(self.settings)
        return given


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
    writer: Callable[[CheckReport], str] = getattr(import_module("zoscope.report.check"), name)
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
        from zoscope.config.keys import schema_text

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
        from zoscope.analysis.check import baseline_document

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
    text = "".join(f"{line}\n" for line in lines)
    for target in files:
        if target.format == "github":
            write_whole(target.file, text)
    if shown == "github":
        sys.stdout.write(text)
        sys.stdout.flush()
