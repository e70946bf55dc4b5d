"""Batches as a user gives them, and losses as functions of a model and a batch."""

import contextlib
import functools
import inspect
import itertools
import numbers
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoscope import runtime
from zoscope.errors import SpecError, ZoscopeError
from zoscope.problem import pytree as nest
from zoscope.runtime import preserved_rng

_OWN = str(Path(__file__).parent.parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")})
_MOST_FRAMES = 6


def user_frames(error: BaseException) -> traceback.StackSummary:
    """The frames of an error that are the user's: not zoscope's, not the interpreter's, not a library's.

    Where an error never passed through the user's own files, the innermost frame outside of zoscope is kept.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        frame = traceback.FrameSummary(
            error.filename, error.lineno, "<module>", line=(error.text or "").strip() or None
        )
        return traceback.StackSummary.from_list([frame])
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((_OWN, "<frozen ", "<string>"))]
    own = [f for f in outside if not f.filename.startswith(_LIBRARIES)]
    return traceback.StackSummary.from_list((own or outside[-1:])[-_MOST_FRAMES:])


def format_frames(error: BaseException) -> str:
    """The user's frames as in a traceback (file, line, source), without a final newline."""
    return "".join(user_frames(error).format()).rstrip()


def raised_by_user(error: BaseException) -> bool:
    """Whether an error was raised outside of zoscope, in words that are the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not frames[-1].filename.startswith(_OWN)


def where(error: BaseException) -> str:
    """Place of an error, such as `` (model.py, line 12)``; empty where unknown."""
    frames = user_frames(error)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def written_at(function: Any) -> str:
    """Place of a user's function, such as `` (model.py, line 12)``; empty for one of a library."""
    while (inner := _inside(function)) is not None:
        function = inner
    code = getattr(function, "__code__", None) or getattr(vars(type(function)).get("__call__"), "__code__", None)
    if code is None or code.co_filename.startswith((_OWN, "<", *_LIBRARIES)):
        return ""
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})"


def _inside(function: Any) -> Any:
    """What a wrapper around a user's function calls; None for the function itself."""
    if isinstance(function, (CriterionLoss, NumberLoss)):
        return function.criterion if isinstance(function, CriterionLoss) else function.loss
    if isinstance(function, functools.partial):
        return function.func
    return getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)


def called_from() -> str:
    """Line of the user's code that has called into zoscope, such as `` (model.py, line 12)``; empty where unknown."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(("<", *_LIBRARIES)):
        return ""
    return f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"


MOST_OF_MESSAGE = 1000
"""Characters of an error's message that are shown."""


def message_of(error: BaseException) -> str:
    """What an error says; empty where to ask it raises another one."""
    try:
        return str(error)
    except Exception:
        return ""


def described(error: BaseException) -> str:
    """Type and first paragraph of an error's message."""
    text = error.msg if isinstance(error, SyntaxError) else message_of(error)
    first = text.strip().split("\n\n")[0].replace("\n", " ")
    if len(first) > MOST_OF_MESSAGE:
        first = f"{first[:MOST_OF_MESSAGE]}…"
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@contextlib.contextmanager
def user_code(what: str, *, remedy: str | Callable[[BaseException], str]) -> Iterator[None]:
    """Turn what the user's code raises inside into a SpecError with the user's frame.

    Errors of zoscope itself and lack of memory pass through.

    Args:
        what: Subject of the sentence, e.g. ``"The loss function"``.
        remedy: Last sentence, or what makes one of an error, unless the error says more itself.
    """
    try:
        yield
    except ZoscopeError:
        raise
    except Exception as error:
        if runtime.is_out_of_memory(error):
            raise
        said = runtime.explain_autograd_error(error) or _hint(error) or (remedy(error) if callable(remedy) else remedy)
        raise SpecError(
            f"{what} raised {described(error)}{where(error)}. {said}", frame=format_frames(error)
        ) from error


def _hint(error: BaseException) -> str | None:
    text = message_of(error)
    if "call numpy() on Tensor that requires grad" in text:
        return "For a loss that leaves torch use 'zoscope bounds --curvature forward', which takes no derivatives."
    if re.search(r"same device|not on the expected device|device.*cuda.*cpu|device.*cpu.*cuda", text, re.DOTALL):
        return (
            "A tensor that is neither in the model nor in the batches lives on another device: "
            "register it as a buffer, put it into the batches, or use --device cpu."
        )
    if re.search(r"scalar type Long|to be Long|(long|int) or (byte|int)", text, re.IGNORECASE):
        return "Class labels and indices are integers: call .long() on them where the batches are made."
    if "same dtype" in text or "expected scalar type" in text:
        return (
            "A tensor that is neither in the model nor in the batches has another dtype: "
            "register it as a buffer, put it into the batches, or choose --dtype."
        )
    return None


