"""Examples in random parts whose losses are known one by one, which add up to that of all of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zoscope.problem import Objective, Shard
from zoscope.problem.examples import Examples, Indices

Array = NDArray[np.float64]


class Division:
    """The examples in random parts, whose losses are known one by one.

    Args:
        objective: The prepared problem.
        indices: Which examples each part has; whole batches where those cannot be cut.

    Attributes:
        weights: ``(k,)``, share of each part in the loss.
        centre: ``(k,)``, losses of the parts at θ.
    """

    def __init__(self, objective: Objective, indices: Sequence[Indices]) -> None:
        self._objective, self._indices = objective, indices
        self._shards: list[tuple[Shard, ...]] = []
        self.gather()
        counts = np.array([sum(shard.examples for shard in part) for part in self._shards], dtype=np.float64)
        self.weights: Array = counts / counts.sum()
        self.centre: Array = np.zeros(len(indices))

    def gather(self) -> None:
        """Cut the batches as they are now."""
        examples = Examples(self._objective)
        self._shards = [examples.gather(part) for part in self._indices]

    def losses(self) -> Array:
        """Of the parts, ``(k,)``."""
        return np.array([self._objective.value_of(part) for part in self._shards])
