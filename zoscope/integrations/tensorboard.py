"""A tracked run as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zoscope.errors import UsageError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from zoscope.analysis.track_loop import Run
    from zoscope.analysis.track_results import Record

SCALARS = {
    "loss": "loss",
    "lr": "lr",
    "grad_norm": "gradient norm",
    "trace": "curvature/trace",
    "lambda_max": "curvature/lambda_max",
    "lambda_min": "curvature/lambda_min",
    "lower": "edge/lower term",
    "upper": "edge/upper term",
    "threshold": "edge/threshold term",
    "exact": "edge/exact threshold",
    "ratio": "edge/lr over exact threshold",
}
"""Fields of a record and the tags that they are written under."""


class TensorBoard:
    """An observer of a tracked run that writes its measurements as scalars.

    A run that is resumed goes on in the same plots: what was written after its checkpoint is purged.

    Args:
        folder: Where TensorBoard looks for events.

    Raises:
        UsageError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError:
            raise UsageError(
                "--tensorboard needs tensorboard, which is not installed. Install it with: pip install "
                "'zoscope[tensorboard]'"
            ) from None
        self._new_writer = tensorboard.SummaryWriter
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def begun(self, run: Run) -> None:
        """Open the log where the run stands."""
        self._writer = self._new_writer(str(self._folder), purge_step=run.step + 1 if run.records else None)

    def stepped(self, step: int, loss: float) -> None:
        """Nothing: a scalar a step would cost more than the step."""

    def measuring(self, step: int) -> None:
        """Nothing: the result comes."""

    def measured(self, record: Record) -> None:
        """Write what is known of it."""
        if self._writer is None:
            return
        values = {tag: getattr(record, name) for name, tag in SCALARS.items()}
        values |= {f"metrics/{name}": value for name, value in record.metrics.items()}
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.step)
        self._writer.flush()
