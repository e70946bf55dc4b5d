"""Products with a curvature matrix on several ranks: each multiplies with the matrix of its own examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoscope import runtime
from zoscope.problem.together import Crew, Post

if TYPE_CHECKING:
    from zoscope.curvature.operators import ShardOperator
    from zoscope.problem import Shard


def products(crew: Crew, operator: ShardOperator, vectors: Tensor) -> Tensor:
    """``sum_s weight_s M_s v`` over the shards of all ranks for the rows of ``vectors`` ``(k, d)``; on rank 0."""
    kind = type(operator)
    shape = tuple(vectors.shape)
    crew.work("zoscope.curvature.together:multiply", f"{kind.__module__}:{kind.__name__}", operator.settings, shape)
    crew.ranks.share(vectors)
    return _sum(crew.ranks, operator, crew.pieces, vectors)


def multiply(post: Post, kind: str, settings: tuple[object, ...], shape: tuple[int, int]) -> None:
    """The part of another rank; ``settings`` tell one operator, and one state of it, from the next."""
    operator, vectors = operator_of(post, kind, settings), received(post, shape)
    _sum(post.ranks, operator, post.pieces, vectors)


def operator_of(post: Post, kind: str, settings: tuple[object, ...]) -> ShardOperator:
    """The twin of rank 0's operator on another rank, from one piece of work to the next."""
    kept: tuple[tuple[object, ...], ShardOperator] | None = post.kept.get(kind)
    if kept is None or kept[0] != settings:
        operator: ShardOperator = runtime.named(kind)(post.objective)
        operator.apply(settings)
        post.kept[kind] = kept = (settings, operator)
    return kept[1]


def received(post: Post, shape: tuple[int, ...]) -> Tensor:
    """A tensor that rank 0 shares, of the parameters' dtype."""
    objective = post.objective
    return post.ranks.share(torch.empty(shape, dtype=objective.read().dtype, device=objective.device))


def _sum(ranks: runtime.Ranks, operator: ShardOperator, own: tuple[Shard, ...], vectors: Tensor) -> Tensor:
    part = ranks.attempt(lambda: operator.partial(vectors, own))
    return ranks.collect(part)
