"""What a training step sees: all examples, or a random mini-batch of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.operators import gradient
from zoscope.errors import UsageError
from zoscope.problem.examples import Examples
from zoscope.problem.mini import MiniBatch

if TYPE_CHECKING:
    from zoscope.problem import Objective, Shard


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
                f"--batch-size {batch_size}: the problem has {objective.num_examples:,} example"
                f"{'' if objective.num_examples == 1 else 's'}. Expected at most as many; leave it out to use all of "
                "them at every step."
            )
        self._objective, self._seed = objective, seed
        self._examples = Examples(objective)
        self._size = 1 if self._examples.whole else batch_size
        if self._examples.whole:
            objective.notify(
                "whole-batches",
                f"The batches cannot be cut into examples: every step takes one of the {self._examples.count} batches "
                "of the spec, in random order.",
            )
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._step = -1
        self._batch: MiniBatch | None = None

    def value(self, step: int) -> float:
        """See `Batches.value`."""
        return self._at(step).value()

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """See `Batches.gradient`."""
        return self._at(step).gradient()

    def shards(self, step: int) -> tuple[Shard, ...]:
        """The examples of a step, as far as this rank of a job evaluates them."""
        return self._at(step).shards

    def _at(self, step: int) -> MiniBatch:
        if self._batch is None or step != self._step:
            self._step, self._batch = step, MiniBatch(self._objective, self._examples, self._indices(step))
        return self._batch

    def _indices(self, step: int) -> NDArray[np.int64]:
        epoch, place = divmod(step, self._examples.count // self._size)
        if epoch != self._epoch:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
            self._epoch, self._order = epoch, np.random.default_rng(sequence).permutation(self._examples.count)
        return self._order[place * self._size : (place + 1) * self._size]
