"""The threshold in the logs of a Lightning ``Trainer``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoscope.analysis.monitor import Monitored, StabilityMonitor, log_values
from zoscope.errors import UsageError

try:
    from lightning.pytorch import Callback
except ImportError:
    raise UsageError(
        "zoscope.integrations.lightning needs lightning, which is not installed. Install it with: pip install "
        "'zoscope[lightning]'"
    ) from None

if TYPE_CHECKING:
    from zoscope.problem import Problem

__all__ = ["StabilityCallback"]


class StabilityCallback(Monitored, Callback):
    """A Lightning callback around ``zoscope.StabilityMonitor``.

    The values go to the module's logs as ``zoscope/ratio`` and so on; what to know before trusting them goes once to
    Python's log ``zoscope``. Of several optimizers those count that hold parameters of the problem.

    Args:
        problem: What is measured; its model must be the module that is trained, or a part of it.
        every: Optimizer steps between measurements.
        optimizer: Name of the rule that the updates follow, such as ``"zo-gd"``; by default that of the optimizer.
        **options: Further options of ``zoscope.StabilityMonitor``.
    """

    def __init__(self, problem: Problem, *, every: int = 500, optimizer: str | None = None, **options: Any) -> None:
        super().__init__()
        self._problem, self._every, self._name, self._options = problem, every, optimizer, options
        self._last = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure where training starts."""
        options: dict[str, Any] = {"name": self._name}
        planned = trainer.estimated_stepping_batches
        if planned not in (-1, math.inf):
            options["steps"] = int(planned)
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm"):
            options["max_grad_norm"] = float(trainer.gradient_clip_val)
        self._monitor = StabilityMonitor(
            self._problem, trainer.optimizers, every=self._every, **{**options, **self._options}
        )
        self._measured(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any = None, *_: Any, **__: Any) -> None:
        """Measure every so often."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and self._monitor is not None and not self._monitor.compared:
            # Lightning divides it by the number of accumulated batches, where it steps itself.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._monitor.hear(float(loss) * parts)
        self._measured(trainer)

    def _measured(self, trainer: Any) -> None:
        if self._monitor is None or trainer.global_step == self._last:
            return  # a batch that was only accumulated
        self._last = trainer.global_step
        record = self._monitor.step(step=trainer.global_step)
        if record is None:
            return
        self._log_warnings()
        for logger in trainer.loggers:
            logger.log_metrics(log_values(record), step=record.step)
        trainer.callback_metrics.update({name: _tensor(value) for name, value in log_values(record).items()})


def _tensor(value: float) -> Any:
    import torch

    return torch.tensor(value)
