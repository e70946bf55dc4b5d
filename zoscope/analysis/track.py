"""``zoscope.track``: one run or a sweep, followed to the end, and the comparison of runs from their folders."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from zoscope.analysis.request import curvature_session
from zoscope.analysis.track_folder import CONFIG, RunFolder
from zoscope.analysis.track_loop import Logged, Observer, Run, gentle_interrupts
from zoscope.analysis.track_results import (
    OVER,
    SCHEMA,
    TrackInterruptedError,
    TrackRequest,
    TrackResult,
    require_precision,
)
from zoscope.config.training import TRACK
from zoscope.errors import UsageError, ZoscopeError
from zoscope.options import TrackOptions
from zoscope.problem import Notice
from zoscope.result import RichResult, pick

if TYPE_CHECKING:
    from zoscope.analysis.request import ProblemLike
    from zoscope.optim.auto_lr import Log


@dataclass(frozen=True)
class Entry:
    """One run of several.

    Args:
        label: Its name among them.
        result: What is known of it; ``None`` where it failed.
        error: Why it failed.
    """

    label: str
    result: TrackResult | None
    error: str | None = None


@dataclass(frozen=True)
class Comparison(RichResult):
    """Runs side by side.

    Args:
        entries: In the order given.
    """

    entries: tuple[Entry, ...]

    @property
    def results(self) -> tuple[tuple[str, TrackResult], ...]:
        """Label and result of every run that did not fail."""
        return tuple((entry.label, entry.result) for entry in self.entries if entry.result is not None)

    @property
    def failed(self) -> tuple[Entry, ...]:
        """The others."""
        return tuple(entry for entry in self.entries if entry.result is None)

    def summary(self) -> dict[str, Any]:
        """The document without measurements."""
        return self._document(lambda run: {"folder": None if run.folder is None else str(run.folder), **run.summary()})

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.track-comparison/1``: for every run its ``zoscope.track/1``."""
        return self._document(TrackResult.to_dict)

    def _document(self, of: Callable[[TrackResult], dict[str, Any]]) -> dict[str, Any]:
        runs = [
            pick(entry, "label error") | ({} if entry.result is None else of(entry.result)) for entry in self.entries
        ]
        return {"schema": "zoscope.track-comparison/1", "runs": runs}


def compare(folders: Sequence[Path]) -> Comparison:
    """Runs from their folders; the folder of a sweep stands for all its runs.

    Raises:
        UsageError: If a folder holds no run.
    """
    places = [place for folder in folders for place in _runs_in(folder)]
    names = [place.name for place in places]
    labels = names if len(set(names)) == len(names) else [str(place) for place in places]
    return Comparison(tuple(Entry(label, read_result(place)) for label, place in zip(labels, places, strict=True)))


def _runs_in(folder: Path) -> list[Path]:
    config = RunFolder(folder).read_config()
    if "sweep" not in config:
        return [folder]
    runs = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not runs:
        raise UsageError(f"{folder}: this sweep has no run yet. Expected at least one.")
    return runs


def read_result(folder: Path) -> TrackResult:
    """What a folder holds of a run, finished or not; without its parameters.

    Raises:
        UsageError: If it holds no run.
    """
    place = RunFolder(folder)
    config, records, summary = place.read_config(), place.read_records(), place.read_summary()
    if summary is None:
        last = records[-1].step if records else 0
        summary = {"status": "interrupted", "reason": f"not over; measured up to step {last:,}", "steps": last}
    elif summary.get("schema") != SCHEMA:
        raise UsageError(f"{place.path}: summary.json is not of a run ({summary.get('schema')!r}). Expected {SCHEMA}.")
    elif not {"status", "reason", "steps"} <= summary.keys():
        raise UsageError(f"{place.path}: summary.json lacks how the run ended. Remove it: the measurements are whole.")
    problem = summary.get("problem", {})
    return TrackResult(
        spec=summary.get("spec", config.get("spec")),
        optimizer=str(config.get("optimizer", "zo-gd")),
        config=config,
        device=summary.get("device", ""),
        dtype=summary.get("dtype", ""),
        num_params=problem.get("num_params", 0),
        num_examples=problem.get("num_examples", 0),
        every=summary.get("every", 0),
        status=summary["status"],
        reason=summary["reason"],
        steps_done=summary["steps"],
        records=records,
        folder=folder,
        seconds=summary.get("seconds") or 0.0,
        measuring_seconds=summary.get("measuring_seconds") or 0.0,
        parameters={},
        warnings=tuple(Notice(entry["code"], entry["message"]) for entry in summary.get("warnings", [])),
    )


Values = Mapping[str, Any]
Start = Callable[[Values, Path, bool], "TrackResult"]
"""Runs one combination in a folder; the last argument says whether to go on with what is there."""

