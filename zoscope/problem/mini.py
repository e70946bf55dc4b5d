"""The loss of a mini-batch: here, or on several ranks of a job, each with a part of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.problem.examples import Examples, Indices
from zoscope.problem.together import CUT_WORK, Crew, Post

if TYPE_CHECKING:
    from zoscope import runtime
    from zoscope.problem.objective import Objective, Shard


class MiniBatch:
    """Some examples of a problem, and their mean loss.

    With several ranks, and enough work to pay for sending the parameters at every evaluation, each takes a part.

    Args:
        objective: The prepared problem.
        examples: All of its examples.
        indices: Those of the mini-batch.
    """

    def __init__(self, objective: Objective, examples: Examples, indices: Indices) -> None:
        self._objective, self._examples, self._indices = objective, examples, indices
        self._sent = False
        self._crew = _sharing(objective, examples, len(indices))
        self._part: Part | None = None if self._crew is None else Part(examples, indices, self._crew.ranks)
        self.shards: tuple[Shard, ...] = examples.gather(indices) if self._part is None else self._part.shards

    def value(self) -> float:
        """Its loss; may be infinite or NaN."""
        if self._crew is None or self._part is None:
            return self._objective.value_of(self.shards)
        self._announce(self._crew, "value_of_part")
        return _value(self._crew.ranks, self._objective, self._part)

    def gradient(self) -> tuple[float, Tensor]:
        """Its loss and its gradient ``(d,)``."""
        if self._crew is None or self._part is None:
            return self._objective.gradient_of(self.shards)
        self._announce(self._crew, "gradient_of_part")
        return _gradient(self._crew.ranks, self._objective, self._part)

    def _announce(self, crew: Crew, work: str) -> None:
        crew.work(f"zoscope.problem.mini:{work}", None if self._sent else self._indices)
        self._sent = True


def _sharing(objective: Objective, examples: Examples, rows: int) -> Crew | None:
    """The ranks that share a mini-batch; ``None`` where this one evaluates it alone."""
    crew = objective.crew
    if not isinstance(crew, Crew) or not crew.follows or examples.whole or rows < crew.ranks.size:
        return None
    return crew if objective.num_params * rows >= CUT_WORK else None


class Part:
    """What one rank evaluates of a mini-batch.

    Args:
        examples: All of the problem's; in the same order on every rank, however their batches were cut.
        indices: Those of the mini-batch.
        ranks: The job.

    Attributes:
        shards: The rows of this rank; their weights add up to 1.
        count: What they count for.
    """

    def __init__(self, examples: Examples, indices: Indices, ranks: runtime.Ranks) -> None:
        self.shards = examples.gather(np.array_split(indices, ranks.size)[ranks.rank])
        self.count = sum(shard.examples for shard in self.shards)


def value_of_part(post: Post, indices: Indices | None) -> None:
    """The part of another rank."""
    _value(post.ranks, post.objective, _kept(post, indices))


def gradient_of_part(post: Post, indices: Indices | None) -> None:
    """The part of another rank."""
    _gradient(post.ranks, post.objective, _kept(post, indices))


def examples_of(post: Post) -> Examples:
    """All examples on another rank; they keep their order when batches are cut."""
    if "examples" not in post.kept:
        post.kept["examples"] = Examples(post.objective)
    found: Examples = post.kept["examples"]
    return found


def _kept(post: Post, indices: Indices | None) -> Part:
    if indices is not None:
        post.kept["mini-batch"] = Part(examples_of(post), indices, post.ranks)
    part: Part = post.kept["mini-batch"]
    return part


def _value(ranks: runtime.Ranks, objective: Objective, part: Part) -> float:
    loss = ranks.attempt(lambda: objective.value_of(part.shards))
    total, count = ranks.total(torch.tensor([loss * part.count, part.count], dtype=torch.float64)).tolist()
    return float(total / count)


def _gradient(ranks: runtime.Ranks, objective: Objective, part: Part) -> tuple[float, Tensor]:
    loss, flat = ranks.attempt(lambda: objective.gradient_of(part.shards))
    total, count = ranks.total(torch.tensor([loss * part.count, part.count], dtype=torch.float64)).tolist()
    return float(total / count), ranks.collect(flat.mul_(part.count / count))
