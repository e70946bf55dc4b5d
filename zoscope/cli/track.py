"""``zoscope track``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import about, aside, emit, illustrate, loading, visible
from zoscope.cli.validate import choice
from zoscope.errors import UsageError
from zoscope.report.console import CleanConsole

if TYPE_CHECKING:
    from zoscope.analysis.track import Comparison
    from zoscope.analysis.track_loop import Observer
    from zoscope.analysis.track_results import TrackResult

EXIT_FAILED = 3
LOGGERS = ("tensorboard", "wandb", "mlflow")
RUN_PICTURES = ("plot.png", "plot.svg")
ANEW = ("max_seconds", "max_memory", "shard_basis", "strict")  # options of a session, not of the run
Values = dict[str, Any]


@takes_options("track")
def command(place: Given) -> None:
    """Train, and follow trace, λ_max, the band and the threshold on the way; resumable."""
    if place.compare:
        _compare(place)
        return
    for name in place.logger or ():
        choice("--logger", name, LOGGERS)
    given = _given(place)
    values, folder = _fresh(given, place) if place.resume is None else _resumed(given, place)
    if "sweep" in values:
        _sweep(values, folder, place)
        return
    if place.resume is None and not place.overwrite:
        _refuse_occupied(folder)  # before the spec loads, which may take a while
    from zoscope.analysis.track_results import TrackInterruptedError  # late, for a fast --help

    interrupted = False
    try:
        result = _tracked(values, folder, place, resume=place.resume is not None, overwrite=place.overwrite)
    except TrackInterruptedError as error:
        result, interrupted = error.result, True
    illustrate(result, place)
    emit(result, place.out)
    if interrupted:
        _say_interrupted(folder)
    if result.status == "diverged":
        raise typer.Exit(EXIT_FAILED)
    if values.get("strict"):  # after the result, which is honest all the same
        _require_precision(result)


def _require_precision(result: TrackResult) -> None:
    from zoscope.analysis.track_results import require_precision  # late, for a fast --help

    require_precision(result.records, result.config["rtol"])


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


def _given(given: Given) -> Values:
    """What was given of the options of a run, checked by the table that checks the configuration file."""
    from zoscope.config.training import read_track_option

    found = given.overrides()
    settings = found.pop("settings", None)
    found = {name: read_track_option(name, _parsed(name, value)) for name, value in found.items()}
    if given.spec:
        found["spec"] = _one_spec(given.spec)
    if "checkpoint" in found:
        found["checkpoint"] = str(Path.cwd() / found["checkpoint"])
    if settings:
        from zoscope.spec.which import parse_settings

        found["set"] = parse_settings(settings)
    return found


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


def _fresh(given: Values, place: Given) -> tuple[Values, Path]:
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
        raise UsageError(
            "--lr is missing: track trains with a step size. Expected a number, which 'zoscope plan' finds, or auto."
        )
    name = f"{Path(values['spec'].partition('.py')[0]).name}-{values.get('optimizer', 'zo-gd')}"
    return values, Path(values.pop("run", Path("runs") / name))


def _resumed(given: Values, place: Given) -> tuple[Values, Path]:
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
    for run in (folder, *(config.parent for config in sorted(folder.glob(f"*/{CONFIG}")))):
        _draw_missing(run)
    values = {**read_track_config(folder / CONFIG), **given}
    missing = {"spec", "lr"} - values.keys() - values.get("sweep", {}).keys()
    if missing:
        raise UsageError(f"{folder / CONFIG} has no {min(missing)}. Expected the file that zoscope track wrote.")
    return values, folder


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    both = {**below.get("set", {}), **above.get("set", {})}
    merged = {**below, **above}
    return {**merged, "set": both} if both else merged


def _relative(origin: Mapping[str, Any], folder: Path) -> Values:
    """Paths as ``config.yaml`` holds them: relative to it, so that runs and specs can move together."""

    def relative(path: str) -> str:
        return os.path.relpath(path, os.path.realpath(folder)) if os.path.isabs(path) else path

    return {**origin, **{key: relative(origin[key]) for key in ("spec", "checkpoint") if key in origin}}


# --- one run ----------------------------------------------------------------------------------------------------------


def _tracked(
    values: Mapping[str, Any],
    folder: Path,
    place: Given,
    *,
    resume: bool,
    overwrite: bool,
    label: str = "",
) -> TrackResult:
    from zoscope.analysis.track import track_request
    from zoscope.analysis.track_results import TrackInterruptedError, TrackRequest
    from zoscope.spec import load_spec

    options: Any = dict(values)
    origin: Values = {key: options.pop(key) for key in ("spec", "set", "params", "checkpoint") if key in options}
    try:
        request = TrackRequest.of(**options, run=folder, resume=resume, overwrite=overwrite)
    except ValueError as error:  # each option alone was in order
        raise UsageError(f"Options that do not fit together: {error}.") from None
    with loading(_display(origin["spec"]), quiet=place.quiet):
        loaded = load_spec(
            origin["spec"],
            settings=origin.get("set", {}),
            params=origin.get("params"),
            checkpoint=None if "checkpoint" not in origin else Path(origin["checkpoint"]),
        )
    display = _display(loaded.display)
    try:
        with (
            _logs(folder, place) as logs,
            about(display),
            watching(quiet=place.quiet, label=label) as observers,
            aside(),
        ):
            result = track_request(
                loaded.problem,
                replace(request, spec=display),
                origin=_relative(origin, folder),
                observers=(*observers, *logs),
            )
    except TrackInterruptedError as error:
        _picture(error.result, folder)
        raise
    _picture(result, folder)
    return result


@contextmanager
def _logs(folder: Path, place: Given) -> Iterator[tuple[Observer, ...]]:
    """Observers that hand the run to the loggers asked for, which end with it."""
    names = dict.fromkeys([*(place.logger or ()), *["tensorboard"] * place.tensorboard])
    if not names:
        yield ()
        return
    from zoscope.analysis.track_loop import Logged
    from zoscope.integrations.loggers import logger

    with ExitStack() as stack:
        yield tuple(Logged(stack.enter_context(closing(logger(name, folder)))) for name in names)


def _picture(result: TrackResult, folder: Path) -> None:
    """The picture in the run's folder, where matplotlib is installed: nobody asked for it."""
    if find_spec("matplotlib") is None or len(result.records) < 2:
        return
    from zoscope.report.figures import draw

    draw(result.to_dict(), [folder / name for name in RUN_PICTURES], option="--run")


