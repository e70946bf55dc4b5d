"""Directions explored by forward passes: here, or by all ranks of a job, each on directions of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from zoscope.curvature.jumps import Jump, jump_along
from zoscope.curvature.stencil import Difference, Stencil
from zoscope.errors import NumericalError
from zoscope.optim.directions import Direction, new_generator
from zoscope.problem import Objective
from zoscope.problem.examples import Examples
from zoscope.problem.sharded import Mirror
from zoscope.problem.together import Crew, Post
from zoscope.runtime import DroppedError, Ranks
from zoscope.theory.minibatch import spread_of_batches

_Array = NDArray[np.float64]
T = TypeVar("T")

_TO_NONE = 4 / 3
"""Truncation at h over the change from h/2 to h."""

_CPU = torch.device("cpu")
_OF_PARTS = 1 << 20
"""Keeps the stream of parts apart from those of directions on other devices and ranks."""


@dataclass(frozen=True)
class Noise:
    """How single examples e spread, as the random parts of the data show along some directions.

    Args:
        gradient_sq: Estimate of ``E‖g_e − g‖²``.
        gradient_checks: The same along each of the first few directions, from steps of h/2 and h, ``(2, c)``.
        curvature: Estimate of ``E (g_e − g)ᵀH(g_e − g)``.
        hessian_sq: Estimate of ``E‖H_e − H‖_F²``.
        hessian_shift: By how much truncation and rounding may have moved it.
    """

    gradient_sq: float
    gradient_checks: _Array
    curvature: float
    hessian_sq: float
    hessian_shift: float


@dataclass(frozen=True)
class Group:
    """Some directions and the stencil along the gradient estimate that they make.

    Args:
        slopes: ``uᵀg``, ``(q,)``.
        curvatures: ``uᵀHu``, ``(q,)``.
        checks: ``uᵀg`` and ``uᵀHu`` of the first few, from steps of h/2 and h, ``(2, 2, c)``.
        along_gradient: An unbiased estimate of ``gᵀHg``.
        noise: How examples spread around their mean; ``None`` where that was not asked for.
    """

    slopes: _Array
    curvatures: _Array
    checks: _Array
    along_gradient: float
    noise: Noise | None = None


class Party:
    """Measures along numbered directions; the answer does not depend on how many ranks share them.

    Args:
        stencil: On this rank.
        crew: The ranks; None for this process alone.
        parts: Into how many random parts the examples are divided for every group, to see how they spread; None
            leaves that out.
        seed: Seed of the parts.
    """

    def __init__(
        self, stencil: Stencil, crew: Crew | Mirror | None, *, parts: int | None = None, seed: int = 0
    ) -> None:
        self.stencil = stencil
        self._crew = crew
        self._parts, self._seed = parts, seed
        self._pilots: list[Direction] = []

    @property
    def first_step(self) -> float:
        """Where truncation and rounding would balance for weights and curvature of the usual sizes.

        By a power of two from these sizes, as every step of the search: seeds then differ in what they find there only.
        """
        return math.ldexp(self.stencil.typical_size, round(0.25 * math.log2(self.stencil.epsilon)))

    def pilots(self, count: int) -> Callable[[float], list[Difference]]:
        """What tells the differences along the first ``count`` directions for any step."""
        return lambda h: self._all("pilots", list(range(count)), h)

    def groups(self, size: int, *, first: int, checks: int, h: float, most: int) -> Iterator[Group]:
        """Groups of ``size`` directions each, from number ``first`` on, in order; a few may be measured in vain."""
        self._pilots.clear()
        ahead = 1 if self._crew is None or self._crew.mirrored else self._crew.ranks.size
        for start in range(0, most, ahead):
            firsts = [first + number * size for number in range(start, min(start + ahead, most))]
            yield from self._all("groups", firsts, h, size, checks)

    def group(self, numbers: Sequence[int], *, checks: int, h: float) -> Group:
        """One group of directions, by their numbers, of which the first ``checks`` are measured at h/2 too."""
        if self._parts is None:
            return measure_group(self.stencil, numbers, checks=checks, h=h)
        objective = self.stencil.objective
        generator = new_generator(np.random.SeedSequence(self._seed, spawn_key=(numbers[0], _OF_PARTS)), _CPU)
        examples = Examples(objective)
        parts = examples.partition(self._parts, generator)
        scale = float(np.mean([spread_of_batches(examples.count, len(part)) for part in parts]))
        signs = 1.0 - 2.0 * torch.randint(0, 2, (len(parts),), generator=generator).double().numpy()
        with self.stencil.divided(parts, h):
            return measure_group(self.stencil, numbers, checks=checks, h=h, signs=signs, scale=scale)

    def jump(self) -> Jump | None:
        """Of a loss that is constant but for jumps; looked for by all ranks together where they share a model."""
        if self._crew is None or not self._crew.mirrored:
            return jump_along(self.stencil)
        self._crew.work("zoscope.curvature.party:look_for_jump")
        return _in_lockstep(self._crew.ranks, lambda: jump_along(self.stencil))

    def _all(self, name: str, numbers: list[int], *args: float) -> list[Any]:
        if self._crew is None:
            return [_WORK[name](self, number, *args) for number in numbers]
        self._crew.work("zoscope.curvature.party:explore", name, numbers, args)
        return _share(self, self._crew.ranks, name, numbers, args, mirrored=self._crew.mirrored)

    def pilot(self, number: int) -> Direction:
        """One of the directions that are measured at many steps."""
        while len(self._pilots) <= number:
            self._pilots.append(self.stencil.direction(len(self._pilots)))
        return self._pilots[number]


@contextmanager
def exploring(objective: Objective, *, seed: int, parts: int | None = None) -> Iterator[Party]:
    """A party of all ranks that hold an objective.

    Args:
        objective: Prepared with ``differentiable=False``.
        seed: Seed of the directions.
        parts: As for `Party`.
    """
    crew = objective.crew
    if crew is None or not crew.follows:
        yield Party(Stencil(objective, seed=seed), None, parts=parts, seed=seed)
        return
    crew.work("zoscope.curvature.party:begin", seed, parts)
    if not crew.mirrored:
        objective.crew = None  # from here on a rank evaluates directions of its own, on all of the data
    try:
        yield Party(_made(crew.ranks, objective, seed), crew, parts=parts, seed=seed)
    finally:
        objective.crew = crew


def _made(ranks: Ranks, objective: Objective, seed: int) -> Stencil:
    together = _in_lockstep if isinstance(objective.crew, Mirror) else Ranks.attempt
    return together(ranks, lambda: Stencil(objective, seed=seed))


def begin(post: Post, seed: int, parts: int | None) -> None:
    """Make a stencil on another rank."""
    post.kept["party"] = Party(_made(post.ranks, post.objective, seed), None, parts=parts, seed=seed)


def explore(post: Post, name: str, numbers: list[int], args: tuple[float, ...]) -> None:
    """The part of another rank in what a party measures."""
    crew = post.objective.crew
    _share(post.kept["party"], post.ranks, name, numbers, args, mirrored=crew is not None and crew.mirrored)


def look_for_jump(post: Post) -> None:
    """The part of another rank in finding a jump."""
    _in_lockstep(post.ranks, lambda: jump_along(post.kept["party"].stencil))


def _share(
    party: Party, ranks: Ranks, name: str, numbers: list[int], args: tuple[float, ...], *, mirrored: bool
) -> list[Any]:
    def all_of_them() -> list[Any]:
        return [_WORK[name](party, number, *args) for number in numbers]

    if mirrored:
        return _in_lockstep(ranks, all_of_them)

    def mine() -> dict[int, Any]:
        party.stencil.reach(args[0])  # moves θ to a grid where it is large: the same on every rank
        return {n: _WORK[name](party, n, *args) for i, n in enumerate(numbers) if i % ranks.size == ranks.rank}

    found = {number: item for part in ranks.gather(ranks.attempt(mine)) for number, item in part.items()}
    return [found[number] for number in numbers] if ranks.leads else []


def _in_lockstep(ranks: Ranks, work: Callable[[], T]) -> T:
    """Work that all ranks do with parts of one model: losses, and what is wrong with them, are the same everywhere."""
    try:
        return work()
    except NumericalError:
        if ranks.leads:
            raise
        raise DroppedError from None
    except Exception:
        ranks.in_step = False  # the others may wait for this rank in the middle of a forward pass
        raise


def _pilot(party: Party, number: int, h: float) -> Difference:
    return party.stencil.along(party.pilot(number), h)


def _group(party: Party, first: int, h: float, size: float, checks: float) -> Group:
    return party.group(range(first, first + int(size)), checks=int(checks), h=h)


_WORK: dict[str, Callable[..., object]] = {"pilots": _pilot, "groups": _group}


def measure_group(
    stencil: Stencil,
    numbers: Sequence[int],
    *,
    checks: int,
    h: float,
    signs: _Array | None = None,
    scale: float = 1.0,
) -> Group:
    """One group of directions.

    Args:
        stencil: What measures along them; divided where ``signs`` are given.
        numbers: Of the directions.
        checks: How many of the first ones are measured at h/2 too.
        h: The step.
        signs: ``(k,)`` random signs of the parts that the data are divided into.
        scale: Variance of a part in units of that of an example.
    """
    directions = [stencil.direction(number) for number in numbers]
    found = [_finite(stencil.along(u, h), h) for u in directions]
    slopes, curvatures = _columns(found)
    halves = [_finite(stencil.along(u, h / 2), h / 2) for u in directions[:checks]]
    checked = np.stack([_columns(halves), np.stack([slopes, curvatures])[:, :checks]], axis=1)

    def through(weights: _Array) -> float:
        """``vᵀHv`` for the vector of which ``weights`` are the products with the directions, from pairs of them."""
        norm, size = float(np.linalg.norm(weights)), len(weights)
        if norm == 0:
            return 0.0
        c = weights / norm  # a sum with weights of norm 1 is as long as a direction, so that h suits it too
        whole = _finite(stencil.along(stencil.combination(directions, c.tolist()), h), h).curvature
        return norm**2 * (whole - float(c**2 @ curvatures)) / (size * (size - 1))

    group = Group(slopes, curvatures, checked, through(slopes))
    if signs is None:
        return group
    apart, half = _apart(found), _apart(halves)
    # Σ ξ (g_part − g) has the covariance of examples, once divided by the root of what it adds up.
    noise = signs @ apart[0] / math.sqrt(len(signs) * scale)
    changes = _TO_NONE * (half[1] - apart[1][:, :checks])
    covariances = [float(np.cov(a, b)[0, 1]) for a, b in zip(apart[1][:, :checks], changes, strict=True)]
    return replace(
        group,
        noise=Noise(
            gradient_sq=float(np.mean(apart[0] ** 2)) / scale,
            gradient_checks=np.stack([np.mean(x**2, axis=0) for x in (half[0], apart[0][:, :checks])]) / scale,
            curvature=through(noise),
            hessian_sq=0.5 * float(apart[1].var(axis=1, ddof=1).mean()) / scale,
            hessian_shift=(float(np.abs(covariances).mean()) + 0.5 * float(changes.var(axis=1, ddof=1).mean())) / scale,
        ),
    )


def _apart(found: Sequence[Difference]) -> _Array:
    """Slopes and curvatures of the parts less those of all data, ``(2, k, n)``."""
    return np.stack([d.parts - np.array([[d.slope], [d.curvature]]) for d in found if d.parts is not None], axis=-1)


def _columns(found: Sequence[Difference]) -> _Array:
    return np.array([[d.slope for d in found], [d.curvature for d in found]])


def _finite(difference: Difference, h: float) -> Difference:
    if not (math.isfinite(difference.slope) and math.isfinite(difference.curvature)):
        raise NumericalError(
            f"The loss is not finite at a distance of {h:.2g} along a random direction: expected finite losses around "
            "the given parameters. The loss may overflow or leave its domain there; measure at another point, in "
            "--dtype float64, or restrict --params."
        )
    return difference
