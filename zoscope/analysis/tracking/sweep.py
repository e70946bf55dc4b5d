"""Several runs that differ in some options: one folder each, below the folder of the sweep."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.analysis.tracking.compare import Comparison, Entry, read_result
from zoscope.analysis.tracking.folder import RunFolder
from zoscope.analysis.tracking.results import OVER, TrackInterruptedError
from zoscope.errors import UsageError, ZoscopeError

if TYPE_CHECKING:
    from zoscope.analysis.tracking.results import TrackResult

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
