"""Graphs of gradients that many products share: which are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from zoscope.curvature.hvp import Products
from zoscope.problem import Objective, Shard
from zoscope.runtime import available_memory, held_memory, is_limited

KEPT_SHARE = 0.25
"""Part of the free memory that the graphs of several micro-batches may take; a product then costs no forward pass."""


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
        self._before = 0
        self._room = 0.0

    def are_for(self, shards: Sequence[Shard]) -> None:
        """Drop them if they are not for these shards, the same object from product to product, or parameters moved."""
        versions = tuple(p._version for p in self._objective.params)
        if shards is not self._shards or versions != self._versions:
            self.clear()
            self._shards, self._versions = shards, versions
            self._room = math.inf if len(shards) == 1 else room_for_graphs(self._objective.device)

    def of(self, index: int, make: Callable[[], Products]) -> Products:
        """The graph of a shard: an old one, or a new one that is kept if it fits."""
        kept = self._kept.get(index)
        if kept is None:
            kept = make()
            if held_memory(self._objective.device) - self._before <= self._room:
                self._kept[index] = kept
        return kept

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()
        self._shards, self._versions = (), ()
        self._before = held_memory(self._objective.device)
