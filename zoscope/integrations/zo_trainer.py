"""A ``transformers.Trainer`` that trains with forward passes alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoscope.errors import UsageError
from zoscope.integrations.huggingface import IGNORED, count_of, task_of
from zoscope.optim import optimizers
from zoscope.optim.auto_lr import AutoLR
from zoscope.optim.optimizers import ZeroOrderOptimizer
from zoscope.registry import OPTIMIZERS

try:
    from transformers import Trainer, TrainingArguments
    from transformers.optimization import get_constant_schedule
except ImportError:
    raise UsageError(
        "ZOTrainer needs transformers, which is not installed. Install it with: pip install 'zoscope[hf]'"
    ) from None

SCHEDULES = ("constant", "linear", "cosine")
MODES = {"two_side": False, "one_side": True}


@dataclass
class ZOTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the names that MeZO and its successors gave to theirs.

    Args:
        learning_rate: A number, or ``auto``: it sets itself (`zoscope.AutoLR`). ``lr_scheduler_type`` is on top:
            constant, linear or cosine with ``auto``, which warms up by itself.
        trainer: Optimizer: ``zo`` or ``zo_sgd`` for ZO-GD, ``zo_sgd_mmt`` (with ``momentum``), ``zo_adam``,
            ``zo_sign_opt``, or a name of zoscope's such as ``zo-normalized``.
        zo_eps: Smoothing radius μ, in the parameters' unit.
        q: Directions averaged in a step.
        perturbation_mode: ``two_side``, or ``one_side`` for differences from f(θ).
        momentum: β of ``zo_sgd_mmt``.
    """

    learning_rate: float | str = "auto"  # type: ignore[assignment]
    trainer: str = "zo"
    zo_eps: float = 1e-3
    q: int = 1
    perturbation_mode: str = "two_side"
    momentum: float = 0.9
    auto_learning_rate: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        text = str(self.learning_rate)
        if text == "auto":
            self.auto_learning_rate, self.learning_rate = True, 0.0
        else:
            try:
                self.learning_rate = float(text)
            except ValueError:
                raise ValueError(f"learning_rate: got {text!r}, expected a number, or auto") from None
        if self.perturbation_mode not in MODES:
            raise ValueError(f"perturbation_mode: got {self.perturbation_mode!r}, expected one of {', '.join(MODES)}")
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.fp16:
            raise ValueError(
                "fp16=True scales losses for gradients, of which there are none here. Expected bf16=True, or a model "
                "that was loaded in half precision."
            )


