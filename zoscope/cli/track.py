"""The options of ``zoscope track``: a table of what a configuration file may say, too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import Argument, Option

from zoscope.cli.options import CURVATURES, DIRECTIONS, DTYPES, HVPS, METHODS, OPTIMIZERS, OutputOptions, flatten
from zoscope.cli.output import about, aside, check_picture, emit, loading, visible, warn
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.track import Comparison
    from zoscope.analysis.track_loop import Observer
    from zoscope.analysis.track_results import TrackResult

TRAINING, MEASURING, FOLDER, PROBLEM = "Training", "Measurement", "Run folder", "Problem"


def _option(*names: str, panel: str, help: str, default: str | None = None, metavar: str | None = None) -> Any:
    """An option that is ``None`` unless it was given: the configuration file may say it, too."""
    if default is not None:  # Typer would put a text of ours in parentheses
        help += f" [dim]\\[default: {default}][/]"
    return Option(*names, help=help, rich_help_panel=panel, show_default=False, metavar=metavar)


@dataclass(frozen=True)
class RunOptions:
    """Every option of a run; ``None`` where it was not given. Names are those of the configuration file."""

    spec: Annotated[
        list[str] | None,
        Argument(
            metavar="SPEC",
            help="path/to/model.py, path/to/model.py:name or package.module:name; with --compare folders of runs.",
            show_default=False,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        _option(
            "--set", panel=PROBLEM, help="Keyword argument for the spec's callable; repeatable.", metavar="KEY=VALUE"
        ),
    ] = None
    params: Annotated[
        str | None, _option("--params", panel=PROBLEM, help="Only parameters whose name matches.", metavar="REGEX")
    ] = None
    checkpoint: Annotated[
        str | None, _option("--checkpoint", panel=PROBLEM, help="Weights to start from.", metavar="FILE")
    ] = None
    optimizer: Annotated[
        str | None,
        _option("--optimizer", panel=TRAINING, help="Optimizer.", default="zo-gd", metavar=" | ".join(OPTIMIZERS)),
    ] = None
    lr: Annotated[
        str | None,
        _option(
            "--lr",
            panel=TRAINING,
            help="Step size: a number, or 0.001,20000:0.007 for 0.007 from step 20,000 on. Schedules: in --config.",
            metavar="LR",
        ),
    ] = None
    steps: Annotated[int | None, _option("--steps", panel=TRAINING, help="Steps to train.", default="1000")] = None
    batch_size: Annotated[
        int | None,
        _option(
            "--batch-size",
            panel=TRAINING,
            help="Examples per step, without replacement in each epoch (default: all).",
            metavar="B",
        ),
    ] = None
    mu: Annotated[float | None, _option("--mu", panel=TRAINING, help="Smoothing radius μ.", default="1e-3")] = None
    queries: Annotated[
        int | None, _option("--queries", panel=TRAINING, help="Queries averaged per step.", default="1", metavar="Q")
    ] = None
    directions: Annotated[
        str | None,
        _option(
            "--directions",
            panel=TRAINING,
            help="Law of the directions.",
            default="gaussian",
            metavar=" | ".join(DIRECTIONS),
        ),
    ] = None
    beta: Annotated[float | None, _option("--beta", panel=TRAINING, help="Momentum of GDM.", default="0.9")] = None
    betas: Annotated[
        str | None,
        _option("--betas", panel=TRAINING, help="Both coefficients of Adam.", default="0.9,0.999", metavar="B1,B2"),
    ] = None
    eps: Annotated[float | None, _option("--eps", panel=TRAINING, help="ε of Adam.", default="1e-8")] = None
    target_loss: Annotated[
        float | None, _option("--target-loss", panel=TRAINING, help="Stop at this loss.", metavar="LOSS")
    ] = None
    divergence: Annotated[
        float | None,
        _option("--divergence", panel=TRAINING, help="Stop at this multiple of the first loss.", default="1e6"),
    ] = None
    max_seconds: Annotated[
        float | None, _option("--max-seconds", panel=TRAINING, help="Stop after so long; --resume goes on.")
    ] = None
    seed: Annotated[
        int | None, _option("--seed", panel=TRAINING, help="Seed of every random number drawn.", default="0")
    ] = None
    every: Annotated[
        str | None,
        _option(
            "--every",
            panel=MEASURING,
            help="Steps between measurements; auto spends a fifth of all passes on them, adaptive measures more often "
            "while lr / threshold moves.",
            default="auto",
            metavar="auto|adaptive|K",
        ),
    ] = None
    rtol: Annotated[
        float | None,
        _option(
            "--rtol", panel=MEASURING, help="Relative 95 % half-width wanted of every measurement.", default="0.05"
        ),
    ] = None
    max_hvps: Annotated[
        int | None,
        _option("--max-hvps", panel=MEASURING, help="Most Hessian-vector products of a measurement.", default="150"),
    ] = None
    method: Annotated[
        str | None,
        _option(
            "--method",
            panel=MEASURING,
            help="Dense eigenvalues or quadrature.",
            default="auto",
            metavar=" | ".join(METHODS),
        ),
    ] = None
    curvature: Annotated[
        str | None,
        _option(
            "--curvature",
            panel=MEASURING,
            help="Hessian or Gauss-Newton matrix.",
            default="hessian",
            metavar=" | ".join(CURVATURES[:2]),
        ),
    ] = None
    hvp: Annotated[
        str | None,
        _option("--hvp", panel=MEASURING, help="How products are computed.", default="auto", metavar=" | ".join(HVPS)),
    ] = None
    device: Annotated[
        str | None,
        _option("--device", panel=MEASURING, help="Where to compute.", default="auto", metavar="auto|cpu|cuda[:i]"),
    ] = None
    dtype: Annotated[
        str | None,
        _option("--dtype", panel=MEASURING, help="Floating-point type.", default="auto", metavar=" | ".join(DTYPES)),
    ] = None
    micro_batch: Annotated[
        int | None, _option("--micro-batch", panel=MEASURING, help="Examples per pass.", metavar="N")
    ] = None
    max_memory: Annotated[
        str | None,
        _option(
            "--max-memory", panel=MEASURING, help="Most memory that this process may hold, as 2GB.", metavar="SIZE"
        ),
    ] = None
    shard_basis: Annotated[
        bool | None,
        _option("--shard-basis", panel=MEASURING, help="With torchrun: spread the Lanczos vectors over the processes."),
    ] = None
    strict: Annotated[
        bool | None,
        _option("--strict", panel=MEASURING, help="Exit 3 when a measurement did not reach the precision of --rtol."),
    ] = None
    forward_every: Annotated[
        int | None,
        _option(
            "--forward-every",
            panel=MEASURING,
            help="Also estimate trace and threshold from the steps' own loss values, with one more every K steps.",
            metavar="K",
        ),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        _option(
            "--checkpoint-every",
            panel=FOLDER,
            help="Steps between checkpoints, besides those at measurements.",
            metavar="K",
        ),
    ] = None
    run: Annotated[
        str | None,
        _option(
            "--run",
            "--output-dir",
            panel=FOLDER,
            help="Folder of the run (default: runs/SPEC-OPTIMIZER). Under torchrun say --output-dir: it claims --run.",
            metavar="DIR",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was given, checked by the table that checks the configuration file."""
        from zoscope.config.training import read_track_option

        found: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None or entry.name in ("spec", "settings"):
                continue
            found[entry.name] = read_track_option(entry.name, _parsed(entry.name, value))
        if self.spec:
            found["spec"] = self._one_spec(self.spec)
        if "checkpoint" in found:
            found["checkpoint"] = str(Path.cwd() / found["checkpoint"])
        if self.settings:
            from zoscope.spec.which import parse_settings

            found["set"] = parse_settings(self.settings)
        return found

    @staticmethod
    def _one_spec(words: list[str]) -> str:
        from zoscope.config.load import absolute_spec
        from zoscope.config.training import read_track_option

        if len(words) > 1:
            raise UsageError(
                f"SPEC: got {len(words)} of them, {' and '.join(words[:2])}. Expected one; folders of runs are "
                "compared with --compare."
            )
        return absolute_spec(read_track_option("spec", words[0]), Path.cwd())


