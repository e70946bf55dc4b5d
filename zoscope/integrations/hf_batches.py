"""Batches of tokenised examples: collated once, labelled, and counted by the tokens that matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoscope.errors import SpecError
from zoscope.problem.user_code import user_code
from zoscope.runtime import preserved_rng

Task = Literal["auto", "causal-lm", "masked-lm", "sequence-classification", "token-classification", "other"]
Weighting = Literal["tokens", "examples"]
Batch = dict[str, Any]
Collator = Callable[[list[Any]], Mapping[str, Any]]

IGNORED = -100
"""Label of a token that does not count."""

_LABELS = ("labels", "label", "label_ids")


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

    def __call__(self, batch: Mapping[str, Any]) -> int:
        """The weight of a batch."""
        labels = batch.get("labels")
        by_token = isinstance(labels, Tensor) and labels.ndim >= 2 and not labels.is_floating_point()
        if isinstance(labels, Tensor) and by_token and self.task != "sequence-classification":
            # A causal model predicts every token but the first.
            counted = int((labels[:, 1:] if self.task == "causal-lm" else labels).ne(IGNORED).sum())
            return counted if self.weighting == "tokens" else (len(labels) if counted else 0)
        return self.examples_of(batch)

    def examples_of(self, batch: Mapping[str, Any]) -> int:
        """Its number of examples, whatever it weighs."""
        tensors = (value for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)
        return next((len(tensor) for tensor in tensors), 1)


def nothing_counts(batches: list[Batch]) -> str:
    """The message for batches that all weigh nothing."""
    if not batches:
        return "The dataset is empty: expected at least one example."
    return (
        f"All labels of the dataset are {IGNORED} (or belong to first tokens, which nothing predicts), so that its "
        "loss has no value: expected tokens that count. Check how prompts are masked, and whether texts are cut off "
        "before their answers."
    )
