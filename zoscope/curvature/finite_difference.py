"""Differences of the loss along random directions, and how far to step for them."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.minibatch import Division
from zoscope.curvature.operators import Array, within_memory
from zoscope.errors import NumericalError
from zoscope.optim.directions import Block, Buffers, Direction, buffer_for, new_generator, partition
from zoscope.optim.perturbation import SNAPSHOT_BYTES, Added, FixedPoint, Perturbation
from zoscope.problem import Objective
from zoscope.problem.model import Originals, ShardedGroup
from zoscope.problem.objective import Indices

BLOCKS = 128
"""Large models are cut into about so many blocks: what is drawn at a time is then below 1 % of them."""

SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 18, 1 << 23
NEAR = 0.5
"""Step, in units of the parameters, beyond which the loss is another one."""

KEPT_SIZE, KEPT_GROUP = 1 << 18, 16
"""Entries up to which directions are kept instead of being drawn again, and how many of them are at a time."""


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


@dataclass
class Combination:
    """``Σ_i c_i u_i`` of directions that are drawn again when they are needed.

    Args:
        directions: The ``u_i``.
        coefficients: The ``c_i``.
        blocks: What they cover.
        buffers: Where sums are made.
    """

    directions: Sequence[Direction]
    coefficients: Sequence[float]
    blocks: Sequence[Block]
    buffers: Buffers = field(default_factory=dict)

    def part(self, index: int) -> list[Tensor]:
        """The pieces of block ``index``, valid until the next call."""
        block = self.blocks[index]
        total: list[Tensor] = []
        for direction, coefficient in zip(self.directions, self.coefficients, strict=True):
            pieces = direction.part(index)
            if not total:
                total = block.views(buffer_for(block, pieces[0].dtype, self.blocks, self.buffers).zero_())
            torch._foreach_add_(total, pieces, alpha=coefficient)
        return total


class Reloaded(Added):
    """A perturbation that starts from the parameters' own values each time, kept where they cost no working memory.

    Both points are then rounded once, so that rounding hardly tilts them; half precision needs that.
    """

    def __init__(self, blocks: Sequence[Block], originals: Originals, *, h: float) -> None:
        super().__init__(blocks, mu=h)
        self._originals = originals
        first = np.cumsum([0, *(len(block.pieces) for block in blocks)])
        self._pieces = [range(start, stop) for start, stop in itertools.pairwise(first.tolist())]

    def begin(self) -> None:
        """Nothing: the values were taken when they were put aside."""

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from ``θ + hu`` to ``θ − hu``."""
        self._originals.put_back(self._pieces[index])
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=-self._mu)

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """Block ``index`` back to θ."""
        self._originals.put_back(self._pieces[index])
        return self.used(index, direction)