def _parsed(name: str, value: Any) -> Any:
    """Text of the command line as a configuration file would hold it."""
    if name == "every" and value.isdecimal():
        return int(value)
    if name == "max_memory" and value.isdecimal():
        return int(value)
    if name == "betas":
        return [_number(part) for part in value.split(",")]
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class FolderOptions:
    """Where the options come from and what happens to a run that is there."""

    config: Annotated[
        Path | None,
        _option(
            "--config", panel=FOLDER, help="YAML file with options of the run; the command line wins.", metavar="FILE"
        ),
    ] = None
    resume: Annotated[
        Path | None,
        _option("--resume", panel=FOLDER, help="Go on with the run in this folder.", metavar="DIR"),
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the run that is in the folder.", rich_help_panel=FOLDER)
    ] = False
    sweep: Annotated[
        list[str] | None,
        _option(
            "--sweep",
            panel=FOLDER,
            help="One run for every value of an option, such as beta=0,0.5,0.9 or set.width=16,32; values that hold "
            "commas are separated by ';'. Repeatable: every combination.",
            metavar="KEY=V1,V2",
        ),
    ] = None
    plot: Annotated[
        Path | None,
        _option(
            "--plot",
            panel=FOLDER,
            help="Also write the picture here; of several runs one over another. A run's own folder has it anyway.",
            metavar="FILE",
        ),
    ] = None
    tensorboard: Annotated[
        bool,
        Option("--tensorboard", help="Also write TensorBoard scalars into the folder.", rich_help_panel=FOLDER),
    ] = False
    compare: Annotated[
        bool,
        Option("--compare", help="Compare the runs in the folders given instead of SPEC.", rich_help_panel=FOLDER),
    ] = False


