"""Differences of the loss along random directions: parameters move in place, nothing of their size is stored.

Along ``u ~ N(0, I)`` the loss at ``θ ± hu`` and at θ gives ``uᵀg ≈ (f₊ − f₋)/2h`` and ``uᵀHu ≈ (f₊ − 2f₀ + f₋)/h²``.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.division import Array, Division
from zoscope.errors import NumericalError
from zoscope.optim.directions import Block, Buffers, Direction, buffer_for, new_generator, partition
from zoscope.optim.restore import SNAPSHOT_BYTES, FixedPoint, Perturbation
from zoscope.problem import Objective
from zoscope.problem.examples import Indices
from zoscope.problem.originals import Originals
from zoscope.problem.sharded import Mirror
from zoscope.runtime import is_out_of_memory, release_memory

BLOCKS = 128
"""Large models are cut into about so many blocks: what is drawn at a time is then below 1 % of them."""

SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 18, 1 << 23
NEAR = 0.5
"""Step, in units of the parameters, beyond which the loss is another one."""

KEPT_SIZE, KEPT_GROUP = 1 << 18, 16
"""Entries up to which directions are kept instead of being drawn again, and how many of them are at a time."""


class Walk(Protocol):
    """Something that says where to go, block by block."""

    def part(self, index: int) -> list[Tensor]:
        """The pieces of one block."""
        ...


@dataclass(frozen=True)
class Difference:
    """What two evaluations tell about one direction.

    Args:
        slope: ``uᵀg``.
        curvature: ``uᵀHu``.
        parts: The same of the parts that the data are divided into, ``(2, k)``; ``None`` where they are not.
    """

    slope: float
    curvature: float
    parts: Array | None = None


class Combination:
    """``Σ_i c_i u_i`` of directions that are drawn again when they are needed.

    Args:
        directions: The ``u_i``.
        coefficients: The ``c_i``.
        blocks: What they cover.
    """

    def __init__(self, directions: Sequence[Direction], coefficients: Sequence[float], blocks: Sequence[Block]) -> None:
        self._directions = directions
        self._coefficients = coefficients
        self._blocks = blocks
        self._buffers: Buffers = {}

    def part(self, index: int) -> list[Tensor]:
        """The pieces of block ``index``, valid until the next call."""
        block = self._blocks[index]
        total: list[Tensor] = []
        for direction, coefficient in zip(self._directions, self._coefficients, strict=True):
            pieces = direction.part(index)
            if not total:
                total = self._zeros(block, pieces[0].dtype)
            torch._foreach_add_(total, pieces, alpha=coefficient)
        return total

    def _zeros(self, block: Block, dtype: torch.dtype) -> list[Tensor]:
        flat = buffer_for(block, dtype, self._blocks, self._buffers)
        parts = torch.split_with_sizes(flat.zero_(), block.sizes)
        return [part.view(p.shape) for part, p in zip(parts, block.pieces, strict=True)]


class Reloaded:
    """A perturbation that starts from the parameters' own values each time, kept where they cost no working memory.

    Both points are then rounded once, so that rounding hardly tilts them; half precision needs that.
    """

    overwrites: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[Block], originals: Originals, *, h: float) -> None:
        self._blocks = blocks
        self._originals = originals
        self._h = h
        first = np.cumsum([0, *(len(block.pieces) for block in blocks)])
        self._pieces = [range(start, stop) for start, stop in itertools.pairwise(first.tolist())]

    def begin(self) -> None:
        """Nothing: the values were taken when they were put aside."""

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from θ to ``θ + hu``."""
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=self._h)

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from ``θ + hu`` to ``θ − hu``."""
        self._originals.put_back(self._pieces[index])
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=-self._h)

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """Block ``index`` back to θ."""
        self._originals.put_back(self._pieces[index])
        return self.used(index, direction)

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """The direction in the parameters' dtype."""
        dtype = self._blocks[index].dtype
        return list(direction) if direction[0].dtype == dtype else [u.to(dtype) for u in direction]


