"""What a training step sees: all examples, or a random mini-batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.operators import gradient
from zoscope.errors import UsageError
from zoscope.problem import Shard, nest

if TYPE_CHECKING:
    from zoscope.problem import Objective


class Batches(Protocol):
    """The loss that the step starting at ``step`` sees; the same for every evaluation of that step."""

    def value(self, step: int) -> float:
        """Its value."""

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """Its value and its gradient ``(d,)``."""


class FullBatch:
    """All examples at every step.

    Args:
        objective: The prepared problem.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def value(self, step: int) -> float:
        """See `Batches.value`."""
        return self._objective.value()

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """See `Batches.gradient`."""
        return gradient(self._objective)


class MiniBatches:
    """Mini-batches without replacement: every epoch is a new random order of the examples.

    Epoch e is ordered by a generator of its own, seeded with (seed, e), so that nothing has to be stored to go on from
    a step. What is left over at the end of an epoch, fewer than ``batch_size`` examples, is left out of it.

    Args:
        objective: The prepared problem. Where its batches are cut along their rows, examples are mixed across batches;
            where they cannot be, they are taken whole in random order.
        batch_size: Examples per step.
        seed: Seed of the orders.

    Raises:
        UsageError: If there are fewer examples.
    """

    def __init__(self, objective: Objective, *, batch_size: int, seed: int) -> None:
        if batch_size > objective.num_examples:
            raise UsageError(
                f"--batch-size {batch_size}: the problem has {objective.num_examples:,} examples. Expected at most as "
                "many; leave it out to use all of them at every step."
            )
        self._objective, self._seed = objective, seed
        self._units = _units(objective)
        if self._units is None:
            self._size, self._count = 1, len(objective.shards)
            objective.notify(
                "whole-batches",
                f"The batches cannot be cut into examples: every step takes one of the {self._count} batches of the "
                "spec, in random order.",
            )
        else:
            self._size, self._count = batch_size, len(self._units)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._step, self._shard = -1, objective.shards[0]

    @torch.no_grad()
    def value(self, step: int) -> float:
        """See `Batches.value`."""
        return float(self._objective.loss(self.shard(step)))

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """See `Batches.gradient`."""
        loss = self._objective.loss(self.shard(step))
        grads = torch.autograd.grad(loss, self._objective.params, allow_unused=True)
        return float(loss.detach()), self._objective.flatten(grads)

    def shard(self, step: int) -> Shard:
        """The examples of a step."""
        if step != self._step:
            self._step, self._shard = step, self._gather(self._indices(step))
        return self._shard

    def _indices(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        epoch, place = divmod(step, self._count // self._size)
        if epoch != self._epoch:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
            self._epoch, self._order = epoch, np.random.default_rng(sequence).permutation(self._count)
        return self._order[place * self._size : (place + 1) * self._size]

    def _gather(self, indices: np.ndarray[Any, np.dtype[np.int64]]) -> Shard:
        if self._units is None:
            return self._objective.shards[int(indices[0])]
        which, rows = self._units[indices].T
        shards = self._objective.shards
        pieces = [
            nest.rows(shards[index].batch, torch.from_numpy(rows[which == index]), of=shards[index].rows or 0)
            for index in np.unique(which)
        ]
        batch = pieces[0] if len(pieces) == 1 else nest.joined(pieces)
        return Shard(batch, 1.0, len(indices), len(indices))


def _units(objective: Objective) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """``(n, 2)``: shard and row of every example; None where shards are not rows of examples."""
    shards: Sequence[Shard] = objective.shards
    if any(s.rows is None or s.rows != s.examples or nest.split(s.batch, [s.rows]) is None for s in shards):
        return None
    try:
        nest.joined([nest.rows(s.batch, torch.tensor([0]), of=s.rows or 0) for s in shards])
    except (RuntimeError, TypeError, ValueError):
        return None
    return np.concatenate(
        [np.stack([np.full(s.rows or 0, i), np.arange(s.rows or 0)], axis=1) for i, s in enumerate(shards)]
    )