EXIT_FAILED = 3
ANEW = ("max_seconds", "max_memory", "shard_basis", "strict")  # options of a session, not of the run
Values = dict[str, Any]


@flatten
def command(run: RunOptions, place: FolderOptions, output: OutputOptions) -> None:
    """Train, and follow trace, λ_max, the band and the threshold on the way; resumable."""
    if place.plot is not None:
        check_picture(place.plot)
    if place.compare:
        _compare(run, place, output)
        return
    given = run.given()
    values, folder = _fresh(given, place) if place.resume is None else _resumed(given, place)
    if "sweep" in values:
        _sweep(values, folder, place, output)
        return
    if place.resume is None and not place.overwrite:
        _refuse_occupied(folder)  # before the spec loads, which may take a while
    from zoscope.analysis.track_results import TrackInterruptedError
    from zoscope.report.track import render  # late, for a fast --help

    interrupted = False
    try:
        result = _tracked(values, folder, place, output, resume=place.resume is not None, overwrite=place.overwrite)
    except TrackInterruptedError as error:
        result, interrupted = error.result, True
    if place.plot is not None:
        from zoscope.report.track import draw

        draw(result, [place.plot])
    emit(result, output, shown=render(result, warnings=False))
    warn(result.warnings, quiet=output.quiet)
    if interrupted:
        _say_interrupted(folder)
    if result.status == "diverged":
        raise typer.Exit(EXIT_FAILED)
    if values.get("strict"):  # after the result, which is honest all the same
        _require_precision(result)


def _require_precision(result: TrackResult) -> None:
    from zoscope.analysis.track import require_precision  # late, for a fast --help

    require_precision(result)


def _refuse_occupied(folder: Path) -> None:
    from zoscope.analysis.track_folder import RunFolder

    if RunFolder(folder).has_run:
        raise UsageError(
            f"--run {folder}: there is a run in this folder. Go on with it: zoscope track --resume {folder}. Or "
            "replace it with --overwrite, or name another folder."
        )


def _say_interrupted(folder: Path) -> None:
    from zoscope.cli.app import EXIT_INTERRUPTED, complain

    complain(f"Interrupted; what was done is kept. Go on with: zoscope track --resume {folder}", label="")
    raise typer.Exit(EXIT_INTERRUPTED)


