"""Functions that all ranks of a job run together, and how their arguments travel."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from zoscope.runtime.process_group import DroppedError, Ranks

if TYPE_CHECKING:
    P = ParamSpec("P")
T = TypeVar("T")


class Twin:
    """An object of which every rank has its own: an argument of a collective function is the own one on every rank.

    Where all ranks have made it together, `Ranks.keep` says so. Otherwise the others make theirs from `recipe` when a
    function first gets it.
    """

    def recipe(self) -> tuple[Any, ...]:
        """Arguments with which another rank makes it."""
        raise NotImplementedError

    def news(self) -> Any:
        """What has changed here since the others last got it; on rank 0."""

    def learn(self, news: Any) -> None:
        """Take what has changed on rank 0."""


def collective(work: Callable[P, T]) -> Callable[P, T]:
    """Have all ranks run a function that rank 0 calls, with the same arguments.

    The attribute ``ranks`` of the first argument says which ranks these are. Positional arguments travel: tensors over
    the fastest way there is, a `Twin` as the one that a rank has itself, and all else pickled. Keyword arguments stay
    on rank 0; the others see the defaults. What the function returns counts on rank 0.
    """

    @functools.wraps(work)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        subject: Any = args[0]
        ranks: Ranks = subject.ranks
        if not ranks.leads or ranks.together:
            return work(*args, **kwargs)
        _announce(ranks, call, args)
        ranks.together = True
        try:
            return work(*args, **kwargs)
        finally:
            ranks.together = False

    return call


def serve(ranks: Ranks) -> int:
    """Run what rank 0 runs, until it says stop; the exit code that goes with it."""
    while True:
        message = ranks.receive()
        if len(message) == 1:
            if ranks.watch is not None:
                ranks.watch.ending = True
            return message[0]
        try:
            _follow(ranks, message)
        except DroppedError:
            continue


def _announce(ranks: Ranks, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    registry, body = ranks.registry, io.BytesIO()
    writer = _Writer(body, ranks)
    writer.dump((work, args))
    gone, registry.gone = registry.gone, []
    kinds = [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in writer.tensors]
    ranks.send(pickle.dumps((gone, registry.next, kinds, body.getvalue())))
    for tensor in writer.tensors:
        ranks.share(tensor)


def _follow(ranks: Ranks, message: bytes) -> None:
    gone, ranks.registry.next, kinds, body = pickle.loads(message)
    for number in gone:
        ranks.registry.items.pop(number, None)
    tensors = [ranks.share(torch.empty(shape, dtype=dtype, device=device)) for shape, dtype, device in kinds]
    work, args = _Reader(io.BytesIO(body), ranks, tensors).load()
    work(*args)


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, ranks: Ranks) -> None:
        super().__init__(file)
        self._ranks = ranks
        self.tensors: list[Tensor] = []

    def persistent_id(self, item: Any) -> tuple[Any, ...] | None:
        if isinstance(item, Ranks):
            return ("ranks",)
        if isinstance(item, Tensor):
            self.tensors.append(item.detach().contiguous())
            return ("tensor", len(self.tensors) - 1)
        number = self._ranks.registry.numbers.get(id(item))
        if isinstance(item, Twin):
            if number is None:
                return ("twin", self._ranks.registry.count(item), item.news(), (type(item), item.recipe()))
            return ("twin", number, item.news(), None)
        return None if number is None else ("twin", number, None, None)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, ranks: Ranks, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._ranks, self._tensors = ranks, tensors

    def persistent_load(self, said: tuple[Any, ...]) -> Any:
        if said[0] == "ranks":
            return self._ranks
        if said[0] == "tensor":
            return self._tensors[said[1]]
        _, number, news, recipe = said
        if recipe is not None:
            kind, args = recipe
            self._ranks.registry.items[number] = kind(*args)
        item = self._ranks.registry.items[number]
        if news is not None:
            item.learn(news)
        return item
