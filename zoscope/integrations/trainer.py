"""The threshold in the logs of a ``transformers`` ``Trainer``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from zoscope.analysis.monitor import Monitored, StabilityMonitor, log_values
from zoscope.errors import SpecError, UsageError
from zoscope.integrations.huggingface import count_of, problem_from_transformers, task_of
from zoscope.problem import Notice, Problem
from zoscope.problem.data import examples_in, user_code
from zoscope.problem.model import randomness
from zoscope.runtime import preserved_rng

try:
    from transformers import TrainerCallback
except ImportError:
    raise UsageError(
        "zoscope.integrations.trainer needs transformers, which is not installed. Install it with: pip install "
        "'zoscope[hf]'"
    ) from None

from zoscope.integrations.zo_trainer import ZOTrainer, ZOTrainingArguments, overrides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import Trainer


__all__ = ["StabilityCallback", "ZOTrainer", "ZOTrainingArguments", "watch_trainer"]


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
    on; what to know before trusting them goes once to Python's log ``zoscope``.

    Args:
        trainer: The trainer, before ``train()``.
        problem: What is measured; by default the loss of the first ``examples`` of its training set: the model's own,
            labels smoothed as its arguments say, or that of the trainer's ``compute_loss`` where that is another. A
            loader of the trainer's own, ``get_train_dataloader``, is asked for as many.
        every: Steps between measurements.
        examples: Examples of the default problem, evaluated in batches of the trainer's size.
        **options: Further options of ``zoscope.StabilityMonitor``; ``optimizer="zo-gd"`` and the like for a trainer
            whose updates come from a zeroth-order estimate, whatever optimizer applies them.

    Returns:
        The callback, which has been added; its ``records`` hold everything measured.

    Raises:
        ValueError: If the trainer has no model or no training set yet, or one that can be read only once.
        SpecError: If its examples cannot be read.
    """
    callback = StabilityCallback(trainer, problem or trainer_problem(trainer, examples), every=every, **options)
    if problem is None:
        callback.examples = examples
    trainer.add_callback(callback)
    return callback


def trainer_problem(trainer: Trainer, examples: int) -> Problem:
    """What a trainer minimises, on the first examples that it trains on."""
    model: Any = trainer.model
    if model is None or trainer.train_dataset is None:
        raise ValueError("the trainer has no model or no training set yet: pass the problem to measure")
    size = trainer.args.per_device_train_batch_size
    loaded = overrides(trainer, "get_train_dataloader")
    chosen: Any = _own_batches(trainer, examples) if loaded else _first(trainer.train_dataset, examples)
    collator: Any = trainer.data_collator
    if hasattr(trainer, "_get_collator_with_removed_columns"):  # the columns that the trainer drops
        collator = trainer._get_collator_with_removed_columns(collator)
    if not loaded and not _own_loss(trainer):
        problem = problem_from_transformers(
            model,
            chosen,
            collator=collator,
            batch_size=size,
            label_smoothing=trainer.args.label_smoothing_factor,
        )
    else:
        if not loaded:
            with preserved_rng(), user_code("The trainer's data collator", remedy="It receives a list of examples."):
                chosen = [collator(chosen[start : start + size]) for start in range(0, len(chosen), size)]
        count = count_of(model, task_of(model), "tokens")
        batches = [dict(batch) if isinstance(batch, Mapping) else batch for batch in chosen]
        batches = [batch for batch in batches if not isinstance(batch, dict) or count(batch)]
        if not batches:
            raise SpecError("The trainer's first examples have no labels that count: expected some. Raise examples=.")
        mappings = all(isinstance(batch, dict) for batch in batches)
        problem = Problem(model, batches, TrainerLoss(trainer), batch_size_of=count if mappings else None)
        problem.own_device_only = True  # what compute_loss refers to beside the model stays where it is
        problem.name = type(model).__name__
    if not hasattr(trainer.train_dataset, "__len__") and not loaded:
        problem.notices += (
            Notice("streaming", f"The training set is a stream: its first {len(chosen)} examples are measured."),
        )
    return problem


