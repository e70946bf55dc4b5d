"""Models of which every rank holds a part (FSDP2, ``fully_shard``): a forward pass takes all ranks at once.

Each rank moves its own part of the parameters, and each evaluates examples of its own in the passes that all make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoscope.errors import SpecError

if TYPE_CHECKING:
    from zoscope.problem.losses import LossFunction
    from zoscope.problem.objective import Objective, Shard
    from zoscope.runtime import Ranks


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, in the same memory; an ordinary tensor is here as a whole."""
    inner = getattr(tensor, "_local_tensor", None)
    return tensor if inner is None else inner


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to a model or to parts of it."""
    return bool(_sharded_modules(model))


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


class ShardedLoss:
    """A loss after which the parts of the model are apart again: the next pass then sees them where they have moved."""

    def __init__(self, loss: LossFunction) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch."""
        value = self._loss(model, batch)
        for module in _sharded_modules(model):
            module.reshard()
        return value


def refuse_partly_sharded(names: tuple[str, ...], params: tuple[Tensor, ...], ranks: int) -> None:
    """See that each rank holds a part of its own of every parameter.

    Raises:
        SpecError: If one is replicated, or sharded over other ranks.
    """
    for name, parameter in zip(names, params, strict=True):
        placements: Any = getattr(parameter, "placements", ())
        mesh: Any = getattr(parameter, "device_mesh", None)
        if len(placements) != 1 or not placements[0].is_shard() or mesh.size() != ranks:
            raise SpecError(
                f"Parameter '{name}' is not sharded over all {ranks} ranks: expected fully_shard on the whole model, "
                "with one mesh dimension. Apply it to the root module too, or select other parameters with --params."
            )


class Mirror:
    """All ranks go through the same program with parts of one model; stands where a `Crew` stands otherwise.

    Args:
        ranks: The job.
        objective: The problem, with the parts of its parameters that are here.
    """

    mirrored = True
    follows = True

    def __init__(self, ranks: Ranks, objective: Objective) -> None:
        self.ranks = ranks
        self.number = 0  # of the session
        self._objective = objective

    def work(self, name: str, *args: Any) -> None:
        """Announce what all ranks do together; on rank 0."""
        self.ranks.tell("zoscope.problem.together:_work", self.number, False, name, *args)

    @torch.no_grad()
    def value(self) -> float:
        """Loss over all shards; all ranks ask for it together, and make equally many passes."""
        objective, ranks = self._objective, self.ranks
        shards = objective.shards
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(shards), ranks.size):
            index = start + ranks.rank
            shard: Shard = shards[min(index, len(shards) - 1)]  # a pass that counts for nothing keeps the others going
            loss = objective.loss(shard).detach().to(total)
            total += shard.weight * loss if index < len(shards) else 0.0
        return float(ranks.total(total))

    def split(self, micro_batch: int) -> None:
        """Nothing: every rank cuts its own shards."""

    def total(self, number: float) -> float:
        """Sum over ranks."""
        return float(self.ranks.total(torch.tensor(number, dtype=torch.float64)))

    def largest(self, number: float) -> float:
        """Largest over ranks."""
        return -self.ranks.smallest(-number)