# --- options ----------------------------------------------------------------------------------------------------------


def _fresh(given: Values, place: FolderOptions) -> tuple[Values, Path]:
    """The options of a new run: those of the file, and over them those of the command line."""
    from zoscope.config.load import absolute_spec
    from zoscope.config.training import read_sweep, read_track_config
    from zoscope.spec import resolve_spec

    values = _merged({} if place.config is None else read_track_config(place.config), given)
    if place.sweep:
        values["sweep"] = read_sweep(place.sweep)
    if "spec" not in values:
        values["spec"] = absolute_spec(resolve_spec(None, cwd=Path.cwd())[0], Path.cwd())
    if "lr" not in values and "lr" not in values.get("sweep", {}):
        raise UsageError("--lr is missing: track trains with a step size. 'zoscope bounds' recommends one.")
    name = f"{Path(values['spec'].partition('.py')[0]).name}-{values.get('optimizer', 'zo-gd')}"
    return values, Path(values.pop("run", Path("runs") / name))


def _resumed(given: Values, place: FolderOptions) -> tuple[Values, Path]:
    """The options of a run that goes on: those that it began with."""
    from zoscope.analysis.track_folder import CONFIG, RunFolder
    from zoscope.config.training import read_track_config

    folder = place.resume
    assert folder is not None
    others = [f"--{name.replace('_', '-')}" if name != "spec" else "SPEC" for name in given if name not in ANEW]
    others += (
        ["--config"] * (place.config is not None) + ["--overwrite"] * place.overwrite + ["--sweep"] * bool(place.sweep)
    )
    if others:
        raise UsageError(
            f"--resume {folder} goes on with the options that the run began with, and {others[0]} was given. Leave it "
            "out; only --max-seconds, --max-memory, --shard-basis and --strict may be given anew."
        )
    RunFolder(folder).read_config()  # says what is missing where this is no folder of a run
    return {**read_track_config(folder / CONFIG), **given}, folder


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    both = {**below.get("set", {}), **above.get("set", {})}
    merged = {**below, **above}
    return {**merged, "set": both} if both else merged


def _relative(origin: Mapping[str, Any], folder: Path) -> Values:
    """Paths as ``config.yaml`` holds them: relative to it, so that runs and specs can move together."""

    def relative(path: str) -> str:
        return os.path.relpath(path, folder.resolve()) if os.path.isabs(path) else path

    return {**origin, **{key: relative(origin[key]) for key in ("spec", "checkpoint") if key in origin}}


# --- one run ----------------------------------------------------------------------------------------------------------


def _tracked(
    values: Mapping[str, Any],
    folder: Path,
    place: FolderOptions,
    output: OutputOptions,
    *,
    resume: bool,
    overwrite: bool,
    label: str = "",
) -> TrackResult:
    from zoscope.analysis.track import track_request
    from zoscope.analysis.track_results import TrackInterruptedError, TrackRequest
    from zoscope.spec import load_spec

    options = dict(values)
    origin: Values = {key: options.pop(key) for key in ("spec", "set", "params", "checkpoint") if key in options}
    max_seconds, max_memory, shard_basis, _ = (options.pop(name, None) for name in ANEW)
    try:
        request = TrackRequest(**options)
    except ValueError as error:  # each option alone was in order
        raise UsageError(f"Options that do not fit together: {error}.") from None
    with loading(quiet=output.quiet):
        loaded = load_spec(
            origin["spec"],
            settings=origin.get("set", {}),
            params=origin.get("params"),
            checkpoint=None if "checkpoint" not in origin else Path(origin["checkpoint"]),
        )
    display = _display(loaded.display)
    logs = _logs(folder, place)
    try:
        with about(display), watching(quiet=output.quiet, label=label) as observers, aside():
            result = track_request(
                loaded.problem,
                request,
                origin=_relative(origin, folder),
                folder=folder,
                resume=resume,
                overwrite=overwrite,
                max_seconds=max_seconds,
                max_memory=max_memory,
                shard_basis=bool(shard_basis),
                spec=display,
                observers=(*observers, *logs),
            )
    except TrackInterruptedError as error:
        _picture(error.result, folder)
        raise
    _picture(result, folder)
    return result


