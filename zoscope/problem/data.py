"""Batches as a user gives them, read once into a list and checked."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoscope.errors import SpecError
from zoscope.problem import nest
from zoscope.problem.user_code import user_code
from zoscope.runtime import preserved_rng

_COMPARED = 8  # batches of a second pass: a shuffle or an augmentation shows in the first one already
_FIX_ORDER = "pass shuffle=False and no random augmentation, or fix one draw with batches=list(loader)"


def materialise(batches: Any, *, batch_size: int | None) -> list[Any]:
    """Read batches into a list.

    Args:
        batches: A list of batches, any iterable of batches, or a dataset in memory: a tensor, a tuple of tensors of one
            length, or a dict of such.
        batch_size: Examples per batch of a dataset in memory; None takes it as one batch.

    Raises:
        SpecError: If there are no batches, or a second pass over a loader yields others than the first.
    """
    if _in_memory(batches):
        return _sliced(batches, batch_size)
    if batch_size is not None:
        raise SpecError(
            f"batch_size={batch_size} was given with batches of type {type(batches).__name__}, which already are "
            "batches: leave batch_size out, or pass a tuple of tensors such as (inputs, targets)."
        )
    if isinstance(batches, Dataset):
        raise SpecError(
            f"batches is a dataset ({type(batches).__name__}), whose items are single examples: wrap it as "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, (str, bytes)) or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise SpecError(
            f"batches is of type {type(batches).__name__}: expected a list of batches, a DataLoader, or a tuple of "
            "tensors (inputs, targets) with batch_size."
        )
    with (
        _loader_state_kept(batches),
        preserved_rng(),
        user_code("Iterating over the batches", remedy="Fix the loader."),
    ):
        found = list(batches)
        _same_twice(batches, found)
    if not found:
        raise SpecError(
            "batches is empty: expected at least one batch (an iterator that was used before is empty too)."
        )
    return found


def _in_memory(batches: Any) -> bool:
    if isinstance(batches, (Tensor, Mapping)):
        return True
    return isinstance(batches, tuple) and len(batches) > 0 and all(isinstance(item, Tensor) for item in batches)


def _sliced(data: Any, batch_size: int | None) -> list[Any]:
    tensors = [item for item in nest.leaves(data) if isinstance(item, Tensor) and item.ndim > 0]
    lengths = sorted({int(item.shape[0]) for item in tensors})
    if len(lengths) > 1 and not isinstance(data, Mapping):
        raise SpecError(
            f"batches is a tuple of tensors of different lengths {lengths}: expected (inputs, targets) with one row "
            "per example each, or a list of batches."
        )
    if batch_size is None:
        return [data]
    if batch_size < 1:
        raise SpecError(f"batch_size={batch_size}: expected at least 1.")
    rows = nest.leading_dimension(data)
    if not rows:
        raise SpecError("batches holds no examples: expected tensors with one row per example.")
    sizes = [min(batch_size, rows - start) for start in range(0, rows, batch_size)]
    pieces = nest.split(data, sizes)
    if pieces is None:
        raise SpecError(f"batches of type {type(data).__name__} cannot be cut into parts of {batch_size} examples.")
    return pieces


def _same_twice(batches: Any, first: list[Any]) -> None:
    if isinstance(batches, (list, tuple, Iterator)):
        return  # a sequence in memory, or a one-shot iterator that the first pass has used up
    again = list(itertools.islice(iter(batches), _COMPARED))
    if not again and first:
        return  # an iterator in disguise
    for index, (a, b) in enumerate(zip(first, again, strict=False)):
        if not nest.same(a, b):
            kind = "its sampler shuffles" if _shuffles(batches) else "it shuffles or augments at random"
            raise SpecError(
                f"Two passes over the {type(batches).__name__} gave different batches (first in batch {index}): "
                f"{kind}, so the loss is not one function. To measure it, {_FIX_ORDER}."
            )


def _shuffles(batches: Any) -> bool:
    return "Random" in type(getattr(batches, "sampler", None)).__name__


@contextmanager
def _loader_state_kept(batches: Any) -> Iterator[None]:
    """Give the generators that belong to a DataLoader back as they were."""
    owners = [batches, getattr(batches, "sampler", None)] if isinstance(batches, DataLoader) else []
    generators = {id(g): g for owner in owners if (g := getattr(owner, "generator", None)) is not None}
    states = [(g, g.get_state()) for g in generators.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def count_examples(batches: list[Any], batch_size_of: Callable[[Any], int] | None) -> list[int]:
    """Examples of each batch, the weights of their losses.

    Raises:
        SpecError: For a batch of zero examples, or a ``batch_size_of`` that returns no positive integer.
    """
    counts = []
    for index, batch in enumerate(batches):
        count = examples_in(batch, batch_size_of)
        if count < 1:
            raise SpecError(
                f"Batch {index} of {len(batches)} holds {count} examples: expected at least one. Leave it out."
            )
        counts.append(count)
    return counts


def number_of_examples(batches: list[Any], counts: list[int], batch_size_of: Callable[[Any], int] | None) -> int:
    """Examples of all batches: what they count for, unless they are weighed by something else.

    A ``batch_size_of`` that weighs batches by their tokens, say, has a method ``examples_of(batch)`` besides.
    """
    examples_of = getattr(batch_size_of, "examples_of", None)
    return sum(counts) if examples_of is None else sum(map(examples_of, batches))


def examples_in(batch: Any, batch_size_of: Callable[[Any], int] | None) -> int:
    """Examples of one batch: what the user's function says, else the first leading dimension; one without tensors."""
    if batch_size_of is None:
        found = nest.leading_dimension(batch)
        return 1 if found is None else found
    with user_code("batch_size_of", remedy="It is called with one batch and returns its number of examples."):
        value = batch_size_of(batch)
    try:
        count = int(value)
    except (TypeError, ValueError) as error:
        raise SpecError(f"batch_size_of returned {value!r}: expected the number of examples, an integer.") from error
    if count != value:
        raise SpecError(f"batch_size_of returned {value!r}: expected the number of examples, an integer.")
    return count
