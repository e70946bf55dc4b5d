"""What groups of examples contribute to products and gradients: here, or dealt out to the ranks of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.linear import LinearOperator, Preconditioned
from zoscope.curvature.operators import ShardOperator
from zoscope.curvature.together import operator_of, received
from zoscope.problem import Objective, Shard
from zoscope.problem.examples import Examples, Indices
from zoscope.problem.mini import examples_of
from zoscope.problem.together import Crew, Post

if TYPE_CHECKING:
    from zoscope.runtime import Ranks

Array = NDArray[np.float64]
Groups = Sequence[tuple[Shard, ...]]
T = TypeVar("T")


class ExampleMean(LinearOperator):
    """A symmetric operator that is a mean over examples, and known on some of them too: M or ``P^-½ M P^-½``.

    Args:
        operator: M.
        diagonal: ``(d,)`` diagonal of P, positive; ``None`` for M itself.
    """

    def __init__(self, operator: ShardOperator, diagonal: Tensor | None = None) -> None:
        self.base, self.diagonal = operator, diagonal
        self._whole: LinearOperator = operator if diagonal is None else Preconditioned(operator, diagonal)
        self._scale = None if diagonal is None else diagonal.double().rsqrt().to(operator.dtype)
        self.dim, self.device, self.dtype = operator.dim, operator.device, operator.dtype

    @property
    def num_hvps(self) -> int:
        """Products with the whole of M computed so far."""
        return self.base.num_hvps

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the mean over all examples."""
        return self._whole.matmat(vectors)

    def partial(self, vectors: Tensor, shards: Sequence[Shard]) -> Tensor:
        """Products with a weighted sum over some shards."""
        if self._scale is None:
            return self.base.partial(vectors, shards)
        return self.base.partial(vectors * self._scale, shards) * self._scale


# --- on rank 0 ------------------------------------------------------------------------------------------------------


def coupling_and_spread(
    operator: ExampleMean, examples: Examples, groups: Sequence[Indices], values: Array, vectors: Tensor
) -> list[tuple[Array, Array]]:
    """``(v_iᵀ(H_g - H)v_j)²``, ``(q, q)``, and ``‖(H_g - H)v_i‖²``, ``(q,)``, for every group g.

    Args:
        operator: H, as a mean over examples.
        examples: What the groups are of.
        groups: A partition.
        values: ``(q,)`` eigenvalues of H.
        vectors: ``(q, d)`` their eigenvectors.
    """
    crew = operator.base.crew
    if crew is None:
        return _coupling(operator, _all(examples, groups), values, vectors)
    _announce(crew, "couple", operator, groups, values, tuple(vectors.shape))
    crew.ranks.share(vectors)
    parts = crew.ranks.gather(
        crew.ranks.attempt(lambda: _coupling(operator, _own(crew.ranks, examples, groups), values, vectors))
    )
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(groups))]


def signed_sum(
    operator: ExampleMean, examples: Examples, groups: Sequence[Indices], signs: Sequence[float], vector: Tensor
) -> Tensor:
    """``Σ_g ξ_g H_g z`` for the groups g, their signs ξ and a vector z, ``(1, d)``."""
    crew = operator.base.crew
    if crew is None:
        return _signed(operator, _all(examples, groups), signs, vector)
    _announce(crew, "add_up", operator, groups, list(signs), tuple(vector.shape))
    crew.ranks.share(vector)
    own = signs[:: crew.ranks.size]  # rank 0 has the first group, and every size-th after it
    part = crew.ranks.attempt(lambda: _signed(operator, _own(crew.ranks, examples, groups), own, vector))
    return crew.ranks.collect(part)


def gradient_sums(
    objective: Objective, examples: Examples, groups: Sequence[Indices], signs: Sequence[float], mean: Tensor
) -> tuple[Tensor, Tensor]:
    """``Σ_g ξ_g (g_g - g)`` and ``Σ_g (g_g - g)²`` for the groups' gradients, each ``(d,)``, the latter in float64."""
    crew = objective.crew
    if not isinstance(crew, Crew) or not crew.follows:
        return _gradients(objective, _all(examples, groups), signs, mean)
    crew.work("zoscope.curvature.groups:add_up_gradients", list(groups), list(signs))
    crew.ranks.share(mean)
    own = signs[:: crew.ranks.size]
    total, squares = crew.ranks.attempt(lambda: _gradients(objective, _own(crew.ranks, examples, groups), own, mean))
    return crew.ranks.collect(total), crew.ranks.collect(squares)