SETTING = "set."


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Args:
        values: The options that all runs share.
        grid: Names of options (``set.NAME`` for an argument of the spec), each with the values that it takes.
        labels: The same values as text, for names of folders.
    """

    values: Values
    grid: Mapping[str, Sequence[Any]]
    labels: Mapping[str, Sequence[str]]

    def combinations(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of every run, the last key varying fastest."""
        found = []
        for indices in itertools.product(*(range(len(values)) for values in self.grid.values())):
            chosen = {key: self.grid[key][index] for key, index in zip(self.grid, indices, strict=True)}
            parts = [
                f"{key.removeprefix(SETTING)}={self.labels[key][i]}" for key, i in zip(self.grid, indices, strict=True)
            ]
            found.append((",".join(parts), self._with(chosen)))
        return found

    def _with(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        settings = {key.removeprefix(SETTING): value for key, value in chosen.items() if key.startswith(SETTING)}
        options = {key: value for key, value in chosen.items() if not key.startswith(SETTING)}
        merged = {**self.values, **options}
        return {**merged, "set": {**self.values.get("set", {}), **settings}} if settings else merged


class SweepInterruptedError(KeyboardInterrupt):
    """A sweep that was interrupted, with the runs that there are."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


def run_sweep(sweep: Sweep, folder: RunFolder, *, config: Values, start: Start, resume: bool) -> Comparison:
    """Run what has not been run yet, one after another.

    A run that fails (a start that is not finite, no memory) is named in the result, and the others go on.

    Args:
        sweep: What is varied.
        folder: Folder of the sweep; the run ``NAME`` is kept in ``folder/NAME``.
        config: What ``config.yaml`` of the sweep holds.
        start: Runs one combination.
        resume: Go on with a sweep that was interrupted.

    Raises:
        UsageError: If two combinations have one name, or the folder cannot be used.
        SweepInterruptedError: If a run was interrupted.
    """
    runs = sweep.combinations()
    names = [_folder_name(name) for name, _ in runs]
    if len(set(names)) != len(names):
        raise UsageError("--sweep: two of the runs have the same values. Give every value once.")
    entries: list[Entry] = []
    with folder.opened():
        if not resume:
            folder.write_config(config)
        for (label, values), name in zip(runs, names, strict=True):
            entry, interrupted = _one(label, values, folder.path / name, start, resume=resume)
            entries.append(entry)
            if interrupted:
                raise SweepInterruptedError(Comparison(tuple(entries)))
        comparison = Comparison(tuple(entries))
        folder.write_summary(comparison.summary())
    return comparison


def _one(label: str, values: Values, place: Path, start: Start, *, resume: bool) -> tuple[Entry, bool]:
    there = RunFolder(place)
    goes_on = resume and there.has_run
    if goes_on:
        summary = there.read_summary()
        if summary is not None and summary.get("status") in OVER:
            return Entry(label, read_result(place)), False
    try:
        return Entry(label, start(values, place, goes_on)), False
    except TrackInterruptedError as error:
        return Entry(label, error.result), True
    except UsageError:
        raise  # it would be the same for the others
    except ZoscopeError as error:
        return Entry(label, None, str(error)), False


def _folder_name(label: str) -> str:
    """A label as the name of a folder on every system."""
    return re.sub(r"[^A-Za-z0-9=,.+_-]+", "_", label)[:120].strip(".")


DEFAULTS = {key.name: key.default for key in TRACK.keys}


def track(
    problem: ProblemLike,
    *,
    observers: Sequence[Observer] = (),
    loggers: Sequence[Log] = (),
    **options: Unpack[TrackOptions],
) -> TrackResult:
    """Train a problem, and measure every so often how its step size compares with what its curvature allows.

    The problem comes back as it was; the trained parameters are in the result, and in ``checkpoint.pt`` of the folder.
    The first interrupt stops the run after the step under way. With ``batch_size`` examples are drawn without
    replacement in every epoch, and what is measured is still the loss of all of them.

    Args:
        problem: Model, batches and loss; a function that returns them, or a spec, such as ``"model.py"``.
        observers: Told of every step and of every measurement.
        loggers: Each is called as ``log(values, step)`` with what was measured: those of
            `zoscope.integrations.loggers`, or functions.
        **options: Those of ``zoscope track``: ``examples/guide/options.md`` has types, defaults and ranges. ``lr`` has
            to be there: a number, text such as ``"0.001,20000:0.007"``, or a schedule.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        TypeError: For an option that there is not, or without ``lr``.
        ValueError: If an argument is outside of its range.
        UsageError: If the folder cannot be used, or another run is in it.
        SpecError: If the problem cannot be measured.
        NumericalError: If the start is not finite, or, with ``strict``, a precision was not reached.
        RunFolderError: If the folder can no longer be written; its last checkpoint stays.
        TrackInterruptedError: A ``KeyboardInterrupt`` that carries what was found.
    """
    request = TrackRequest.of(**options)
    origin = {} if request.params is None else {"params": request.params}
    result = track_request(problem, request, origin=origin, observers=(*observers, *map(Logged, loggers)))
    if request.strict:
        require_precision(result.records, request.rtol)
    return result


def track_request(
    problem: ProblemLike, request: TrackRequest, *, origin: Mapping[str, Any], observers: Sequence[Observer]
) -> TrackResult:
    """`track` with its options in one piece.

    Args:
        problem: Model, batches and loss; a function that returns them, or a spec, such as ``"model.py"``.
        request: What is asked.
        origin: Where the problem comes from, as keys of a configuration.
        observers: Who watches.
    """
    config = {**origin, **request.config()}
    with ExitStack() as stack:
        place = None if request.folder is None else RunFolder(request.folder)
        if place is not None:
            stack.enter_context(place.opened())
            _check_folder(place, config, resume=request.resume, overwrite=request.overwrite)
        session = stack.enter_context(curvature_session(problem, request, trains=True))
        stop, objective = stack.enter_context(gentle_interrupts()), session.objective
        going = Run(
            objective,
            session.trained,
            request,
            place,
            stop,
            max_seconds=request.max_seconds,
            observers=tuple(observers),
            config=config,
        )
        _start(going, config, overwrite=request.overwrite)
        status, reason = going.go()
        result = TrackResult(
            spec=session.spec,
            optimizer=request.optimizer,
            config=config,
            device=str(objective.device),
            dtype=session.dtype,
            num_params=objective.num_params,
            num_examples=objective.num_examples,
            every=going.every,
            status=status,
            reason=reason,
            steps_done=going.step,
            records=tuple(going.records),
            folder=request.folder,
            seconds=going.seconds,
            measuring_seconds=going.measuring_seconds,
            parameters=going.parameters(),
            warnings=tuple(objective.warnings),
        )
        if place is not None:
            place.write_summary(result.summary())
    if status == "interrupted":
        raise TrackInterruptedError(result)
    return result


def _check_folder(place: RunFolder, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Refuse to go on with another run, or to write over one.

    Raises:
        UsageError: With the first option that differs, or what to do about the run that is there.
    """
    if not place.has_run:
        if resume:
            raise UsageError(
                f"--resume {place.path}: there is no run in this folder. Expected one given to --run before."
            )
        return
    if resume:
        stored = {**DEFAULTS, **place.read_config()}  # an older version may not have known an option
        given = {**DEFAULTS, **config}
        for key in sorted(stored.keys() | given.keys()):
            if stored.get(key) != given.get(key):
                raise UsageError(
                    f"--resume {place.path}: {key} is {given.get(key)!r}, and the run began with {stored.get(key)!r}. "
                    "A run goes on with the options that it began with; leave the others out, or start a new one."
                )
        summary = place.read_summary()
        if summary is not None and summary.get("status") in OVER:
            raise UsageError(
                f"--resume {place.path}: this run is over ({summary.get('reason')}). Look at it with: zoscope track "
                f"--compare {place.path}"
            )
    elif not overwrite:
        raise UsageError(
            f"--run {place.path}: there is a run in this folder. Go on with it: zoscope track --resume {place.path}. "
            "Or replace it with --overwrite, or name another folder."
        )


def _start(going: Run, config: Mapping[str, Any], *, overwrite: bool) -> None:
    place = going.folder
    if place is None:
        return
    if overwrite or not place.has_run:
        place.clear()
        place.write_config(config)
        return
    place.forget_summary()
    content = place.read_checkpoint()
    if content is None:  # stopped before the first one: from the start
        place.truncate_metrics(0)
        return
    stored = content.get("config", config)
    if not isinstance(stored, Mapping) or not all(isinstance(key, str) for key in stored):
        raise UsageError(
            f"--resume {place.path}: the config in checkpoint.pt is no table of options: something else than zoscope "
            "wrote it. Put a copy of the file back, or start anew with --overwrite."
        )
    for key in sorted({*stored, *config}):
        before = stored.get(key, DEFAULTS.get(key))  # a run of an earlier version has not all of today's options
        if before != config.get(key):
            raise UsageError(
                f"--resume {place.path}: {key} is {config.get(key)!r} in config.yaml, and was {before!r} when "
                "the checkpoint was written. Put it back, or start a new run from checkpoint.pt with --checkpoint."
            )
    going.restore(content)