class ZOTrainer(Trainer):
    """``transformers.Trainer`` whose steps are zeroth-order: two forward passes a query, the memory of inference.

    Everything else is the Trainer's: data, evaluation, checkpoints and resuming, peft, logging, callbacks. A model is
    in evaluation mode while it trains, as in MeZO: dropout would differ between the two losses of a step. With
    gradient accumulation a step sees the mean over its batches. With several processes each evaluates its own batches,
    and the mean of their losses is exchanged: one float for each evaluation.

    Args:
        args: `ZOTrainingArguments`.
        *more, **options: Those of ``transformers.Trainer``, without ``optimizers``.

    Raises:
        UsageError: If the arguments are not `ZOTrainingArguments`, or parameters lie on several devices.
    """

    def __init__(self, model: Any = None, args: ZOTrainingArguments | None = None, **options: Any) -> None:
        if args is None:
            args = ZOTrainingArguments()
        if not isinstance(args, ZOTrainingArguments):
            raise UsageError(
                f"ZOTrainer: args is a {type(args).__name__}. Expected ZOTrainingArguments of "
                "zoscope.integrations.trainer, which has the arguments of a zeroth-order run, too."
            )
        self._zo: ZeroOrderOptimizer | None = None
        self.auto_lr: AutoLR | None = None
        self._waiting: list[Any] = []
        super().__init__(model, args, **options)

    @property
    def _arguments(self) -> ZOTrainingArguments:
        return cast(ZOTrainingArguments, self.args)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """The zeroth-order optimizer, in a shell whose ``step`` does nothing: `training_step` has done it."""
        if self.optimizer is None:
            of: Any = self.model if model is None else model
            args, name = self._arguments, _family(self._arguments.trainer)
            if args.weight_decay and "weight_decay" not in OPTIMIZERS[name].options:
                raise UsageError(f"weight_decay: {args.trainer} has none. Expected 0.")
            decayed = set(self.get_decay_parameter_names(of)) if args.weight_decay else set()
            named = [(n, p) for n, p in of.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [{"params": [p for n, p in named if n not in decayed]}]
            if decayed:
                groups[0]["weight_decay"] = 0.0
                groups.append({"params": [p for n, p in named if n in decayed], "weight_decay": args.weight_decay})
            options = {"beta": args.momentum} if "beta" in OPTIMIZERS[name].options else {}
            kind: Any = getattr(optimizers, OPTIMIZERS[name].public)
            try:
                self._zo = kind(
                    [group for group in groups if group["params"]],
                    1.0 if args.auto_learning_rate else float(args.learning_rate),
                    mu=args.zo_eps,
                    queries=args.q,
                    one_sided=MODES[args.perturbation_mode],
                    seed=args.seed,
                    **options,
                )
            except ValueError as error:
                raise UsageError(f"ZOTrainer: {error}.") from None
            self.optimizer = _Shell(self._zo)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """As the Trainer's; with ``learning_rate="auto"`` the schedule is `zoscope.AutoLR`'s."""
        if not self._arguments.auto_learning_rate:
            return super().create_scheduler(num_training_steps, optimizer)
        shell: Any = self.optimizer if optimizer is None else optimizer
        if self.auto_lr is None:
            kind = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
            if kind not in SCHEDULES:
                raise UsageError(
                    f"lr_scheduler_type {kind} with learning_rate auto. Expected one of {', '.join(SCHEDULES)}."
                )
            assert self._zo is not None
            self.auto_lr = AutoLR(self._zo, steps=num_training_steps, schedule=cast(Any, kind))
            inner = getattr(shell, "optimizer", shell)
            inner.auto = self.auto_lr
        if self.lr_scheduler is None:
            self.lr_scheduler = get_constant_schedule(shell)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One batch; with the last one of a step, the step."""
        model.eval()
        self._waiting.append(self._prepare_inputs(inputs))
        if len(self._waiting) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, []
        counts = self._counts(batches, num_items_in_batch)
        taken: Any = self.auto_lr if self.auto_lr is not None else self._zo
        with torch.no_grad():
            loss = taken.step(lambda: self._loss(model, batches, counts))
        return torch.tensor(loss, device=self.args.device)

    @property
    def _of_whole_step(self) -> bool:
        """Whether losses are parts of the mean over a step, as the Trainer takes them, and not means of their own."""
        return self.compute_loss_func is not None or bool(getattr(self, "loss_is_scaled_for_ga", None))

    def _counts(self, batches: list[Any], num_items_in_batch: Any) -> list[Any]:
        """What `compute_loss` hears for each batch as its number of items."""
        # A model may take num_items_in_batch and still return a mean: only a loss of the user's own is asked to use it.
        if num_items_in_batch is None or not (self._of_whole_step or overrides(self, "compute_loss")):
            return [None] * len(batches)
        if self._of_whole_step or len(batches) == 1:
            return [num_items_in_batch] * len(batches)
        # Of its own batch: then a loss that divides by it is a mean, like that of one which does not.
        each = [self._get_num_items_in_batch([batch], self.args.device) for batch in batches]
        return [None if count is None else torch.as_tensor(count).clamp(min=1) for count in each]  # for 0 / 0

    def _loss(self, model: nn.Module, batches: list[Any], counts: list[Any]) -> Tensor:
        """Mean over the batches of a step, and over processes."""
        with self.compute_loss_context_manager():
            losses = [
                # A copy: compute_loss may take the labels out, and the next evaluation of the step needs them.
                self.compute_loss(model, copy.copy(batch), num_items_in_batch=count)
                for batch, count in zip(batches, counts, strict=True)
            ]
        means = torch.stack([cast(Tensor, loss).detach().float().mean() for loss in losses])
        if self._of_whole_step:
            loss = means.mean() if counts[0] is None else means.sum()
        else:
            shifted = count_of(self.model, task_of(cast(nn.Module, self.model)), "tokens").shifted
            weights = [_items(b, shifted) if count is None else count for b, count in zip(batches, counts, strict=True)]
            shares = torch.stack([torch.as_tensor(weight).float().mean() for weight in weights]).to(means)
            loss = (means * shares).sum() / shares.sum()
        return cast(Tensor, self.accelerator.reduce(loss, reduction="mean")) if self.args.world_size > 1 else loss

    def _get_learning_rate(self) -> float:
        return self.auto_lr.lr if self.auto_lr is not None else float(super()._get_learning_rate())

    def log(self, logs: dict[str, float], *more: Any, **options: Any) -> None:
        """The Trainer's logs, with what the step size knows."""
        last = None if self.auto_lr is None else self.auto_lr.last
        if last is not None and "loss" in logs:
            ratio = {} if not last.edge else {"zo_lr_over_edge": last.lr / last.edge, "zo_edge": last.edge}
            logs |= {"zo_trace": last.trace, **ratio, "zo_rollbacks": float(last.rollbacks)}
        super().log(logs, *more, **options)


class _Shell(Optimizer):
    """What the Trainer sees of a zeroth-order optimizer: its groups, and its state for checkpoints."""

    def __init__(self, optimizer: ZeroOrderOptimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups
        self._optimizer = optimizer
        self.auto: AutoLR | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there are no gradients."""

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer, and of the step size."""
        auto = None if self.auto is None else self.auto.state_dict()
        return {"optimizer": self._optimizer.state_dict(), "auto": auto}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        if "optimizer" not in state_dict:  # wrappers move an empty state to its device before there is one
            return
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self._optimizer.param_groups
        if self.auto is not None and state_dict["auto"] is not None:
            self.auto.load_state_dict(state_dict["auto"])


def overrides(trainer: Trainer, method: str) -> bool:
    """Whether a trainer has a method of its own, by its class or by assignment."""
    found = getattr(trainer, method)
    return getattr(found, "__func__", found) is not getattr(Trainer, method)


def _items(batch: Any, shifted: bool) -> int:
    """What the mean loss of a batch is over: tokens that count, else rows."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.ndim:
        return max(int((labels[:, 1:] if shifted and labels.ndim > 1 else labels).ne(IGNORED).sum()), 1)
    rows = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim), None) if labels is None else None
    return 1 if rows is None else len(rows)


def _family(name: str) -> str:
    """Family of an optimizer by any of its names."""
    for record in OPTIMIZERS.values():
        if name in (record.name, f"zo-{record.name}", *record.aliases):
            return record.name
    known = ", ".join(alias for record in OPTIMIZERS.values() for alias in (*record.aliases, f"zo-{record.name}"))
    raise UsageError(f"trainer: got {name!r}. Expected one of {known}.")