def _announce(crew: Crew, work: str, operator: ExampleMean, groups: Sequence[Indices], *args: Any) -> None:
    kind, scaled = type(operator.base), operator.diagonal is not None
    name = f"{kind.__module__}:{kind.__name__}"
    crew.work(f"zoscope.curvature.groups:{work}", name, operator.base.settings, scaled, list(groups), *args)
    if operator.diagonal is not None:
        crew.ranks.share(operator.diagonal)


# --- on the others --------------------------------------------------------------------------------------------------


def couple(
    post: Post,
    kind: str,
    settings: tuple[object, ...],
    scaled: bool,
    groups: list[Indices],
    values: Array,
    shape: tuple[int, ...],
) -> None:
    """The groups of another rank in `coupling_and_spread`."""
    operator = _mean(post, kind, settings, scaled)
    vectors, own = received(post, shape), groups[post.ranks.rank :: post.ranks.size]
    part = post.ranks.attempt(lambda: _coupling(operator, _all(examples_of(post), own), values, vectors))
    post.ranks.gather(part)


def add_up(
    post: Post,
    kind: str,
    settings: tuple[object, ...],
    scaled: bool,
    groups: list[Indices],
    signs: list[float],
    shape: tuple[int, ...],
) -> None:
    """The groups of another rank in `signed_sum`."""
    operator = _mean(post, kind, settings, scaled)
    vector, mine = received(post, shape), slice(post.ranks.rank, None, post.ranks.size)
    part = post.ranks.attempt(lambda: _signed(operator, _all(examples_of(post), groups[mine]), signs[mine], vector))
    post.ranks.collect(part)


def add_up_gradients(post: Post, groups: list[Indices], signs: list[float]) -> None:
    """The groups of another rank in `gradient_sums`."""
    mean, mine = received(post, (post.objective.num_params,)), slice(post.ranks.rank, None, post.ranks.size)
    total, squares = post.ranks.attempt(
        lambda: _gradients(post.objective, _all(examples_of(post), groups[mine]), signs[mine], mean)
    )
    post.ranks.collect(total)
    post.ranks.collect(squares)


def _mean(post: Post, kind: str, settings: tuple[object, ...], scaled: bool) -> ExampleMean:
    diagonal = received(post, (post.objective.num_params,)) if scaled else None
    return ExampleMean(operator_of(post, kind, settings), diagonal)


# --- on every rank --------------------------------------------------------------------------------------------------


def _all(examples: Examples, groups: Sequence[Indices]) -> Groups:
    return [examples.gather(group) for group in groups]


def _own(ranks: Ranks, examples: Examples, groups: Sequence[Indices]) -> Groups:
    return _all(examples, groups[ranks.rank :: ranks.size])


def _coupling(operator: ExampleMean, groups: Groups, values: Array, vectors: Tensor) -> list[tuple[Array, Array]]:
    mean = torch.as_tensor(values, dtype=operator.dtype, device=operator.device)[:, None] * vectors
    found = []
    for group in groups:
        away = operator.partial(vectors, group) - mean
        spread = away.double().square().sum(dim=1).cpu().numpy()
        found.append(((away @ vectors.T).double().square().cpu().numpy(), spread))
    return found


def _signed(operator: ExampleMean, groups: Groups, signs: Sequence[float], vector: Tensor) -> Tensor:
    total = torch.zeros_like(vector)
    for sign, group in zip(signs, groups, strict=True):
        total.add_(operator.partial(vector, group), alpha=sign)
    return total


def _gradients(objective: Objective, groups: Groups, signs: Sequence[float], mean: Tensor) -> tuple[Tensor, Tensor]:
    total, squares = torch.zeros_like(mean), torch.zeros_like(mean, dtype=torch.float64)
    for sign, group in zip(signs, groups, strict=True):
        away = objective.gradient_of(group)[1] - mean
        total.add_(away, alpha=sign)
        squares += away.double().square()
    return total, squares
