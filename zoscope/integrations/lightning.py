"""The threshold in the logs of a Lightning ``Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoscope.analysis.monitor import StabilityMonitor, log_values
from zoscope.errors import UsageError

try:
    from lightning.pytorch import Callback
except ImportError:
    raise UsageError(
        "zoscope.integrations.lightning needs lightning, which is not installed. Install it with: pip install "
        "'zoscope[lightning]'"
    ) from None

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoscope.analysis.track_results import Record
    from zoscope.problem import Problem

__all__ = ["StabilityCallback"]


class StabilityCallback(Callback):
    """A Lightning callback around ``zoscope.StabilityMonitor``.

    The values go to the module's logs as ``zoscope/ratio`` and so on.

    Args:
        problem: What is measured; its model must be the module that is trained, or a part of it.
        every: Optimizer steps between measurements.
        optimizer: Name of the optimizer, such as ``"zo-gd"``; the module's only one by default.
        **options: Further options of ``zoscope.StabilityMonitor``.
    """

    def __init__(self, problem: Problem, *, every: int = 500, optimizer: str | None = None, **options: Any) -> None:
        super().__init__()
        self._problem, self._every, self._name, self._options = problem, every, optimizer, options
        self._monitor: StabilityMonitor | None = None
        self._last = -1

    @property
    def records(self) -> Sequence[Record]:
        """Everything measured so far."""
        return () if self._monitor is None else self._monitor.records

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure where training starts."""
        optimizers = trainer.optimizers
        if self._name is None and len(optimizers) != 1:
            raise ValueError(f"the module has {len(optimizers)} optimizers: name the one to watch with optimizer='gd'")
        planned = trainer.estimated_stepping_batches
        options = {"steps": int(planned)} if planned not in (-1, float("inf")) else {}
        self._monitor = StabilityMonitor(
            self._problem, self._name or optimizers[0], every=self._every, **{**options, **self._options}
        )
        self._measured(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """Measure every so often."""
        self._measured(trainer)

    def _measured(self, trainer: Any) -> None:
        if self._monitor is None or trainer.global_step == self._last:
            return  # a batch that was only accumulated
        self._last = trainer.global_step
        optimizer = trainer.optimizers[0]
        lr = float(optimizer.param_groups[0]["lr"])
        if not lr and not self.records:  # the beginning of a warm-up: the step size that it leads to
            lr = float(optimizer.defaults["lr"])
        record = self._monitor.step(lr=lr, step=trainer.global_step)
        if record is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(log_values(record), step=record.step)
        trainer.callback_metrics.update({name: _tensor(value) for name, value in log_values(record).items()})


def _tensor(value: float) -> Any:
    import torch

    return torch.tensor(value)