class Stencil:
    """Evaluates a prepared problem around where it stands; the parameters are θ between calls.

    Large float32 and float64 models are rounded to a grid on which perturbations are exact (`FixedPoint`); the session
    that prepared the problem puts their own values back.

    Args:
        objective: Prepared with ``differentiable=False``.
        seed: Seed of the directions.

    Attributes:
        objective: What is evaluated.
        blocks: Its parameters.
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
        self.blocks = partition(objective.params, block_size=size)
        devices = dict.fromkeys(block.device for block in self.blocks)
        self._devices = {device: (index,) if index else () for index, device in enumerate(devices)}
        self._seed, self._next = seed, 0
        self._buffers: Buffers = {}
        self._originals: Originals | None = None
        wide = all(p.dtype in (torch.float32, torch.float64) for p in objective.params)
        size_here: float = sum(p.numel() * p.element_size() for p in objective.params)
        self._part: tuple[int, ...] = ()
        if isinstance(objective.process_group, ShardedGroup):  # every rank moves a part of its own, all in the same way
            size_here, self._part = objective.process_group.largest(size_here), (objective.process_group.ranks.rank,)
        if not wide or size_here <= SNAPSHOT_BYTES:
            self._originals = Originals([piece for block in self.blocks for piece in block.pieces])
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
        for piece in (piece for block in self.blocks for piece in block.pieces):  # a wider copy of one at a time
            norm = float(torch.linalg.vector_norm(piece, dtype=torch.float64))
            if norm > 0:
                roots += piece.numel() * math.sqrt(norm / math.sqrt(piece.numel()))
                count += piece.numel()
        process_group = self.objective.process_group
        if isinstance(process_group, ShardedGroup):
            roots, count = process_group.total(roots), process_group.total(count)
        return (roots / count) ** 2 if count else 0.0

    @property
    def epsilon(self) -> float:
        """Relative spacing of the coarsest dtype among the parameters."""
        return max(torch.finfo(p.dtype).eps for p in self.objective.params)

    @property
    def held_bytes(self) -> int:
        """Memory that lasts between evaluations: buffers of a block, and copies of small or half-precision models."""
        largest = max(block.size * (8 if block.dtype == torch.float64 else 4) for block in self.blocks)
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
        return Direction(self.blocks, streams, law="gaussian", keep=self._keep, buffers=self._buffers)

    @torch.no_grad()
    def along(self, direction: Direction | Combination, h: float) -> Difference:
        """Slope and curvature along a direction, from steps of ``h`` to both sides; may be infinite or NaN."""
        perturbation = self.reach(h)
        blocks = range(len(self.blocks))
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
        self.reach(h)
        self._division = Division(self.objective, indices)
        try:
            self._division.centre = self._values()
            self.centres += 1
            yield
        finally:
            self._division = None

    @torch.no_grad()
    def move(self, direction: Direction | Combination, h: float) -> None:
        """There and back without looking at the loss."""
        perturbation = self.reach(h)
        for index in range(len(self.blocks)):
            perturbation.plus(index, direction.part(index))
            perturbation.minus(index, direction.part(index))
            perturbation.restore(index, direction.part(index), sign=-1)

    def reach(self, h: float) -> Perturbation:
        """Get ready for steps of ``h``, which may move θ to a grid."""
        if h not in self._perturbations:
            if self._originals is not None:
                self._perturbations[h] = Reloaded(self.blocks, self._originals, h=h)
            else:
                coarser = h > max(self._perturbations, default=0.0)
                self._perturbations[h] = FixedPoint(self.blocks, mu=h)
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
        stuck = (
            f"Memory on {self.objective.device} ran out in a forward pass, and the batches cannot be made smaller. Use "
            "a smaller model or batch, --dtype bfloat16, or a device with more memory."
        )
        compute = self.objective.value if self._division is None else self._division.losses
        value = within_memory(self.objective, compute, stuck=stuck)
        self.evaluations += 1
        return np.asarray(value)


Differences = Callable[[float], Sequence[Difference]]

MOST_DOUBLINGS = 24
"""The search ends so many factors of two away from its start."""

NOISE = 2.0
"""Relative disagreement with half the step from which differences are rounding alone, which makes √17."""

HUMP = 1.5
"""Rise of the disagreement that few directions may show by chance: the search looks beyond it."""

FLAT = 0.05
"""Disagreement of a valley that may be none: kinks add about as much at all steps, most unsteadily at short ones."""

UNITS = 8.0
"""Second differences of losses that are right to their resolution are wrong by about half so many of it."""


@dataclass
class _Trials:
    """Curvatures along a few directions at steps ``start·2^k``."""

    differences: Differences
    start: float
    budget: int
    reserve: int
    resolution: float
    spent: int = 0
    found: dict[int, Array] = field(default_factory=dict)

    def step(self, k: int) -> float:
        return math.ldexp(self.start, k)

    def at(self, k: int) -> Array:
        if k not in self.found:
            self.found[k] = np.array([difference.curvature for difference in self.differences(self.step(k))])
            self.spent += len(self.found[k])
        return self.found[k]

    def may(self, k: int) -> bool:
        """Whether another step is within the reach and the budget of the search."""
        known = all(neighbour in self.found for neighbour in (k, k - 1))
        return abs(k) <= MOST_DOUBLINGS and (known or self.spent + len(self.found[0]) <= self.budget)

    def finite(self, k: int) -> bool:
        return bool(np.isfinite(self.at(k)).all() and np.isfinite(self.at(k - 1)).all())

    def disagreement(self, k: int) -> float:
        """Relative difference between the curvatures at a step and at half of it: truncation above, rounding below."""
        if not self.finite(k):
            return math.inf
        here, half = self.at(k), self.at(k - 1)
        scale = float(np.sqrt(np.mean(here**2)))
        return float(np.sqrt(np.mean((here - half) ** 2))) / scale if scale > 0 else 0.0

    def quantised(self, k: int) -> bool:
        """Whether differences are equal, or zero, though directions are not."""
        return len(np.unique(self.at(k))) <= len(self.at(k)) // 2

    def tells(self, k: int) -> bool:
        """Whether differences show curvature, not rounding alone."""
        return self.disagreement(k) <= NOISE and not self.quantised(k)

    def coarse(self, k: int) -> bool:
        """Whether steps disagree by no more than the rounding of the loss itself."""
        apart = float(np.sqrt(np.mean((self.at(k) - self.at(k - 1)) ** 2)))
        return self.quantised(k) or self.step(k) ** 2 * apart <= UNITS * self.resolution


def choose_step(
    differences: Differences,
    *,
    start: float,
    tolerance: float,
    budget: int,
    reserve: int = 0,
    farthest: float = math.inf,
    resolution: float = 0.0,
) -> tuple[float, int]:
    """The step at which curvatures agree best with those at half of it.

    Truncation grows as h² and rounding as 1/h², four times as much at h/2, so that their balance shows as the least
    disagreement, whatever the dtype and the curvature are. The search walks down that valley by factors of two. Past
    the size of the parameters there may be another valley, where the loss is smooth on its way to somewhere else: no
    step is longer than ``farthest``, unless the loss could not resolve its differences otherwise.

    Args:
        differences: Tells for a step the differences along some directions, always the same.
        start: Where both may balance.
        tolerance: Relative disagreement that is good enough.
        budget: Most differences to spend.
        reserve: How many more where the start shows nothing but rounding, since all others would be spent in vain.
        farthest: Longest step that still says something about where it starts; ``inf`` where nothing tells.
        resolution: What a loss may be wrong by.

    Returns:
        The step h, and the differences spent.

    Raises:
        NumericalError: If no step gives finite losses.
    """
    trials = _Trials(differences, start, budget, reserve, resolution)

    def onward(k: int) -> bool:
        near = trials.step(k) <= farthest or (trials.finite(k - 1) and trials.coarse(k - 1))
        return near and trials.may(k)

    k = _first(trials, onward)
    if math.isinf(trials.disagreement(k)):
        raise NumericalError(
            f"No step gives finite losses around the given parameters: tried {trials.step(min(trials.found)):.1g} to "
            f"{trials.step(max(trials.found)):.1g} along random directions. The loss is defined on too small a "
            "neighbourhood, or not a function of the parameters alone."
        )
    return trials.step(_best(trials, k, onward, tolerance) if trials.tells(k) else k), trials.spent


def _first(trials: _Trials, onward: Callable[[int], bool]) -> int:
    """A step near the start that shows curvature; where none does, the longest, which bounds it best."""
    if trials.tells(0):
        return 0
    trials.budget += trials.reserve
    longest = 0
    if trials.finite(0):
        k = 1
        while onward(k) and trials.finite(k):
            longest = k
            if trials.tells(k):
                return k
            k += 1
    k = -1
    while trials.may(k):
        if trials.tells(k):
            return k
        if not trials.finite(longest) and trials.finite(k) and trials.at(k).any():  # else parameters hardly move
            longest = k
        k -= 1
    return longest


def _best(trials: _Trials, k: int, onward: Callable[[int], bool], tolerance: float) -> int:
    """The bottom of the valley around a step."""
    best, j = k, k - 1
    while trials.disagreement(best) > tolerance and trials.may(j) and trials.tells(j):
        if trials.disagreement(j) >= trials.disagreement(best):
            break
        best, j = j, j - 1
    j = k + 1
    while trials.disagreement(best) > tolerance and onward(j):
        least = trials.disagreement(best)
        if math.isinf(trials.disagreement(j)) or (trials.disagreement(j) > HUMP * least and least < FLAT):
            break
        best, j = min(best, j, key=trials.disagreement), j + 1
    return best