def _draw_missing(folder: Path) -> None:
    """The picture of a run that is over, where something ended zoscope before it was drawn."""
    from zoscope.analysis.track import read_result
    from zoscope.analysis.track_folder import RunFolder
    from zoscope.analysis.track_results import OVER

    drawn = all((folder / name).is_file() for name in RUN_PICTURES)
    summary = None if drawn else RunFolder(folder).read_summary()
    if summary is not None and summary.get("status") in OVER:
        _picture(read_result(folder), folder)


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
    console = CleanConsole(stderr=True)
    if not visible(quiet=quiet):
        yield (Lines(console, label=label),)
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield (LiveView(live, label=label),)


# --- several runs -----------------------------------------------------------------------------------------------------


def _sweep(values: Values, folder: Path, place: Given) -> None:
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
    interrupted = False

    def start(options: Mapping[str, Any], where: Path, goes_on: bool) -> TrackResult:
        overwrite = place.overwrite or resume  # what is there without a run is a start that failed
        return _tracked(
            options,
            where,
            place,
            resume=goes_on,
            overwrite=overwrite and not goes_on,
            label=where.name,
        )

    config = plain_config({**_relative(values, folder), "sweep": grid})
    try:
        comparison = run_sweep(sweep, there, config=config, start=start, resume=resume)
    except SweepInterruptedError as error:
        comparison, interrupted = error.comparison, True
    _show(comparison, place)
    if interrupted:
        _say_interrupted(folder)
    if comparison.failed:
        raise typer.Exit(EXIT_FAILED)
    if values.get("strict"):
        for _, result in comparison.results:
            _require_precision(result)


def _compare(place: Given) -> None:
    from zoscope.analysis.track import compare

    folders = [Path(word) for word in place.spec or ()]
    if not folders:
        raise UsageError("--compare: no folder was named. Expected those of runs: zoscope track --compare RUN RUN.")
    options = place.resume is not None or place.config is not None or place.sweep or place.overwrite
    if options or place.overrides():
        raise UsageError("--compare only reads runs, folders of which it takes. Leave all options of a run out.")
    _show(compare(folders), place)


def _show(comparison: Comparison, place: Given) -> None:
    illustrate(comparison, place)
    emit(comparison, place.out)
