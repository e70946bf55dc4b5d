"""Batches as pytrees: tensors inside of tuples, lists, dicts, BatchEncodings and dataclasses, in any depth."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Leaf = Callable[[Any], Any]


def map_leaves(nest: Any, leaf: Leaf) -> Any:
    """Rebuild a nest of the same types with ``leaf`` applied to everything that is not a container."""
    if isinstance(nest, (Tensor, np.ndarray, str, bytes, PackedSequence)):
        return leaf(nest)
    if isinstance(nest, Mapping):
        return _rebuilt_mapping(nest, {key: map_leaves(value, leaf) for key, value in nest.items()})
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_leaves(item, leaf) for item in nest))
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_leaves(item, leaf) for item in nest)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        changed = {f.name: map_leaves(getattr(nest, f.name), leaf) for f in dataclasses.fields(nest) if f.init}
        return dataclasses.replace(nest, **changed)
    return leaf(nest)


def _rebuilt_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return items
    try:  # BatchEncoding, UserDict, OrderedDict and others keep their type and whatever else they carry
        out: Any = copy.copy(original)
        for key, value in items.items():
            out[key] = value
    except Exception:
        return items
    return out


def leaves(nest: Any) -> Iterator[Any]:
    """Everything in a nest that is not a container, in order."""
    if isinstance(nest, (Tensor, np.ndarray, str, bytes, PackedSequence)):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from leaves(value)
    elif isinstance(nest, (list, tuple)):
        for item in nest:
            yield from leaves(item)
    elif dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        for f in dataclasses.fields(nest):
            yield from leaves(getattr(nest, f.name))
    else:
        yield nest


def outlined(nest: Any, *, most: int = 4) -> str:
    """What is in a nest, in a few words: ``(tensor 12 × 3, tensor 12 of int64)``.

    Args:
        nest: Any.
        most: Items of a container that are listed.
    """
    if isinstance(nest, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(nest, Tensor) else "NumPy array"
        dtype = str(nest.dtype).removeprefix("torch.")
        if isinstance(nest, Tensor) and nest.is_nested:  # it has no shape
            shape = f"{nest.size(0)} × …"
        else:
            shape = " × ".join(map(str, nest.shape)) or "scalar"
        return f"{kind} {shape}" + ("" if dtype.startswith(("float", "bfloat")) else f" of {dtype}")
    if isinstance(nest, str):
        return "text"
    more = ", …" if isinstance(nest, (Mapping, list, tuple)) and len(nest) > most else ""
    if isinstance(nest, Mapping):
        items = itertools.islice(nest.items(), most)
        return "{" + ", ".join(f"{key}: {outlined(value)}" for key, value in items) + more + "}"
    if isinstance(nest, (list, tuple)):
        if len(nest) > 1 and all(isinstance(item, str) for item in nest):
            return f"{len(nest)} texts"
        opening, closing = "()" if isinstance(nest, tuple) else "[]"
        return opening + ", ".join(outlined(item) for item in nest[:most]) + more + closing
    return type(nest).__name__


def leading_dimension(nest: Any) -> int | None:
    """Length of the first tensor or array with a leading dimension; None where a nest has none."""
    for item in leaves(nest):
        if isinstance(item, PackedSequence):
            return int(item.batch_sizes[0])
        if isinstance(item, (Tensor, np.ndarray)) and item.ndim > 0:
            return int(item.size(0) if isinstance(item, Tensor) else item.shape[0])  # nested tensors have no shape
    return None


def same(a: Any, b: Any) -> bool:
    """Whether two nests hold the same values; NaN equals NaN."""
    first, second = list(leaves(a)), list(leaves(b))
    return len(first) == len(second) and all(_same_leaf(x, y) for x, y in zip(first, second, strict=True))


def _same_leaf(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, PackedSequence) and isinstance(y, PackedSequence):
        return _same_leaf(x.data, y.data) and _same_leaf(x.batch_sizes, y.batch_sizes)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.is_nested or y.is_nested:
            return x.is_nested and y.is_nested and same(x.unbind(), y.unbind())
        if x.shape != y.shape or x.dtype != y.dtype or x.layout != torch.strided:
            return x.layout != torch.strided and x.layout == y.layout and x.shape == y.shape
        return bool(
            torch.equal(x, y) or (torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num()))
        )
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return bool(np.array_equal(x, y, equal_nan=x.dtype.kind in "fc" and y.dtype.kind in "fc"))
    if type(x) is not type(y):
        return False
    if type(x).__eq__ is object.__dict__["__eq__"]:
        return True  # an object without a notion of equality proves no difference
    try:
        return bool(x == y)
    except Exception:
        return True


def moved(nest: Any, *, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A nest on ``device``, floating tensors in ``dtype``, others in their own type; no copy where nothing changes.

    Tensors made under ``torch.inference_mode`` are cloned: they cannot take part in a derivative.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            item = item.clone() if item.is_inference() else item
            return item.to(device, dtype) if item.is_floating_point() else item.to(device)
        if isinstance(item, PackedSequence):
            packed: Any = item  # its .to has narrower annotations than it accepts
            return packed.to(device, dtype) if item.data.is_floating_point() else packed.to(device)
        if isinstance(item, np.ndarray) or not callable(getattr(item, "to", None)):
            return item
        return item.to(device)

    return map_leaves(nest, leaf)


def cloned(nest: Any) -> Any:
    """A nest with tensors of its own, whose values and attributes are the same."""

    def leaf(item: Any) -> Any:
        if isinstance(item, PackedSequence):
            return item._replace(data=item.data.clone())
        if not isinstance(item, Tensor):
            return item
        copied = item.detach().clone().requires_grad_(item.requires_grad)
        if type(item) is Tensor:  # others may keep their numbers there
            vars(copied).update(vars(item))
        return copied

    return map_leaves(nest, leaf)


def versions(nest: Any) -> list[int]:
    """How often each tensor of a nest has been written to."""
    tensors = (item.data if isinstance(item, PackedSequence) else item for item in leaves(nest))
    return [tensor._version for tensor in tensors if isinstance(tensor, Tensor)]


def split(nest: Any, sizes: Sequence[int]) -> list[Any] | None:
    """Cut a nest along its examples.

    What has ``sum(sizes)`` examples is cut: tensors and arrays by their leading dimension, lists that hold one item per
    example. The rest is shared by the pieces.

    Returns:
        The pieces, or None if nothing in the nest can be cut.
    """
    rows = sum(sizes)
    bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    if not _has_rows(nest, rows) or any(isinstance(x, PackedSequence) for x in leaves(nest)):
        return None
    return [_piece(nest, rows, int(a), int(b)) for a, b in itertools.pairwise(bounds)]


def _has_rows(nest: Any, rows: int) -> bool:
    if isinstance(nest, Tensor):
        return nest.layout == torch.strided and not nest.is_nested and nest.ndim > 0 and nest.shape[0] == rows
    if isinstance(nest, np.ndarray):
        return nest.ndim > 0 and nest.shape[0] == rows
    if isinstance(nest, Mapping):
        return any(_has_rows(value, rows) for value in nest.values())
    if isinstance(nest, (list, tuple)):
        return any(_has_rows(item, rows) for item in nest) or (not hasattr(nest, "_fields") and len(nest) == rows)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return any(_has_rows(getattr(nest, f.name), rows) for f in dataclasses.fields(nest))
    return False


def rows(nest: Any, indices: Tensor, *, of: int) -> Any:
    """The examples of a nest at ``indices`` ``(k,)``; what has no ``of`` examples is shared."""
    return _selected(nest, of, indices)


def joined(nests: Sequence[Any]) -> Any:
    """Nests of one shape as one, their tensors and arrays end to end; what is neither comes from the first.

    Raises:
        RuntimeError: If tensors do not fit together (from torch).
        ValueError: If the nests have different leaves, or arrays do not fit together.
    """
    columns = zip(*(leaves(nest) for nest in nests), strict=True)
    merged = iter([_joined_leaf(column) for column in columns])
    return map_leaves(nests[0], lambda _: next(merged))


def _joined_leaf(column: tuple[Any, ...]) -> Any:
    if isinstance(column[0], Tensor) and column[0].ndim > 0:
        return torch.cat(column)
    return np.concatenate(column) if isinstance(column[0], np.ndarray) and column[0].ndim > 0 else column[0]


def _piece(nest: Any, rows: int, start: int, stop: int) -> Any:
    return _selected(nest, rows, slice(start, stop))


def _selected(nest: Any, rows: int, which: slice | Tensor) -> Any:
    if not _has_rows(nest, rows):
        return nest
    if isinstance(nest, Tensor):
        return nest[which] if isinstance(which, slice) else nest.index_select(0, which.to(nest.device))
    if isinstance(nest, np.ndarray):
        return nest[which if isinstance(which, slice) else which.numpy()]
    if isinstance(nest, Mapping):
        return _rebuilt_mapping(nest, {key: _selected(value, rows, which) for key, value in nest.items()})
    if isinstance(nest, (list, tuple)):
        if not any(_has_rows(item, rows) for item in nest):
            return nest[which] if isinstance(which, slice) else type(nest)(nest[i] for i in which.tolist())
        items = [_selected(item, rows, which) for item in nest]
        return type(nest)(*items) if hasattr(nest, "_fields") else type(nest)(items)
    fields = {f.name: _selected(getattr(nest, f.name), rows, which) for f in dataclasses.fields(nest) if f.init}
    return dataclasses.replace(nest, **fields)
