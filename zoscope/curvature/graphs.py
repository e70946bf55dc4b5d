"""Graphs of gradients that many products share: which are kept, and when a batch is better taken in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoscope.curvature.hvp import Products
from zoscope.problem import Objective, Shard
from zoscope.runtime import available_memory, held_memory, is_limited

KEPT_SHARE = 0.25
"""Part of the free memory that the graphs of several micro-batches may take; a product then costs no forward pass."""

PIECE_BYTES = 2**27
"""Graph of a piece. Products of a CNN with 1,000 images, of 32 channels of 32×32 pixels, take half of the time in
pieces of 80: intermediate results fit in the cache, and their memory is not fetched from the system again and again."""

TRIED = 4
"""Examples whose graph is measured."""

PAYS = 0.9
"""Time of the pieces, in units of the whole, below which they are used."""


def room_for_graphs(device: torch.device) -> float:
    """Bytes that the graphs of several micro-batches may take; none within a memory limit, which is for vectors."""
    return 0.0 if is_limited() else KEPT_SHARE * available_memory(device)


class Graphs:
    """The graphs of the shards that products are being computed with.

    Args:
        objective: The prepared problem.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._kept: dict[int, Products] = {}
        self._shards: Sequence[Shard] = ()
        self._versions: tuple[int, ...] = ()  # of the parameters for which they were built
        self._all = True
        self._before = 0
        self._room = 0.0

    def are_for(self, shards: Sequence[Shard], *, all_of_them: bool) -> None:
        """Drop them if they are not for these shards, or the parameters have moved.

        Args:
            shards: A sequence that is the same object from product to product.
            all_of_them: Whether to keep every graph, as the pieces of one batch; else as many as there is room for.
        """
        versions = tuple(p._version for p in self._objective.params)
        if shards is not self._shards or versions != self._versions:
            self.clear()
            self._shards, self._versions = shards, versions
            self._all = all_of_them or len(shards) == 1
            self._room = 0.0 if self._all else room_for_graphs(self._objective.device)

    def of(self, index: int, make: Callable[[], Products]) -> Products:
        """The graph of a shard: an old one, or a new one that is kept if it fits."""
        kept = self._kept.get(index)
        if kept is None:
            kept = make()
            if self._all or held_memory(self._objective.device) - self._before <= self._room:
                self._kept[index] = kept
        return kept

    def put(self, index: int, products: Products) -> None:
        """Replace one."""
        self._kept[index] = products

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()
        self._shards, self._versions = (), ()
        self._before = held_memory(self._objective.device)


def smaller_pieces(objective: Objective) -> tuple[Shard, ...] | None:
    """The only batch in pieces for which products may be faster on a CPU.

    Args:
        objective: The prepared problem.

    Returns:
        ``None`` where there is nothing to gain, or the batch must not be cut.
    """
    rows = objective.shards[0].rows or 1
    alone = len(objective.shards) == 1 and objective.crew is None and objective.device.type == "cpu"
    if not alone or rows <= TRIED or objective.indivisible is not None:
        return None
    try:
        count = min(math.ceil(bytes_per_row(objective) * rows / PIECE_BYTES), rows)
        return objective.cut(math.ceil(rows / count)) if count > 1 else None
    except Exception:  # batches that cannot be cut, or a loss that wants them whole
        return None


def bytes_per_row(objective: Objective) -> float:
    """Growth of a graph with its examples: a part of it is as large for one as for all, and left out."""
    rows = objective.shards[0].rows or 1
    few, more = min(TRIED, (rows + 1) // 2), min(2 * TRIED, rows)
    sizes = [_graph_bytes(objective, objective.head(count)) for count in (few, more)]
    return (sizes[1] - sizes[0]) / (more - few) if more > few else float(sizes[0])


def _graph_bytes(objective: Objective, shard: Shard) -> int:
    """What the graph of a gradient keeps beside the parameters."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = torch.autograd.grad(objective.loss(shard), objective.params, create_graph=True, allow_unused=True)
    own = {p.untyped_storage().data_ptr() for p in objective.params}
    # While the graph lives no address is used twice.
    return sum(size for where, size in sizes.items() if where not in own) if graph else 0
