"""The threshold in the logs of a ``transformers`` ``Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoscope.analysis.monitor import StabilityMonitor, log_values
from zoscope.errors import UsageError
from zoscope.integrations.huggingface import problem_from_transformers

try:
    from transformers import TrainerCallback
except ImportError:
    raise UsageError(
        "zoscope.integrations.trainer needs transformers, which is not installed. Install it with: pip install "
        "'zoscope[hf]'"
    ) from None

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Trainer

    from zoscope.analysis.track_results import Record
    from zoscope.problem import Problem

__all__ = ["StabilityCallback", "watch_trainer"]


def watch_trainer(
    trainer: Trainer,
    problem: Problem | None = None,
    *,
    every: int = 500,
    examples: int = 64,
    **options: Any,
) -> StabilityCallback:
    """Let a ``Trainer`` log curvature, threshold and their ratio to its learning rate.

    The values go where its other logs go (its history, the progress bar, TensorBoard, …) as ``zoscope/ratio`` and so
    on.

    Args:
        trainer: The trainer, before ``train()``.
        problem: What is measured; by default the loss of the first ``examples`` of its training set, labels smoothed as
            its arguments say.
        every: Steps between measurements.
        examples: Examples of the default problem, evaluated in batches of the trainer's size.
        **options: Further options of ``zoscope.StabilityMonitor``; ``optimizer="zo-gd"`` and the like for a trainer
            whose updates come from a zeroth-order estimate, whatever optimizer applies them.

    Returns:
        The callback, which has been added; its ``records`` hold everything measured.
    """
    if problem is None:
        if trainer.model is None or trainer.train_dataset is None:
            raise ValueError("the trainer has no model or no training set yet: pass the problem to measure")
        if trainer.compute_loss_func is not None:
            raise ValueError("the trainer has a loss of its own, compute_loss_func: pass the problem to measure")
        dataset: Any = trainer.train_dataset
        problem = problem_from_transformers(
            trainer.model,
            [dataset[index] for index in range(min(examples, len(dataset)))],
            collator=trainer.data_collator,
            batch_size=trainer.args.per_device_train_batch_size,
            label_smoothing=trainer.args.label_smoothing_factor,
        )
    callback = StabilityCallback(trainer, problem, every=every, **options)
    trainer.add_callback(callback)
    return callback


class StabilityCallback(TrainerCallback):
    """A ``TrainerCallback`` around ``zoscope.StabilityMonitor``; see `watch_trainer`.

    Args:
        trainer: Whose ``log`` receives the values.
        problem: What is measured; its model must be the one that is trained.
        every: Steps between measurements.
        optimizer: Name of the optimizer, such as ``"zo-gd"``; the trainer's own by default.
        **options: Further options of ``zoscope.StabilityMonitor``.
    """

    def __init__(
        self, trainer: Trainer, problem: Problem, *, every: int = 500, optimizer: str | None = None, **options: Any
    ) -> None:
        self._trainer, self._problem, self._every = trainer, problem, every
        self._name, self._options = optimizer, options
        self._monitor: StabilityMonitor | None = None

    @property
    def records(self) -> Sequence[Record]:
        """Everything measured so far."""
        return () if self._monitor is None else self._monitor.records

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure where training starts."""
        options = {"steps": state.max_steps, **self._options}
        self._monitor = StabilityMonitor(
            self._problem, self._name or _bare(self._trainer.optimizer), every=self._every, **options
        )
        self._measured(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure every so often."""
        self._measured(state, control)

    def _measured(self, state: Any, control: Any) -> None:
        # Every process measures the same; the first one logs.
        if self._monitor is None:
            return
        record = self._monitor.step(lr=self._lr(), step=state.global_step)
        if record is not None and state.is_world_process_zero:
            wanted = control.should_log
            self._trainer.log(log_values(record))
            control.should_log = wanted  # logging takes the wish for the regular log away

    def _lr(self) -> float:
        """Learning rate of the next step; at the beginning of a warm-up, where it is 0, the one that it leads to."""
        optimizer: Any = self._trainer.optimizer
        lr = float(optimizer.param_groups[0]["lr"])
        return lr if lr > 0 or self.records else float(optimizer.defaults["lr"])


def _bare(optimizer: Any) -> Any:
    """The optimizer inside of what ``accelerate`` wraps around it."""
    while not hasattr(optimizer, "defaults") or type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    return optimizer
