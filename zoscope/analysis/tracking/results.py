"""What ``zoscope.track`` returns: a frozen dataclass whose ``to_dict`` is the document ``zoscope.track/1``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoscope._version import __version__
from zoscope.analysis.optimizer_bounds import number
from zoscope.analysis.tracking.record import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor

    from zoscope.problem import Notice

SCHEMA = "zoscope.track/1"

Status = Literal["finished", "target", "diverged", "time", "interrupted"]
OVER: tuple[str, ...] = ("finished", "target", "diverged")
"""How a run ends that cannot go on; the others can be resumed."""


@dataclass(frozen=True)
class Band:
    """How often the threshold term lies in ``[0.9 lower, 1.1 upper]`` once the curvature has risen to it.

    Args:
        inside: Measurements inside.
        of: Measurements since the first one with ``threshold ≤ 1.1 upper``.
        since: Step of that one; ``None`` where the edge was never reached.
    """

    inside: int
    of: int
    since: int | None

    @property
    def share(self) -> float | None:
        """Their ratio."""
        return self.inside / self.of if self.of else None


def band_of(records: Sequence[Record]) -> Band:
    """See `Band`."""
    known = [record for record in records if record.in_band is not None]
    reached = next((n for n, record in enumerate(known) if record.reaches_edge), None)
    if reached is None:
        return Band(0, 0, None)
    return Band(sum(bool(record.in_band) for record in known[reached:]), len(known) - reached, known[reached].step)


@dataclass(frozen=True)
class TrackResult:
    """A run, or as much of it as there is.

    Args:
        spec: Name of the problem.
        optimizer: ``zo-gd`` and so on.
        config: Every option that makes the run what it is, as ``config.yaml`` holds it.
        device: Where it ran.
        dtype: Floating-point type.
        num_params: Number of trained parameters.
        num_examples: Examples of the problem.
        every: Steps between measurements; the first interval of an adaptive run.
        status: ``finished``; ``target``: the loss asked for was reached; ``diverged``; ``time``: time ran out;
            ``interrupted``.
        reason: One sentence on it.
        steps_done: Steps done.
        records: The measurements, in order.
        folder: Where the run is kept; ``None`` for a run without a folder.
        seconds: Wall time, over all sessions of the run.
        measuring_seconds: Part of it spent on measurements.
        parameters: The parameters at the end, on the CPU, by name.
        warnings: What to know before trusting a number.
        version: Version of zoscope.
    """

    spec: str | None
    optimizer: str
    config: Mapping[str, Any]
    device: str
    dtype: str
    num_params: int
    num_examples: int
    every: int
    status: Status
    reason: str
    steps_done: int
    records: tuple[Record, ...]
    folder: Path | None
    seconds: float
    measuring_seconds: float
    parameters: Mapping[str, Tensor] = field(repr=False)
    warnings: tuple[Notice, ...] = ()
    version: str = field(default=__version__)

    @property
    def num_hvps(self) -> int:
        """Hessian-vector products spent in all."""
        return sum(record.num_hvps for record in self.records)

    @property
    def band(self) -> Band:
        """How many measurements lie in the band, from the first one on that reached it."""
        return band_of(self.records)

    @property
    def checkpoint(self) -> Path | None:
        """File with the last complete state."""
        return None if self.folder is None else self.folder / "checkpoint.pt"

    def summary(self) -> dict[str, Any]:
        """The document without its measurements, as ``summary.json`` holds it."""
        band = self.band
        last = self.records[-1] if self.records else None
        return {
            "schema": SCHEMA,
            "zoscope": self.version,
            "spec": self.spec,
            "optimizer": self.optimizer,
            "status": self.status,
            "reason": self.reason,
            "steps": self.steps_done,
            "loss": None if last is None else number(last.loss),
            "every": self.every,
            "measurements": len(self.records),
            "in_band": {"inside": band.inside, "of": band.of, "share": band.share, "since": band.since},
            "num_hvps": self.num_hvps,
            "seconds": number(self.seconds),
            "measuring_seconds": number(self.measuring_seconds),
            "device": self.device,
            "dtype": self.dtype,
            "problem": {"num_params": self.num_params, "num_examples": self.num_examples},
            "config": dict(self.config),
            "warnings": [asdict(notice) for notice in self.warnings],
        }

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.track/1``: JSON numbers, strings and null only."""
        folder = None if self.folder is None else str(self.folder)
        return self.summary() | {"folder": folder, "records": [record.to_dict() for record in self.records]}

    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""
        from zoscope.report.track import render

        return render(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The same tables for a notebook."""
        from zoscope.report.notebook import to_html, to_text

        return {"text/html": to_html(self), "text/plain": to_text(self)}


class TrackInterruptedError(KeyboardInterrupt):
    """A run that was interrupted, with what it has found.

    Args:
        result: Its status is ``interrupted``.
    """

    def __init__(self, result: TrackResult) -> None:
        super().__init__()
        self.result = result
