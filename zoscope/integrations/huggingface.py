"""A problem from a ``transformers`` model and a tokenised dataset, with the loss that ``Trainer`` would minimise.

Works with plain models and with ``peft`` ones. Neither library is imported here: their models bring them along.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoscope.errors import SpecError
from zoscope.integrations.hf_batches import IGNORED, Collator, Counted, Task, Weighting, make_batches, nothing_counts
from zoscope.problem import Problem
from zoscope.problem.model import wrapped

__all__ = ["HeadLoss", "problem_from_transformers"]

_SUFFIXES: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}
_HALF = (torch.bfloat16, torch.float16)


def problem_from_transformers(
    model: nn.Module,
    dataset: Any,
    *,
    collator: Collator | None = None,
    batch_size: int = 8,
    params: str | None = None,
    task: Task = "auto",
    weighting: Weighting = "tokens",
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Problem:
    """The loss of a language model on a dataset, as a problem for every command of zoscope.

    The loss is the model's own, in eval mode (no dropout), without a key-value cache, and in float32 from
    half-precision logits on. Batches are made once, here, so that a collator that masks at random gives one fixed draw.

    Varied are the parameters with ``requires_grad``: all of an ordinary model, with tied embeddings counted once, and
    the adapter or prefix of a ``peft`` one. Attention with fused kernels uses the plain one where second derivatives
    are taken. Gradient checkpointing is not active in eval mode; it saves second derivatives little (micro-batches do).

    Args:
        model: A ``transformers`` model with a head, or ``peft`` around one; in any mode, which it keeps.
        dataset: Tokenised examples: anything with a length and items that are mappings, such as a list or a
            ``datasets.Dataset``; or a DataLoader, whose batches are taken as they are. Columns that the model does not
            know are left out, as ``Trainer`` does.
        collator: From a list of examples to a batch, such as ``DataCollatorForLanguageModeling``. By default examples
            are padded on the right, labels with -100; a causal language model without labels predicts its input.
        batch_size: Examples per batch, the unit that is evaluated at a time.
        params: Regular expression on parameter names, instead of ``requires_grad``.
        task: What the head does; by default read from the class name. ``"other"`` leaves everything to the model.
        weighting: What the mean is over. ``"tokens"``: all tokens that count, however they are batched, as in
            ``Trainer`` over the micro-batches of one step. ``"examples"``: batches by their size, whatever number of
            tokens counts in each, as in the average of ``Trainer``'s losses with one batch per step. Where labels
            belong to whole examples the two are the same.
        label_smoothing: Part of each label that is spread evenly over all classes, or tokens of the vocabulary:
            ``label_smoothing_factor`` of ``TrainingArguments``.
        seed: Of what a collator draws from the global generators; those come back as they were.

    Returns:
        The problem; its batches are dicts of tensors.

    Raises:
        ValueError: If an argument is outside of its range.
        SpecError: If the model or the dataset cannot be used.
    """
    _require("task", task, get_args(Task))
    _require("weighting", weighting, get_args(Weighting))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    head = _head(model)
    task = _task_of(head) if task == "auto" else task
    if label_smoothing and task == "other":
        raise SpecError(
            f"label_smoothing={label_smoothing} needs to know what the head of {type(head).__name__} does: pass task=, "
            f"one of {', '.join(_SUFFIXES.values())}."
        )
    names = frozenset(inspect.signature(head.forward).parameters)
    pad = getattr(getattr(head, "config", None), "pad_token_id", None)
    batches = make_batches(
        dataset, collator=collator, batch_size=batch_size, names=names, pad=pad, task=task, seed=seed
    )
    count = Counted(task, weighting)
    counted = [batch for batch in batches if count(batch) > 0]
    if not counted:
        raise SpecError(nothing_counts(batches))
    extra = {"use_cache": False} if "use_cache" in names and not _has_prefix(model) else {}
    loss = HeadLoss(task, extra=extra, label_smoothing=label_smoothing)
    problem = Problem(model, counted, loss, params=params, batch_size_of=count)
    problem.name = type(head).__name__
    return problem


@dataclass(frozen=True)
class HeadLoss:
    """Mean loss of a batch of a ``transformers`` model.

    Args:
        task: What its head does.
        extra: Further arguments of its forward pass.
        label_smoothing: Part of each label that is spread over all of them.
    """

    task: Task
    extra: Mapping[str, Any]
    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss, in float32 at least where the task is known."""
        if any(module.training for module in model.modules()):
            model.eval()  # in a session, which puts modes back
        output = model(**batch, **self.extra)
        loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output[0]
        if loss is None:
            raise SpecError(
                f"{type(_head(model)).__name__} returned no loss: expected a model with a head, such as "
                "AutoModelForCausalLM or AutoModelForSequenceClassification, and batches with labels."
            )
        # Some heads go to float32 for their loss (most causal ones), some do not (BERT's).
        half = loss.dtype in _HALF and self.task != "other" and isinstance(output, Mapping)
        if not (half or self.label_smoothing):
            return loss
        logits = output["logits"] if isinstance(output, Mapping) else output[1]
        return self._of(logits.float() if logits.dtype in _HALF else logits, batch["labels"], _head(model).config)

    def _of(self, logits: Tensor, labels: Tensor, config: Any) -> Tensor:
        """As ``transformers`` defines it; of classification by the kind of problem that a model notes in its config."""
        kind = config.problem_type if self.task == "sequence-classification" else None
        if self.label_smoothing and kind in ("regression", "multi_label_classification"):
            raise SpecError(f"label_smoothing={self.label_smoothing} is for labels that are classes; here: {kind}.")
        if kind == "regression":
            return functional.mse_loss(logits.view(labels.shape), labels.float())
        if kind == "multi_label_classification":
            return functional.binary_cross_entropy_with_logits(logits, labels.float())
        if logits.dim() == 3:  # the prompt that peft tunes stands in front, and no label counts there
            labels = functional.pad(labels, (max(logits.shape[1] - labels.shape[1], 0), 0), value=IGNORED)
        if self.task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
        )


def _require(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _head(model: Any) -> nn.Module:
    """The ``transformers`` model inside of what ``peft``, ``torch.compile`` and others wrap around it."""
    bare = model
    while isinstance(bare, nn.Module) and (inner := wrapped(bare)) is not None:
        bare = inner
    if callable(getattr(bare, "get_base_model", None)):
        bare = bare.get_base_model()
    if not isinstance(bare, nn.Module) or not hasattr(bare, "config"):
        raise SpecError(
            f"model is of type {type(model).__name__}: expected a transformers model, which has a config, or a peft "
            "model around one. For other modules use zoscope.Problem(model, batches, loss)."
        )
    return bare


def _has_prefix(model: nn.Module) -> bool:
    """Whether ``peft`` passes a trained prefix through the key-value cache, which then must stay on."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _task_of(head: nn.Module) -> Task:
    for kind in type(head).__mro__:
        for suffix, task in _SUFFIXES.items():
            if kind.__name__.endswith(suffix):
                return task
    return "other"