_COMPARED = 8  # batches of a second pass: a shuffle or an augmentation shows in the first one already
_FIX_ORDER = "pass shuffle=False and no random augmentation, or fix one draw with batches=list(loader)"


def materialise(batches: Any, *, batch_size: int | None, place: str = "") -> list[Any]:
    """Read batches into a list.

    Args:
        batches: A list of batches, any iterable of batches, or a dataset in memory: a tensor, a tuple of tensors of one
            length, or a dict of such.
        batch_size: Examples per batch of a dataset in memory; None takes it as one batch.
        place: Where the problem was made, such as `` (model.py, line 12)``.

    Raises:
        SpecError: If there are no batches, a second pass over a loader yields others than the first, or tensors have
            no values.
    """
    found = _sliced(batches, batch_size) if _in_memory(batches) else _read(batches, batch_size, place)
    for index, batch in enumerate(found):
        if any(isinstance(item, Tensor) and item.is_meta for item in nest.leaves(batch)):
            raise SpecError(
                f"Batch {index} of {len(found)}{place} holds a tensor without values (meta device): expected one on "
                "the CPU or a GPU. Load the data into it; model and batches are moved to --device by themselves."
            )
    return found


def _read(batches: Any, batch_size: int | None, place: str) -> list[Any]:
    if batch_size is not None:
        raise SpecError(
            f"batch_size={batch_size} was given{place} with batches of type {type(batches).__name__}, which already "
            "are batches: leave batch_size out, or pass a tuple of tensors such as (inputs, targets)."
        )
    if isinstance(batches, Dataset):
        raise SpecError(
            f"batches is a dataset of type {type(batches).__name__}{place}, whose items are single examples: wrap it "
            "as torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, (str, bytes)) or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise SpecError(
            f"batches is of type {type(batches).__name__}{place}: expected a list of batches, a DataLoader, or a tuple "
            f"of tensors (inputs, targets) with batch_size.{_call_it(batches)}"
        )
    with (
        _loader_state_kept(batches),
        preserved_rng(),
        user_code("Iterating over the batches", remedy="Fix the loader."),
    ):
        found = list(batches)
        _same_twice(batches, found, place)
    if not found:
        used = " An iterator or generator that was used before is empty: make a list of it, batches=list(...), first."
        raise SpecError(
            f"batches is empty{place}: expected at least one batch.{used if isinstance(batches, Iterator) else ''}"
        )
    return found


def _call_it(batches: Any) -> str:
    name = getattr(batches, "__name__", "")
    return f" To use what {name} makes, call it: {name}()." if inspect.isgeneratorfunction(batches) else ""


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


def _same_twice(batches: Any, first: list[Any], place: str) -> None:
    if isinstance(batches, (list, tuple, Iterator)):
        return  # a sequence in memory, or a one-shot iterator that the first pass has used up
    again = list(itertools.islice(iter(batches), _COMPARED))
    if not again and first:
        return  # an iterator in disguise
    for index, (a, b) in enumerate(zip(first, again, strict=False)):
        if not nest.same(a, b):
            kind = "its sampler shuffles" if _shuffles(batches) else "it shuffles or augments at random"
            raise SpecError(
                f"Two passes over the {type(batches).__name__}{place} gave different batches (first in batch {index}): "
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


LossFunction = Callable[[nn.Module, Any], Tensor]
Metric = Callable[[nn.Module, Any], Tensor | float]


class CriterionLoss:
    """``criterion(model(x), y)`` as a loss of a model and a batch."""

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of one pair ``(x, y)``."""
        inputs, targets = pair(batch)
        return self.criterion(model(inputs), targets)


class NumberLoss:
    """A loss that may return a Python or NumPy number instead of a tensor, where no derivative is wanted."""

    def __init__(self, loss: LossFunction) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch; a number becomes a float64 scalar on the CPU."""
        value: Any = self.loss(model, batch)
        return torch.tensor(float(value), dtype=torch.float64) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    """Whether a value is a real number that can vary continuously: counts and truth values cannot."""
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind == "f"
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)


class LossModule(nn.Module):
    """Makes ``loss(model, batch)`` a forward pass, so that torch can run it with other parameter tensors."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        return self.loss(self.model, batch)


def pair(batch: Any) -> tuple[Any, Any]:
    """Take ``(inputs, targets)`` apart.

    Raises:
        SpecError: If the batch is something else.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)} items" if isinstance(batch, (tuple, list)) else ""
    raise SpecError(
        f"A batch is a {type(batch).__name__}{size}: Problem.from_criterion expects pairs (inputs, targets). For a "
        "dataset in memory pass a tuple (inputs, targets), not a list, which is read as a list of batches; for other "
        "batches use Problem(model, batches, loss) with loss(model, batch)."
    )
