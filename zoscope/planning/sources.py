"""Gradients of a problem at several points, for rehearsals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.optim.directions import new_generator
from zoscope.optim.perturbation import SequentialSurface, StackedMiniBatchSurface, StackedSurface, Surface
from zoscope.problem.objective import Examples, Shard

if TYPE_CHECKING:
    from zoscope.problem import Objective

STACKED_BYTES = 2**28
"""Most memory that the points themselves take where they are differentiated together."""


class ObjectiveGradients:
    """The loss of a problem; mini-batches are drawn anew for every step, each run its own.

    Args:
        objective: The prepared problem; its parameters are left where the last evaluation was.
        batch_size: Examples of a mini-batch; ``None`` for all of them.
        most: Runs at a time, at most.
        seed: Seed of the mini-batches.
    """

    def __init__(self, objective: Objective, *, batch_size: int | None, most: int, seed: int) -> None:
        self._objective, self._batch_size, self._seed = objective, batch_size, seed
        self._in_turn = SequentialSurface(objective)
        self._surface = _surface(objective, 2 * most)
        self._examples = None if batch_size is None else Examples(objective)
        self._stacked: StackedMiniBatchSurface | None = None
        if batch_size is not None and isinstance(self._surface, StackedSurface):
            self._stacked = _stacked_batches(objective, batch_size, seed=seed, replicas=most)
        self._generators: list[torch.Generator] = []
        self._shards: list[Sequence[Shard]] = []

    def begin(self, runs: Sequence[int]) -> None:
        """See `Gradients.begin`."""
        self._generators = [new_generator(np.random.SeedSequence(self._seed, spawn_key=(0, run))) for run in runs]
        if self._stacked is not None:
            self._stacked.begin(runs)

    def full(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `Gradients.full`."""
        with torch.enable_grad():
            return self._surface.gradients(theta)

    def values(self, theta: Tensor) -> Tensor:
        """See `Gradients.values`."""
        return self._in_turn.values(theta)

    def batch(self, theta: Tensor, rows: list[int]) -> Tensor | None:
        """See `Gradients.batch`."""
        if self._examples is None or self._batch_size is None:
            return None
        if self._stacked is not None:
            self._stacked.keep(rows)
            self._stacked.next_step()
            with torch.enable_grad():
                return self._stacked.batch_gradients(theta)
        gradients = []
        self._shards = [self._examples.draw(self._batch_size, self._generators[row]) for row in rows]
        for point, shards in zip(theta, self._shards, strict=True):
            self._objective.write(point)
            gradients.append(self._objective.gradient_of(shards)[1])
        return torch.stack(gradients)

    def bends(self, theta: Tensor, directions: Tensor, mu: float) -> Tensor:
        """See `Gradients.bends`."""
        if self._examples is None or self._stacked is not None:
            surface = self._stacked or self._surface
            central = surface.slopes(theta, directions, mu)[0]
            return surface.slopes(theta, directions, mu, one_sided=True)[0] - central
        found = []
        for point, direction, shards in zip(theta, directions, self._shards, strict=True):
            losses = []
            for shift in (mu, -mu, 0.0):
                self._objective.write(torch.add(point, direction, alpha=shift))
                losses.append(self._objective.value_of(shards))
            found.append((losses[0] + losses[1] - 2 * losses[2]) / (2 * mu))
        return torch.tensor(found, dtype=torch.float64, device=theta.device)


def _stacked_batches(
    objective: Objective, batch_size: int, *, seed: int, replicas: int
) -> StackedMiniBatchSurface | None:
    """Mini-batches of all runs differentiated together, where the model can do that."""
    start = objective.read()
    try:
        surface = StackedMiniBatchSurface(objective, batch_size, seed=seed)
        surface.begin(range(replicas))
        surface.next_step()
        with torch.enable_grad():
            surface.batch_gradients(start.repeat(replicas, 1))
    except Exception:  # what a user's model raises under vmap can be anything
        return None
    finally:
        objective.write(start)
    return surface


def _surface(objective: Objective, rows: int) -> Surface:
    """Gradients of all points together where the model can do that and it is faster."""
    in_turn = SequentialSurface(objective)
    start = objective.read()
    if rows * start.numel() * start.element_size() > STACKED_BYTES:
        return in_turn
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).to(start)
    theta = start + 1e-3 * torch.linspace(0, 1, rows).to(start)[:, None] * noise
    stacked = StackedSurface(objective)
    try:
        with torch.enable_grad():
            together, one_by_one = stacked.gradients(theta), in_turn.gradients(theta)
            close = torch.allclose(together[0], one_by_one[0], rtol=1e-3, atol=1e-5 * float(one_by_one[0].abs().max()))
            fast = close and _seconds(stacked, theta) < 1.25 * _seconds(in_turn, theta)
    except Exception:  # what a user's model raises under vmap can be anything
        return in_turn
    finally:
        objective.write(start)
    return stacked if fast else in_turn


def _seconds(surface: Surface, theta: Tensor) -> float:
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        surface.gradients(theta)[1].sum().item()  # waits for a device that works ahead
        best = min(best, time.perf_counter() - begin)
    return best
