"""Problems from models and data sets of ``transformers``."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from zoscope.errors import SpecError
from zoscope.problem import Problem
from zoscope.problem.data import user_code
from zoscope.problem.model import wrapped
from zoscope.runtime import preserved_rng

Task = Literal["auto", "causal-lm", "masked-lm", "sequence-classification", "token-classification", "other"]
Weighting = Literal["tokens", "examples"]
Batch = dict[str, Any]
Collator = Callable[[list[Any]], Mapping[str, Any]]

IGNORED = -100
"""Label of a token that does not count."""

_LABELS = ("labels", "label", "label_ids")
_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # kinds of peft whose tokens are keys and values, which predict nothing


def make_batches(
    dataset: Any,
    *,
    collator: Collator | None,
    batch_size: int,
    names: frozenset[str],
    pad: int | None,
    task: Task,
    seed: int,
) -> list[Batch]:
    """Batches of a dataset as dicts of what the model takes, with labels.

    Args:
        dataset: Examples with a length, or a DataLoader.
        collator: From examples to a batch; None pads on the right.
        batch_size: Examples per batch.
        names: What the model takes.
        pad: Token that fills up.
        task: What the labels are for.
        seed: Of what a collator draws from the global generators.

    Raises:
        SpecError: If the dataset cannot be read, or has no labels.
    """
    collate = collator or _Padding(names, pad)
    with _seeded(seed), user_code("Making batches of the dataset", remedy="Its items are tokenised examples."):
        batches = [_readable(batch, names) for batch in _collated(dataset, collate, batch_size)]
    return [_labelled(batch, task, default=collator is None) for batch in batches]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let code that draws from the global generators start from a seed; they come back as they were."""
    with preserved_rng():
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed).get_state())  # noqa: NPY002 - collators may draw from it
        yield


def _collated(dataset: Any, collate: Collator, batch_size: int) -> Iterable[Mapping[str, Any]]:
    if isinstance(dataset, DataLoader):
        yield from dataset
        return
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, (str, Mapping)):
        raise SpecError(
            f"dataset is of type {type(dataset).__name__}: expected tokenised examples with a length, such as a list "
            "of dicts or a datasets.Dataset; take a fixed part of a stream with list(itertools.islice(stream, 256))."
        )
    examples = [dataset[index] for index in range(len(dataset))]
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size])


@dataclass(frozen=True)
class _Padding:
    """Makes a batch of examples of different lengths, padded on the right."""

    names: frozenset[str]
    pad: int | None

    def __call__(self, examples: list[Any]) -> Batch:
        for example in examples:
            if not isinstance(example, Mapping):
                raise SpecError(
                    f"An example of the dataset is a {type(example).__name__}: expected a mapping with input_ids, as a "
                    "tokenizer returns."
                )
        columns = [name for name in examples[0] if name in self.names or name in _LABELS]
        if not set(columns).difference(_LABELS):
            raise SpecError(
                f"The dataset has the columns {', '.join(map(str, examples[0]))}, and no input that the model takes: "
                "tokenise it first, for example [tokenizer(text) for text in texts]."
            )
        batch = {name: [torch.as_tensor(example[name]) for example in examples] for name in columns}
        ids = batch.get("input_ids")
        if ids is not None and "attention_mask" not in batch and len({len(row) for row in ids}) > 1:
            batch["attention_mask"] = [torch.ones_like(row) for row in ids]
        return {name: _joined(rows, self._filler(name)) for name, rows in batch.items()}

    def _filler(self, name: str) -> int:
        if name in _LABELS:
            return IGNORED
        return (self.pad or 0) if name == "input_ids" else 0  # what is padded is masked, whatever stands there


def _joined(rows: list[Tensor], filler: int) -> Tensor:
    if rows[0].ndim == 0:
        return torch.stack(rows)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)


def _readable(batch: Any, names: frozenset[str]) -> Batch:
    """A collated batch as a plain dict of what the model takes."""
    if not isinstance(batch, Mapping):
        raise SpecError(f"The collator returned a {type(batch).__name__}: expected a mapping of tensors.")
    found = {"labels" if name in _LABELS else name: value for name, value in batch.items()}
    return {name: value for name, value in found.items() if name in names and value is not None}


def _labelled(batch: Batch, task: Task, *, default: bool) -> Batch:
    """A batch with labels; a causal language model has its own input as default."""
    if isinstance(batch.get("labels"), Tensor) or task == "other":
        return batch
    if task == "causal-lm" and default and "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        return {**batch, "labels": ids if mask is None else ids.masked_fill(mask == 0, IGNORED)}
    remedy = {
        "masked-lm": "pass collator=DataCollatorForLanguageModeling(tokenizer), which masks tokens, once",
        "causal-lm": "let the collator make them, or leave it out",
    }.get(task, "add the column 'labels' to the dataset")
    raise SpecError(f"The batches have no labels: expected a tensor 'labels' for {task}; {remedy}.")


@dataclass(frozen=True)
class Counted:
    """What a batch weighs: its tokens that count, or its examples; 0 where nothing in it counts."""

    task: Task
    weighting: Weighting
    prompted: bool = False
    """Whether trained embeddings in front of the text predict its first token."""

    @property
    def shifted(self) -> bool:
        """Whether nothing predicts first tokens, as in a causal model by itself."""
        return self.task == "causal-lm" and not self.prompted

    def __call__(self, batch: Mapping[str, Any]) -> int:
        """The weight of a batch."""
        labels = batch.get("labels")
        by_token = isinstance(labels, Tensor) and labels.ndim >= 2 and not labels.is_floating_point()
        if isinstance(labels, Tensor) and by_token and self.task != "sequence-classification":
            counted = int((labels[:, 1:] if self.shifted else labels).ne(IGNORED).sum())
            return counted if self.weighting == "tokens" else (len(labels) if counted else 0)
        return self.examples_of(batch)

    def examples_of(self, batch: Mapping[str, Any]) -> int:
        """Its number of examples, whatever it weighs."""
        tensors = (value for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)
        return next((len(tensor) for tensor in tensors), 1)


def count_of(model: Any, task: Task, weighting: Weighting) -> Counted:
    """What batches of a model weigh: as its loss, a mean over what counts."""
    config = _prompt_config(model)
    return Counted(task, weighting, config is not None and config.peft_type not in _IN_CACHE)


def nothing_counts(batches: list[Batch]) -> str:
    """The message for batches that all weigh nothing."""
    if not batches:
        return "The dataset is empty: expected at least one example."
    return (
        f"All labels of the dataset are {IGNORED} (or belong to first tokens, which nothing predicts), so that its "
        "loss has no value: expected tokens that count. Check how prompts are masked, and whether texts are cut off "
        "before their answers."
    )


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
    task = task_of(head) if task == "auto" else task
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
    count = count_of(model, task, weighting)
    counted = [batch for batch in batches if count(batch) > 0]
    if not counted:
        raise SpecError(nothing_counts(batches))
    extra = {"use_cache": False} if "use_cache" in names and _prompt_config(model) is None else {}
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


def _prompt_config(model: Any) -> Any:
    """How ``peft`` trains tokens in front of the text, if it does; a prefix needs the key-value cache to stay on."""
    bare = model
    while isinstance(bare, nn.Module) and (inner := wrapped(bare)) is not None:
        bare = inner
    config = getattr(bare, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None


def task_of(head: nn.Module) -> Task:
    """What the head of a model does, by the name of its class."""
    for kind in type(head).__mro__:
        for suffix, task in _SUFFIXES.items():
            if kind.__name__.endswith(suffix):
                return task
    return "other"