def _own_loss(trainer: Trainer) -> bool:
    """Whether the loss is another than the model's own with smoothed labels."""
    smoother: Any = trainer.label_smoother
    return (
        overrides(trainer, "compute_loss")
        or trainer.compute_loss_func is not None
        or type(smoother).__name__ not in ("NoneType", "LabelSmoother")
        or not hasattr(trainer.model, "config")
    )


def _first(dataset: Any, count: int) -> list[Any]:
    """The first examples of a data set or of a stream, which is opened anew by the training."""
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    stream = iter(dataset)
    if stream is dataset:
        raise ValueError(
            "the training set is an iterator, from which each example comes once: pass the problem to measure, or a "
            "data set that can be read again"
        )
    return list(itertools.islice(stream, count))


def _own_batches(trainer: Trainer, count: int) -> list[Any]:
    """Batches of a trainer's own loader, as many as hold so many examples; drawing them leaves no trace."""
    with preserved_rng(), user_code("The trainer's get_train_dataloader", remedy="It returns a DataLoader."):
        loader: Any = trainer.get_train_dataloader()
        loader = getattr(loader, "base_dataloader", loader)  # that of accelerate counts the steps of training
        return list(itertools.islice(loader, max(1, count // trainer.args.per_device_train_batch_size)))


class TrainerLoss:
    """Mean loss of a batch as a trainer computes it, in eval mode.

    Args:
        trainer: Whose ``compute_loss`` is called.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss."""
        if any(module.training for module in model.modules()):
            model.eval()  # in a session, which puts modes back
        found: Any = self._trainer.compute_loss(
            model, dict(batch) if isinstance(batch, Mapping) else batch, **self._items(batch)
        )
        loss: Tensor = found[0] if isinstance(found, tuple) else found
        return loss

    def _items(self, batch: Any) -> dict[str, Any]:
        """The count that the trainer hands to its loss, of this batch; several processes would have to wait for it."""
        trainer: Any = self._trainer
        count = getattr(trainer, "_get_num_items_in_batch", None)
        if count is None or trainer.args.world_size > 1 or not isinstance(batch, Mapping):
            return {}
        return {"num_items_in_batch": count([batch], trainer.args.device)}


class StabilityCallback(Monitored, TrainerCallback):
    """A ``TrainerCallback`` around ``zoscope.StabilityMonitor``; see `watch_trainer`.

    Args:
        trainer: Whose ``log`` receives the values.
        problem: What is measured; its model must be the one that is trained.
        every: Steps between measurements.
        optimizer: Name of the rule that the updates follow, such as ``"zo-gd"``; by default that of the optimizer.
        **options: Further options of ``zoscope.StabilityMonitor``.
    """

    def __init__(
        self, trainer: Trainer, problem: Problem, *, every: int = 500, optimizer: str | None = None, **options: Any
    ) -> None:
        self._trainer, self._problem, self._every = trainer, problem, every
        self._name, self._options = optimizer, options
        self.examples: int | None = None  # of the default problem, which follows the trainer to another model
        self._step_loss: list[float] = []  # of the micro-batches of a step
        self._first: list[tuple[float, int] | None] = []  # what is `_expected` of the batches of the first step
        self._first_heard = False
        self._stop_listening: Callable[[], None] = lambda: None
        self._other_loss: Notice | None = None

    @property
    def warnings(self) -> Sequence[Notice]:
        """What the last measurement had to say, and whether the trainer's loss is another one."""
        found = super().warnings
        if self._other_loss is None or any(notice.code == self._other_loss.code for notice in found):
            return found
        return (*found, self._other_loss)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure where training starts."""
        another = self._trainer.model is not self._problem.model  # train() has called model_init
        if self.examples is not None and another:
            self._problem = trainer_problem(self._trainer, self.examples)
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        options = {
            "steps": state.max_steps,
            "max_grad_norm": args.max_grad_norm,
            "batch_size": size if self._name is not None and self._name.startswith("zo-") else None,
            **self._options,
        }
        optimizer: Any = self._trainer.optimizer
        while not hasattr(optimizer, "defaults"):
            optimizer = optimizer.optimizer
        self._monitor = StabilityMonitor(self._problem, optimizer, name=self._name, every=self._every, **options)
        self._measured(state, control)
        self._listen()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure every so often."""
        if self._step_loss and not self._first_heard:
            self._first_heard = True
            self._compare(sum(self._step_loss))
        if self._step_loss and self._monitor is not None:
            self._monitor.hear(sum(self._step_loss))  # each is a part of the mean
            self._step_loss.clear()
        self._measured(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the trainer as it was."""
        self._stop_listening()

    def _measured(self, state: Any, control: Any) -> None:
        # Every process measures the same; the first one logs.
        if self._monitor is None:
            return
        record = self._monitor.step(step=state.global_step)
        if record is not None and state.is_world_process_zero:
            self._log_warnings()
            wanted = control.should_log
            self._trainer.log(log_values(record))
            control.should_log = wanted  # logging takes the wish for the regular log away

    def _listen(self) -> None:
        """Look at the losses of the first training steps; then the trainer is as it was."""
        trainer: Any = self._trainer
        step, before = trainer.training_step, vars(trainer).get("training_step")

        def stop() -> None:
            if vars(trainer).get("training_step") is not heard:
                return
            del trainer.training_step
            if before is not None:
                trainer.training_step = before

        def heard(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._monitor is None or self._monitor.compared:
                stop()
                return step(model, inputs, *args, **kwargs)
            if not self._first_heard:
                self._first.append(self._expected(model, inputs))
            loss = step(model, inputs, *args, **kwargs)
            self._step_loss.append(float(loss))
            return loss

        self._first, self._first_heard, self._stop_listening = [], False, stop
        trainer.training_step = heard

    def _expected(self, model: nn.Module, inputs: Any) -> tuple[float, int] | None:
        """The problem's loss of a batch of the training, and its weight; ``None`` where it takes other batches."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            with preserved_rng(), torch.no_grad():
                batch = self._trainer._prepare_inputs(inputs)
                if not isinstance(self._problem.loss, TrainerLoss) and isinstance(batch, Mapping):
                    names = set().union(*(b for b in self._problem.batches if isinstance(b, Mapping)))
                    batch = {key: value for key, value in batch.items() if key in names}
                weight = examples_in(batch, self._problem.batch_size_of)  # first: a loss may take labels out
                return float(self._problem.loss(model, batch)), weight
        except Exception:
            return None
        finally:
            for module, mode in modes:
                module.training = mode

    def _compare(self, found: float) -> None:
        """Hold the loss of the first training step against the problem's, on the same batches."""
        known = [expected for expected in self._first if expected is not None]
        # The parts of a mean over the tokens of all processes are no mean of one process.
        if len(known) < len(self._first) or (len(known) > 1 and self._trainer.args.world_size > 1):
            return
        model: Any = self._trainer.model
        varies = any(randomness(module) for module in model.modules()) or overrides(self._trainer, "training_step")
        tolerance = VARYING if varies else FIXED
        # Trainers average accumulated batches by what counts in them, or evenly.
        weighted = sum(loss * weight for loss, weight in known) / sum(weight for _, weight in known)
        even = sum(loss for loss, _ in known) / len(known)
        expected = min(weighted, even, key=lambda loss: abs(found - loss))
        if abs(found - expected) > tolerance * max(abs(found), abs(expected)):
            where, more = ("batch", "") if len(known) == 1 else ("step", ", or means of batches that it adds up")
            self._other_loss = Notice(
                "other-loss",
                f"On its first {where} the trainer's loss is {found:.3g}, and the problem's {expected:.3g}: what is "
                f"measured is not what is trained. Look for a training_step of the trainer's own{more}, or pass the "
                "problem to measure.",
            )


FIXED, VARYING = 0.02, 0.3
"""Relative difference of the two losses that is worth a notice: without dropout, and with it."""
