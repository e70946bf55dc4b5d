"""A prepared problem on several ranks: each holds the same parameters and evaluates its own examples."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoscope import runtime
from zoscope.errors import SpecError
from zoscope.problem import pytree as nest
from zoscope.problem.model import is_sharded
from zoscope.problem.objective import CUT_WORK, Examples, Indices, ProcessGroup
from zoscope.problem.session import PrepareOptions, prepared_here

if TYPE_CHECKING:
    from zoscope.problem.core import Problem
    from zoscope.problem.objective import Objective


@contextmanager
def prepared(problem: Problem, options: PrepareOptions) -> Iterator[Objective]:
    """Implements :meth:`zoscope.Problem.prepare`: here, and on the other ranks of a job that know the problem."""
    ranks = runtime.current_ranks()
    if ranks is None or problem.shared is None:
        with prepared_here(problem, options) as objective:
            yield objective
        return
    objective = _opened(ranks, problem.shared, problem.params, options, problem=problem)
    assert objective.session is not None
    with objective.session:
        try:
            if not objective.mirrored:
                _line_up(ranks, objective, list(objective.splits), _signature(objective), objective.indivisible)
            yield objective
        finally:
            objective.process_group = None
            if ranks.in_step:
                _close(ranks, objective)


@runtime.collective
def _opened(
    ranks: runtime.Ranks, known: Problem, params: str | None, options: PrepareOptions, *, problem: Problem | None = None
) -> Objective:
    if problem is None:
        problem = known.with_params(params)
        # Checks are rank 0's, unless a forward pass takes all ranks. So is a memory limit, which cuts for all.
        check = options.check and not options.differentiable and is_sharded(problem.model)
        options = replace(options, check=check, max_memory=None, limited=options.max_memory is not None)
    session = prepared_here(problem, replace(options, spread=True))
    with ExitStack() as stack:
        objective = ranks.keep(ranks.attempt(lambda: stack.enter_context(session)))
        objective.session = stack.pop_all()
    return objective


@runtime.collective
def _line_up(
    ranks: runtime.Ranks, objective: Objective, splits: list[int], signature: tuple[Any, ...], indivisible: str | None
) -> None:
    """Bring all ranks to where rank 0 is: the shards, every parameter and buffer."""
    ranks.attempt(lambda: _follow(objective, splits, signature, rank=ranks.rank))
    for tensor in _state(objective):
        ranks.share(tensor)
    values = ranks.attempt(lambda: _losses(objective))
    expected = ranks.share(values.clone())
    ranks.attempt(lambda: _refuse_other_losses(values, expected, objective.dtype, rank=ranks.rank))
    objective.process_group = group = ProcessGroup(ranks)
    group.deal_out(objective, indivisible)


@runtime.collective
def _close(ranks: runtime.Ranks, objective: Objective) -> None:
    objective.process_group = None
    if not ranks.leads and objective.session is not None:
        objective.session.close()


def _follow(objective: Objective, splits: list[int], signature: tuple[Any, ...], *, rank: int) -> None:
    for micro_batch in splits[len(objective.splits) :]:
        objective.split(micro_batch)
    found = _signature(objective)
    if found == signature:
        return
    names = ("parameters", "batches", "data")
    what = next(name for name, a, b in zip(names, found, signature, strict=True) if a != b)
    raise SpecError(
        f"The spec gives other {what} on rank {rank} than on rank 0: expected the same problem on every rank. Fix the "
        "seeds of what it draws, and shard nothing by rank itself: zoscope distributes the batches."
    )


COMPARED = 8
"""Batches whose losses are compared over ranks."""

_LOSS_RTOL = {torch.float64: 1e-8, torch.float32: 1e-4}
_ASIDE = 0.02


@torch.no_grad()
def _losses(objective: Objective) -> Tensor:
    """Losses ``(2, n)`` of some batches where the parameters stand, and a little aside, in float64.

    Where a loss is stationary it may agree on all ranks and its derivatives differ.
    """
    shards = objective.shards[:: -(-len(objective.shards) // COMPARED)]
    here = [objective.value_of([shard]) for shard in shards]
    before = [parameter.detach().clone() for parameter in objective.params]
    try:
        for parameter in objective.params:
            size = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
            shift = torch.cos(torch.arange(parameter.numel(), dtype=torch.float32)).to(parameter)
            parameter.add_(shift.view(parameter.shape), alpha=_ASIDE * (size or 1.0))
        aside = [objective.value_of([shard]) for shard in shards]
    finally:
        for parameter, value in zip(objective.params, before, strict=True):
            parameter.copy_(value)
    return torch.tensor([here, aside], dtype=torch.float64)


def _refuse_other_losses(values: Tensor, expected: Tensor, dtype: torch.dtype, *, rank: int) -> None:
    values, expected = (found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for found in (values, expected))
    scale = float(torch.maximum(values.abs(), expected.abs()).max())
    apart = float((values - expected).abs().max())
    if apart > _LOSS_RTOL.get(dtype, 2e-2) * scale:
        raise SpecError(
            f"The spec gives another loss on rank {rank} than on rank 0 for the same data and parameters (they differ "
            f"by {apart / scale:.2g} of the loss): expected the same problem on every rank. Fix the seeds of what the "
            "loss function draws or holds, and let it depend on no rank."
        )


def _signature(objective: Objective) -> tuple[Any, ...]:
    """What tells two problems apart at little cost: names and shapes, examples, and a few numbers of every batch."""
    shapes = [(name, tuple(p.shape)) for name, p in zip(objective.names, objective.params, strict=True)]
    counts = [(shard.examples, shard.rows) for shard in objective.shards]
    return shapes, counts, [_checksum(shard.batch) for shard in objective.shards]


def _checksum(batch: Any) -> int:
    found = 0
    for item in nest.leaves(batch):
        values = item.detach().cpu() if isinstance(item, Tensor) and item.layout == torch.strided else item
        if isinstance(values, (Tensor, np.ndarray)) and not getattr(values, "is_nested", False):
            flat = torch.as_tensor(values).reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)].to(torch.float64)
            found = zlib.crc32(sample.numpy().tobytes(), found)
    return found


def _state(objective: Objective) -> list[Tensor]:
    """Everything that a loss may depend on, in one order."""
    found: dict[int, Tensor] = {}
    for tensor in (*objective.model.parameters(), *objective.model.buffers()):
        found.setdefault(id(tensor), tensor.detach())
    return [tensor for tensor in found.values() if tensor.layout == torch.strided]


class MiniBatch(runtime.Twin):
    """Some examples of a problem, and their mean loss.

    With several ranks, and enough work to pay for sending the parameters at every evaluation, each takes a part.

    Args:
        objective: The prepared problem.
        examples: All of its examples.
        indices: Those of the mini-batch.

    Attributes:
        ranks: Those that share it.
        shards: What this rank evaluates; their weights add up to 1.
    """

    def __init__(self, objective: Objective, examples: Examples, indices: Indices) -> None:
        self._objective, self._recipe = objective, (objective, examples, indices)
        few = examples.whole or len(indices) < objective.ranks.size or objective.num_params * len(indices) < CUT_WORK
        self.ranks = runtime.ALONE if few or objective.mirrored else objective.ranks
        self.shards = examples.gather(np.array_split(indices, self.ranks.size)[self.ranks.rank])
        self._count = sum(shard.examples for shard in self.shards)

    def recipe(self) -> tuple[Objective, Examples, Indices]:
        """What it was made of."""
        return self._recipe

    def news(self) -> Objective:
        """The problem, for its parameters."""
        return self._objective

    def _means(self, loss: float) -> tuple[float, float]:
        """The loss of all ranks' parts, and the share of this rank's part in it."""
        if self.ranks is runtime.ALONE:
            return loss, 1.0
        total, count = self.ranks.total(torch.tensor([loss * self._count, self._count], dtype=torch.float64)).tolist()
        return total / count, self._count / count

    @runtime.collective
    def value(self) -> float:
        """Its loss; may be infinite or NaN."""
        return self._means(self.ranks.attempt(lambda: self._objective.value_of(self.shards)))[0]

    @runtime.collective
    def gradient(self) -> tuple[float, Tensor]:
        """Its loss and its gradient ``(d,)``."""
        loss, flat = self.ranks.attempt(lambda: self._objective.gradient_of(self.shards))
        loss, share = self._means(loss)
        return loss, self.ranks.collect(flat if share == 1 else flat.mul_(share))
