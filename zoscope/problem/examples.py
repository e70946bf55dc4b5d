"""Single examples of a prepared problem, for random mini-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from zoscope.problem import nest
from zoscope.problem.data import examples_in
from zoscope.problem.objective import Shard

if TYPE_CHECKING:
    from zoscope.problem.objective import Objective

Indices = NDArray[np.int64]


class Examples:
    """The rows of all batches, which a mini-batch draws from; whole batches where those cannot be cut.

    Args:
        objective: The prepared problem.

    Attributes:
        count: Number of rows, or of batches.
        whole: Whether batches cannot be cut, so that a mini-batch is one of them.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._shards = objective.shards
        self.whole = objective.indivisible is not None or not all(map(_can_be_cut, self._shards))
        rows = [1 if self.whole else (shard.rows or 0) for shard in self._shards]
        self._units = np.concatenate(
            [np.stack([np.full(k, i), np.arange(k)], axis=1) for i, k in enumerate(rows)]
        ).astype(np.int64)
        self.count = len(self._units)

    def partition(self, count: int, generator: torch.Generator) -> list[Indices]:
        """A random partition into ``count`` groups of nearly equal size, at most one per example."""
        order = torch.randperm(self.count, generator=generator, device=generator.device).cpu().numpy()
        return np.array_split(order, min(count, self.count))

    def groups(self, count: int, generator: torch.Generator) -> list[tuple[Shard, ...]]:
        """The examples of a random partition; see `partition`."""
        return [self.gather(part) for part in self.partition(count, generator)]

    def draw(self, size: int, generator: torch.Generator) -> tuple[Shard, ...]:
        """A random mini-batch of ``size`` examples without replacement, one whole batch where they cannot be cut."""
        order = torch.randperm(self.count, generator=generator, device=generator.device).cpu().numpy()
        return self.gather(order[: 1 if self.whole else size])

    def gather(self, indices: Indices) -> tuple[Shard, ...]:
        """Some examples as shards whose weights add up to 1: one shard where the pieces fit together."""
        which, rows = self._units[indices].T
        if self.whole:
            pieces = [self._shards[index] for index in which]
        else:
            pieces = [self._piece(self._shards[index], rows[which == index]) for index in np.unique(which)]
        total = max(sum(piece.examples for piece in pieces), 1)
        largest = max(shard.rows or 1 for shard in self._shards)
        joined = None if self.whole or len(indices) > largest or len(pieces) == 1 else _joined(pieces)
        if joined is not None:
            return (Shard(joined, 1.0, total, len(indices)),)
        return tuple(Shard(p.batch, p.examples / total, p.examples, p.rows) for p in pieces if p.examples)

    def _piece(self, shard: Shard, rows: Indices) -> Shard:
        batch = nest.rows(shard.batch, torch.from_numpy(rows), of=shard.rows or 0)
        size_of = self._objective.batch_size_of
        count = len(rows) if size_of is None else examples_in(batch, size_of)
        return Shard(batch, 1.0, count, len(rows))


def _can_be_cut(shard: Shard) -> bool:
    return shard.rows is not None and nest.split(shard.batch, [shard.rows]) is not None


def _joined(pieces: Sequence[Shard]) -> Any | None:
    """One batch of several pieces; ``None`` where they have other shapes, as batches padded to their longest have."""
    try:
        return nest.joined([piece.batch for piece in pieces])
    except (RuntimeError, TypeError, ValueError):
        return None
