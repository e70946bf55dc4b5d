"""Several runs side by side, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.analysis.tracking.folder import CONFIG, RunFolder
from zoscope.analysis.tracking.results import SCHEMA, TrackResult
from zoscope.errors import UsageError
from zoscope.problem import Notice

if TYPE_CHECKING:
    from rich.console import RenderableType

COMPARISON_SCHEMA = "zoscope.track-comparison/1"


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
class Comparison:
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
        return {
            "schema": COMPARISON_SCHEMA,
            "runs": [
                {"label": entry.label, "error": entry.error}
                | ({} if entry.result is None else {"folder": _shown(entry.result), **entry.result.summary()})
                for entry in self.entries
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.track-comparison/1``: for every run its ``zoscope.track/1``."""
        return {
            "schema": COMPARISON_SCHEMA,
            "runs": [
                {"label": entry.label, "error": entry.error} | ({} if entry.result is None else entry.result.to_dict())
                for entry in self.entries
            ],
        }

    def __rich__(self) -> RenderableType:
        """A table for the terminal."""
        from zoscope.report.track_compare import render

        return render(self)


def _shown(result: TrackResult) -> str | None:
    return None if result.folder is None else str(result.folder)


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