def _logs(folder: Path, place: FolderOptions) -> tuple[Observer, ...]:
    if not place.tensorboard:
        return ()
    from zoscope.integrations.tensorboard import TensorBoard

    return (TensorBoard(folder / "tensorboard"),)


def _picture(result: TrackResult, folder: Path) -> None:
    """The picture in the run's folder, where matplotlib is installed: nobody asked for it."""
    if find_spec("matplotlib") is None or len(result.records) < 2:
        return
    from zoscope.report.track import draw

    draw(result, [folder / "plot.png", folder / "plot.svg"], option="--run")


def _display(spec: str) -> str:
    """A path as the user knows it."""
    path, name = (spec, "") if Path(spec).is_file() else spec.rpartition(":")[::2]
    if not os.path.isabs(path) or not Path(path).is_relative_to(Path.cwd()):
        return spec
    shown = Path(path).relative_to(Path.cwd()).as_posix()
    return f"{shown}:{name}" if name else shown


@contextmanager
def watching(*, quiet: bool, label: str = "") -> Iterator[tuple[Observer, ...]]:
    """Who shows the run while it goes on: a picture on a terminal, else a line per measurement on stderr."""
    from zoscope.report.track import Lines, LiveView

    if quiet:
        yield ()
        return
    console = Console(stderr=True)
    if not visible(quiet=quiet):
        yield (Lines(console, label=label),)
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield (LiveView(live, label=label),)


# --- several runs -----------------------------------------------------------------------------------------------------


def _sweep(values: Values, folder: Path, place: FolderOptions, output: OutputOptions) -> None:
    from zoscope.analysis.track import Sweep, SweepInterruptedError, run_sweep
    from zoscope.analysis.track_folder import RunFolder
    from zoscope.config.training import plain_config, read_axis

    resume = place.resume is not None
    grid = values.pop("sweep")
    axes = {key: read_axis(key, raw) for key, raw in grid.items()}
    sweep = Sweep(values, {key: axis[0] for key, axis in axes.items()}, {key: axis[1] for key, axis in axes.items()})
    there = RunFolder(folder)
    if not resume and not place.overwrite:
        _refuse_occupied(folder)
    quiet, interrupted = output.quiet, False

    def start(options: Mapping[str, Any], where: Path, goes_on: bool) -> TrackResult:
        overwrite = place.overwrite or resume  # what is there without a run is a start that failed
        return _tracked(
            options,
            where,
            place,
            replace(output, quiet=quiet),
            resume=goes_on,
            overwrite=overwrite and not goes_on,
            label=where.name,
        )

    config = plain_config({**_relative(values, folder), "sweep": grid})
    try:
        comparison = run_sweep(sweep, there, config=config, start=start, resume=resume)
    except SweepInterruptedError as error:
        comparison, interrupted = error.comparison, True
    _show(comparison, place, output)
    if interrupted:
        _say_interrupted(folder)
    if comparison.failed:
        raise typer.Exit(EXIT_FAILED)
    if values.get("strict"):
        for _, result in comparison.results:
            _require_precision(result)


def _compare(run: RunOptions, place: FolderOptions, output: OutputOptions) -> None:
    from zoscope.analysis.track import compare

    folders = [Path(word) for word in run.spec or ()]
    if not folders:
        raise UsageError("--compare: no folder was named. Expected those of runs: zoscope track --compare RUN RUN.")
    options = place.resume is not None or place.config is not None or place.sweep or place.overwrite
    if options or any(getattr(run, entry.name) is not None for entry in fields(run) if entry.name != "spec"):
        raise UsageError("--compare only reads runs, folders of which it takes. Leave all options of a run out.")
    _show(compare(folders), place, output)


def _show(comparison: Comparison, place: FolderOptions, output: OutputOptions) -> None:
    from zoscope.report.track import render_comparison

    if place.plot is not None:
        from zoscope.report.track import draw_comparison

        draw_comparison(comparison, [place.plot])

    emit(comparison, output, shown=render_comparison(comparison))