class Stencil:
    """Evaluates a prepared problem around where it stands; the parameters are θ between calls.

    Large float32 and float64 models are rounded to a grid on which perturbations are exact (`FixedPoint`); the session
    that prepared the problem puts their own values back.

    Args:
        objective: Prepared with ``differentiable=False``.
        seed: Seed of the directions.

    Attributes:
        objective: What is evaluated.
        loss: ``f₀``.
        evaluations: Losses of the whole problem computed so far.
        centres: How many of them were f₀.
        typical_size: Of the parameters, from the root mean square of every tensor; 1 where all are zero.
        farthest: Longest step that still says something about the parameters where they are.
    """

    def __init__(self, objective: Objective, *, seed: int) -> None:
        size = min(max(objective.num_params // BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
        self.evaluations = self.centres = 0
        self.objective = objective
        self._blocks = partition(objective.params, block_size=size)
        devices = dict.fromkeys(block.device for block in self._blocks)
        self._devices = {device: (index,) if index else () for index, device in enumerate(devices)}
        self._seed, self._next = seed, 0
        self._buffers: Buffers = {}
        self._originals: Originals | None = None
        wide = all(p.dtype in (torch.float32, torch.float64) for p in objective.params)
        size_here: float = sum(p.numel() * p.element_size() for p in objective.params)
        self._part: tuple[int, ...] = ()
        if isinstance(objective.crew, Mirror):  # every rank moves a part of its own, all in the same way
            size_here, self._part = objective.crew.largest(size_here), (objective.crew.ranks.rank,)
        if not wide or size_here <= SNAPSHOT_BYTES:
            self._originals = Originals([piece for block in self._blocks for piece in block.pieces])
        self._keep = self._originals is not None and objective.num_params <= KEPT_SIZE
        self._perturbations: dict[float, Perturbation] = {}
        self._division: Division | None = None
        size_of_all = self._typical_size()
        self.typical_size, self.farthest = size_of_all or 1.0, NEAR * size_of_all or math.inf
        self.loss = self._centre()
        with torch.no_grad():
            self._precision = torch.finfo(objective.loss(objective.shards[0]).dtype).eps

    @property
    def resolution(self) -> float:
        """What the loss can be wrong by in its own dtype: a unit in the last place from adding up, one from storing."""
        return 2 * self._precision * abs(self.loss)

    def _typical_size(self) -> float:
        """Root mean squares of tensors, square roots averaged; 0 where all parameters are.

        A mean of squares would be that of the gains of a few layer norms, and a median nothing where half of the
        parameters have just left zero. Tensors of zeros have no size.
        """
        roots = count = 0.0
        for piece in (piece for block in self._blocks for piece in block.pieces):  # a wider copy of one at a time
            norm = float(torch.linalg.vector_norm(piece, dtype=torch.float64))
            if norm > 0:
                roots += piece.numel() * math.sqrt(norm / math.sqrt(piece.numel()))
                count += piece.numel()
        crew = self.objective.crew
        if isinstance(crew, Mirror):
            roots, count = crew.total(roots), crew.total(count)
        return (roots / count) ** 2 if count else 0.0

    @property
    def epsilon(self) -> float:
        """Relative spacing of the coarsest dtype among the parameters."""
        return max(torch.finfo(p.dtype).eps for p in self.objective.params)

    @property
    def held_bytes(self) -> int:
        """Memory that lasts between evaluations: buffers of a block, and copies of small or half-precision models."""
        largest = max(block.size * (8 if block.dtype == torch.float64 else 4) for block in self._blocks)
        directions = 4 * KEPT_GROUP * self.objective.num_params if self._keep else 0
        return 2 * largest + directions + (0 if self._originals is None else self._originals.in_memory)

    def direction(self, number: int | None = None) -> Direction:
        """The direction of a number, always the same for one seed; the next one where it is left out."""
        if number is None:
            number, self._next = self._next, self._next + 1
        streams = {
            device: new_generator(np.random.SeedSequence(self._seed, spawn_key=(number, *self._part, *more)), device)
            for device, more in self._devices.items()
        }
        return Direction(self._blocks, streams, law="gaussian", keep=self._keep, buffers=self._buffers)

    def combination(self, directions: Sequence[Direction], coefficients: Sequence[float]) -> Combination:
        """A weighted sum of directions."""
        return Combination(directions, coefficients, self._blocks)

    @torch.no_grad()
    def along(self, direction: Walk, h: float) -> Difference:
        """Slope and curvature along a direction, from steps of ``h`` to both sides; may be infinite or NaN."""
        perturbation = self._at(h)
        blocks = range(len(self._blocks))
        for index in blocks:
            perturbation.plus(index, direction.part(index))
        sign = 1
        try:
            above = self._values()
            for index in blocks:
                perturbation.minus(index, direction.part(index))
            sign = -1
            below = self._values()
        finally:
            for index in blocks:
                perturbation.restore(index, direction.part(index), sign=sign)
        division = self._division
        centre = self.loss if division is None else division.centre
        with np.errstate(all="ignore"):  # who asks sees what is not finite
            slopes, curvatures = (above - below) / (2 * h), ((above - centre) + (below - centre)) / h**2
        if division is None:
            return Difference(float(slopes), float(curvatures))
        found = np.stack([slopes, curvatures])
        slope, curvature = (found @ division.weights).tolist()
        return Difference(slope, curvature, found)

    @contextmanager
    def divided(self, indices: Sequence[Indices], h: float) -> Iterator[None]:
        """Know losses of parts of the data, one by one, in what is measured within.

        Args:
            indices: Which examples each part has; together they have all, each once.
            h: Largest step within.
        """
        self._at(h)
        self._division = Division(self.objective, indices)
        try:
            self._division.centre = self._values()
            self.centres += 1
            yield
        finally:
            self._division = None

    @torch.no_grad()
    def move(self, direction: Walk, h: float) -> None:
        """There and back without looking at the loss."""
        perturbation = self._at(h)
        for index in range(len(self._blocks)):
            perturbation.plus(index, direction.part(index))
            perturbation.minus(index, direction.part(index))
            perturbation.restore(index, direction.part(index), sign=-1)

    def reach(self, h: float) -> None:
        """Get ready for steps of ``h``, which may move θ to a grid."""
        self._at(h)

    def _at(self, h: float) -> Perturbation:
        if h not in self._perturbations:
            if self._originals is not None:
                self._perturbations[h] = Reloaded(self._blocks, self._originals, h=h)
            else:
                coarser = h > max(self._perturbations, default=0.0)
                self._perturbations[h] = FixedPoint(self._blocks, mu=h)
                self._perturbations[h].begin()
                if coarser:  # the grid of this h moves θ by a rounding error; a finer one contains it
                    self.loss = self._centre()
        return self._perturbations[h]

    def _centre(self) -> float:
        self.centres += 1
        return float(self._values())

    @torch.no_grad()
    def _values(self) -> Array:
        """The loss, or those of all parts; halves the micro-batch when memory runs out."""
        while True:
            try:
                value = np.float64(self.objective.value()) if self._division is None else self._division.losses()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                ran_out = error.with_traceback(None)
            else:
                self.evaluations += 1
                return np.asarray(value)
            release_memory(self.objective.device)
            if not self.objective.refine():
                raise NumericalError(
                    f"Memory on {self.objective.device} ran out in a forward pass, and the batches cannot be made "
                    "smaller. Use a smaller model or batch, --dtype bfloat16, or a device with more memory."
                ) from ran_out
            if self._division is not None:
                self._division.gather()
