"""Loss surfaces and parameters that are perturbed in place and come back exactly."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from zoscope.optim.directions import Block, new_generator
from zoscope.problem import pytree as nest
from zoscope.problem.objective import Examples, Shard

if TYPE_CHECKING:
    from zoscope.problem import Objective

Restore = Literal["auto", "snapshot", "fixed-point"]
SNAPSHOT_BYTES = 1 << 26


class Perturbation(Protocol):
    """Moves blocks of parameters to ``θ + μu``, from there to ``θ − μu``, and back to θ.

    Attributes:
        overwrites: Whether the directions handed over are written to; if so, they must be fresh each time.
    """

    overwrites: ClassVar[bool]

    def begin(self) -> None:
        """Take the parameters as they are now as θ."""
        ...

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from θ to ``θ + μu``."""
        ...

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from ``θ + μu`` to ``θ − μu``."""
        ...

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """Block ``index`` from ``θ + sign·μu`` back to θ; returns the u that was really used."""
        ...

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """The u that was really used for block ``index``."""
        ...


def choose_perturbation(blocks: Sequence[Block], *, mu: float, restore: Restore) -> Snapshot | FixedPoint:
    """The perturbation that ``restore`` names.

    ``auto`` is a snapshot for parameters of up to 64 MiB and for half precision, where a grid would be too coarse to
    train on, and fixed point for what is larger.

    Raises:
        ValueError: If ``restore`` is unknown, or names ``fixed-point`` for parameters in half precision.
    """
    half = any(b.dtype not in (torch.float32, torch.float64) for b in blocks)
    if restore not in get_args(Restore):
        raise ValueError(f"unknown restore {restore!r}: expected one of {', '.join(get_args(Restore))}")
    if restore == "fixed-point" and half:
        raise ValueError("restore='fixed-point' needs float32 or float64 parameters; use 'snapshot' for half precision")
    size = sum(p.numel() * p.element_size() for b in blocks for p in b.pieces)
    if restore == "snapshot" or (restore == "auto" and (half or size <= SNAPSHOT_BYTES)):
        return Snapshot(blocks, mu=mu)
    return FixedPoint(blocks, mu=mu)


class Added:
    """Adds directions as they are, in the parameters' dtype; whoever inherits knows θ.

    Args:
        blocks: The parameters.
        mu: The step μ.
    """

    overwrites: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[Block], *, mu: float) -> None:
        self._blocks = blocks
        self._mu = mu

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.plus`."""
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=self._mu)

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """See `Perturbation.used`."""
        dtype = self._blocks[index].dtype
        return list(direction) if direction[0].dtype == dtype else [u.to(dtype) for u in direction]


class Snapshot(Added):
    """Keeps a copy of θ; see the module's text."""

    def __init__(self, blocks: Sequence[Block], *, mu: float) -> None:
        super().__init__(blocks, mu=mu)
        self._saved = [[torch.empty_like(p) for p in b.pieces] for b in blocks]

    def begin(self) -> None:
        """See `Perturbation.begin`."""
        for block, saved in zip(self._blocks, self._saved, strict=True):
            torch._foreach_copy_(saved, block.pieces)

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.minus`."""
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=-2.0 * self._mu)

    def far(self, index: int, direction: Sequence[Tensor], distance: float) -> None:
        """Block ``index`` from wherever it is to ``θ + distance·u``."""
        pieces = self._blocks[index].pieces
        torch._foreach_copy_(pieces, self._saved[index])
        torch._foreach_add_(pieces, self.used(index, direction), alpha=distance)

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """See `Perturbation.restore`."""
        torch._foreach_copy_(self._blocks[index].pieces, self._saved[index])
        return self.used(index, direction)


class FixedPoint:
    """Keeps θ on a grid on which every perturbation is exact; see the module's text."""

    overwrites: ClassVar[bool] = True

    def __init__(self, blocks: Sequence[Block], *, mu: float) -> None:
        self._blocks = blocks
        self._mu = mu
        unit = 2.0 ** math.floor(math.log2(mu))
        self._bound = 16.0 * unit
        self._finest = unit / 64.0
        self._spacing: list[list[float]] = []

    def begin(self) -> None:
        """See `Perturbation.begin`: rounds θ to its grid, which changes nothing where it lies there already."""
        self._spacing = []
        for block in self._blocks:
            shift = torch._foreach_sign(block.pieces)
            torch._foreach_mul_(shift, self._bound)
            torch._foreach_add_(block.pieces, shift)
            torch._foreach_sub_(block.pieces, shift)
            self._spacing.append([self._spacing_for(value, block.dtype) for value in _largest(block.pieces)])

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.plus`."""
        torch._foreach_add_(self._blocks[index].pieces, self._delta(index, direction))

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.minus`."""
        torch._foreach_sub_(self._blocks[index].pieces, self._delta(index, direction), alpha=2.0)

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """See `Perturbation.restore`."""
        delta = self._delta(index, direction)
        torch._foreach_sub_(self._blocks[index].pieces, delta, alpha=float(sign))
        torch._foreach_div_(delta, self._mu)
        return delta

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """See `Perturbation.used`."""
        delta = self._delta(index, direction)
        torch._foreach_div_(delta, self._mu)
        return delta

    def _delta(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        spacing = self._spacing[index]
        delta = list(direction)
        torch._foreach_mul_(delta, [self._mu / s for s in spacing])
        torch._foreach_round_(delta)
        torch._foreach_mul_(delta, spacing)
        return delta

    def _spacing_for(self, largest: float, dtype: torch.dtype) -> float:
        # A run that blew up is data: whatever δ is then, its parameters stay non-finite.
        if not math.isfinite(largest):
            return self._finest
        exponent = math.floor(math.log2(largest + self._bound))
        return max(self._finest, 2.0**exponent * torch.finfo(dtype).eps)


def _largest(pieces: Sequence[Tensor]) -> list[float]:
    """Largest absolute value of each tensor."""
    # A maximum norm takes as long as drawing the direction; the two extremes a twentieth of it.
    ends = torch.stack([end for piece in pieces for end in torch.aminmax(piece)])
    return ends.abs_().view(-1, 2).amax(1).tolist()


STACKED_BYTES = 1 << 28  # parameters of all replicas together; above, running them together gains nothing
WIDE = 32  # columns from which a product for every row is as fast as one for all
MatMat = Callable[[Tensor], Tensor]


class Surface(ABC):
    """A loss as a function of flat parameter vectors, the rows of ``theta`` ``(R, d)``."""

    def begin(self, replicas: Sequence[int]) -> None:  # noqa: B027 - most have nothing to do
        """The rows are these replicas from here on, and start anew."""

    def next_step(self) -> None:  # noqa: B027
        """A step begins: whatever a step sees of the data, all of its estimates see."""

    def keep(self, rows: Sequence[int]) -> None:  # noqa: B027
        """These of the rows that there were at ``begin`` are left."""

    @abstractmethod
    def values(self, theta: Tensor) -> Tensor:
        """Losses ``(R,)``, float64."""

    @abstractmethod
    def slopes(self, theta: Tensor, directions: Tensor, mu: float, *, one_sided: bool = False) -> tuple[Tensor, Tensor]:
        """``(f(θ+μu) − f(θ−μu))/(2μ)`` and ``(f(θ+μu) + f(θ−μu))/2`` for every row, each ``(R,)``, float64.

        One-sided: ``(f(θ+μu) − f(θ))/μ`` and ``f(θ)``.
        """

    @abstractmethod
    def gradients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``(R, d)`` and losses ``(R,)``."""


class SequentialSurface(Surface):
    """The problem's own loss, one row after another, with the parameters written into the model.

    Args:
        objective: The prepared problem.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def values(self, theta: Tensor) -> Tensor:
        """See `Surface.values`."""
        losses = []
        for row in theta:
            self._objective.write(row)
            losses.append(self._objective.value())
        return torch.tensor(losses, dtype=torch.float64, device=theta.device)

    def slopes(self, theta: Tensor, directions: Tensor, mu: float, *, one_sided: bool = False) -> tuple[Tensor, Tensor]:
        """See `Surface.slopes`."""
        above = self.values(torch.add(theta, directions, alpha=mu))
        if one_sided:
            here = self.values(theta)
            return (above - here) / mu, here
        below = self.values(torch.add(theta, directions, alpha=-mu))
        return (above - below) / (2.0 * mu), 0.5 * (above + below)

    def gradients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `Surface.gradients`."""
        objective, rows, losses = self._objective, [], []
        for row in theta:
            objective.write(row)
            loss, flat = objective.gradient()
            rows.append(flat)
            losses.append(loss)
        return torch.stack(rows), torch.tensor(losses, dtype=torch.float64, device=theta.device)


class MiniBatchSurface(SequentialSurface):
    """A new random mini-batch for every step, the same for all points that the step looks at; one replica at a time.

    A replica sees the same mini-batches whatever the step size, and whichever replicas ran before it.

    Args:
        objective: The prepared problem.
        batch_size: Examples of a mini-batch, drawn without replacement.
        seed: Seed of all mini-batches.
    """

    def __init__(self, objective: Objective, batch_size: int, *, seed: int) -> None:
        super().__init__(objective)
        self.batch_size, self.seed = batch_size, seed
        self._examples = Examples(objective)
        self._generator, self._shards = new_generator(seed), objective.shards

    def begin(self, replicas: Sequence[int]) -> None:
        """See `Surface.begin`."""
        (replica,) = replicas
        # Two numbers: the streams of the directions have one.
        self._generator = new_generator(np.random.SeedSequence(self.seed, spawn_key=(0, replica)))

    def next_step(self) -> None:
        """See `Surface.next_step`."""
        self._shards = self._examples.draw(self.batch_size, self._generator)

    def slopes(self, theta: Tensor, directions: Tensor, mu: float, *, one_sided: bool = False) -> tuple[Tensor, Tensor]:
        """See `Surface.slopes`; of the mini-batch."""
        objective, pairs = self._objective, []
        for row, direction in zip(theta, directions, strict=True):
            objective.write(torch.add(row, direction, alpha=mu))
            above = objective.value_of(self._shards)
            objective.write(row if one_sided else torch.add(row, direction, alpha=-mu))
            pairs.append((above, objective.value_of(self._shards)))
        above_below = torch.tensor(pairs, dtype=torch.float64, device=theta.device)
        rises = above_below[:, 0] - above_below[:, 1]
        return (rises / mu, above_below[:, 1]) if one_sided else (rises / (2.0 * mu), above_below.mean(dim=1))


class StackedSurface(Surface):
    """The problem's loss on all rows at once, through ``torch.func.vmap``.

    Small models spend their time in vmap itself: what it does is recorded once for each number of rows, and replayed.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._replays: dict[int, Callable[[Tensor], Tensor]] = {}
        self._points: Tensor | None = None

    def _total(self, flat: Tensor) -> Tensor:
        objective = self._objective
        tensors = objective.unflatten(flat)
        first, *others = objective.shards
        if not others:
            return objective.loss_at(tensors, first)
        losses = [shard.weight * objective.loss_at(tensors, shard) for shard in objective.shards]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def values(self, theta: Tensor) -> Tensor:
        """See `Surface.values`."""
        rows = len(theta)
        if rows not in self._replays:
            # What a recording gets wrong runs directly as well.
            self._replays[rows] = _replayed(vmap(self._total), theta)
        return self._replays[rows](theta).double()

    def slopes(self, theta: Tensor, directions: Tensor, mu: float, *, one_sided: bool = False) -> tuple[Tensor, Tensor]:
        """See `Surface.slopes`; both points in one evaluation."""
        rows = len(theta)
        if self._points is None or len(self._points) != 2 * rows:
            self._points = theta.new_empty((2 * rows, theta.shape[1]))
        torch.add(theta, directions, alpha=mu, out=self._points[:rows])
        torch.sub(theta, directions, alpha=0.0 if one_sided else mu, out=self._points[rows:])
        above, below = self.values(self._points).view(2, rows)
        return ((above - below) / mu, below) if one_sided else ((above - below) / (2.0 * mu), 0.5 * (above + below))

    def gradients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `Surface.gradients`."""
        gradients, losses = vmap(grad_and_value(self._total))(theta)
        return gradients, losses.double()


class StackedMiniBatchSurface(StackedSurface):
    """The mini-batches of `MiniBatchSurface`, those of all replicas at once.

    Args:
        objective: The prepared problem.
        batch_size: Examples of a mini-batch, drawn without replacement.
        seed: Seed of all mini-batches.

    Raises:
        ValueError: If the examples of the problem do not fit into one batch.
    """

    def __init__(self, objective: Objective, batch_size: int, *, seed: int) -> None:
        super().__init__(objective)
        self._examples = Examples(objective)
        if objective.batch_size_of is not None or objective.on_host or self._examples.whole:
            raise ValueError("the examples do not fit into one batch")
        self._all = nest.joined([shard.batch for shard in objective.shards])
        self.batch_size, self.seed = min(batch_size, self._examples.count), seed
        self._steps: dict[int, Callable[..., Tensor]] = {}
        self._drawn: Tensor = torch.empty(0)
        self.begin([0])

    def begin(self, replicas: Sequence[int]) -> None:
        """See `Surface.begin`."""
        keys = [np.random.SeedSequence(self.seed, spawn_key=(0, replica)) for replica in replicas]
        self._generators, self._rows = [new_generator(key) for key in keys], list(range(len(replicas)))

    def keep(self, rows: Sequence[int]) -> None:
        """See `Surface.keep`."""
        self._rows = list(rows)
        self._drawn = self._drawn[: len(rows)]

    def next_step(self) -> None:
        """See `Surface.next_step`."""
        orders = [torch.randperm(self._examples.count, generator=self._generators[r]) for r in self._rows]
        self._drawn = torch.stack([order[: self.batch_size] for order in orders]).to(self._objective.device)

    def _of_batch(self, flat: Tensor, indices: Tensor) -> Tensor:
        batch = nest.rows(self._all, indices, of=self._examples.count)
        shard = Shard(batch, 1.0, self.batch_size, self.batch_size)
        return self._objective.loss_at(self._objective.unflatten(flat), shard)

    @torch.no_grad()
    def slopes(self, theta: Tensor, directions: Tensor, mu: float, *, one_sided: bool = False) -> tuple[Tensor, Tensor]:
        """See `Surface.slopes`; of the mini-batches."""
        rows, drawn = len(theta), self._drawn.repeat(2, 1)
        points = torch.cat([theta + mu * directions, theta if one_sided else theta - mu * directions])
        if rows not in self._steps:
            self._steps[rows] = _replayed(vmap(self._of_batch), points, drawn)
        above, below = self._steps[rows](points, drawn).double().view(2, rows)
        if one_sided:
            return (above - below) / mu, below
        return (above - below) / (2.0 * mu), 0.5 * (above + below)

    def batch_gradients(self, theta: Tensor) -> Tensor:
        """Gradients ``(R, d)`` over the mini-batches of this step."""
        gradients: Tensor = vmap(grad(self._of_batch))(theta, self._drawn)
        return gradients


def _replayed(direct: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """A recording of a function, which small models run faster; whatever cannot be recorded runs directly."""
    expected = direct(*inputs)
    try:
        replay = make_fx(lambda *given: direct(*given))(*inputs)
        _share_inputs(replay)
        close = torch.allclose(replay(*inputs), expected, rtol=1e-4, equal_nan=True)
    except Exception:
        return direct
    return replay if close else direct


def _share_inputs(graph: GraphModule) -> None:
    """Where all rows of a recording multiply the same input, as in a first layer, use one product for all of them.

    vmap multiplies a copy of the input for every row: many thin products, several times slower than a wide one.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.bmm.default:
            node.target = _batched_product
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _batched_product(left: Tensor, right: Tensor) -> Tensor:
    """``(n, k, l)`` times ``(n, l, m)``."""
    if left.stride(0) != 0 or right.shape[2] >= WIDE:
        return torch.bmm(left, right)
    count, inner, width = right.shape
    wide = left[0] @ right.movedim(1, 2).reshape(count * width, inner).T
    return wide.view(-1, count, width).movedim(1, 0).contiguous()


class QuadraticSurface(Surface):
    """The quadratic model ``f₀ + gᵀδ + ½ δᵀHδ`` of a loss around ``θ₀``, ``δ = θ − θ₀``.

    Args:
        origin: θ₀, ``(d,)``.
        loss: f₀.
        gradient: g, ``(d,)``.
        matmat: ``(k, d) → (k, d)``, rows times H; exact two-point slopes take one product a row, whatever μ is.
    """

    def __init__(self, origin: Tensor, *, loss: float, gradient: Tensor, matmat: MatMat) -> None:
        self._origin, self._loss, self._gradient, self._matmat = origin, loss, gradient, matmat

    def _model(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        delta = theta - self._origin
        product = self._matmat(delta)
        linear = (delta.double() @ self._gradient.double()) + 0.5 * (delta.double() * product.double()).sum(dim=1)
        return product + self._gradient, self._loss + linear

    def values(self, theta: Tensor) -> Tensor:
        """See `Surface.values`."""
        return self._model(theta)[1]

    def slopes(self, theta: Tensor, directions: Tensor, mu: float, *, one_sided: bool = False) -> tuple[Tensor, Tensor]:
        """See `Surface.slopes`; the loss is that at θ itself."""
        gradients, losses = self._model(theta)
        slopes = (gradients.double() * directions.double()).sum(dim=1)
        if one_sided:
            slopes += 0.5 * mu * (directions.double() * self._matmat(directions).double()).sum(dim=1)
        return slopes, losses

    def gradients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """See `Surface.gradients`."""
        return self._model(theta)


def choose_surface(objective: Objective, *, replicas: int, first_order: bool) -> tuple[Surface, str | None]:
    """The faster way to evaluate ``replicas`` rows: together where the model allows it and it pays, else in turn.

    Both see the same directions; they differ by rounding alone.

    Returns:
        The surface, and the reason when the replicas cannot run together.
    """
    one_by_one = SequentialSurface(objective)
    size = objective.num_params * torch.finfo(objective.dtype).bits // 8
    if replicas == 1 or replicas * size > STACKED_BYTES:
        return one_by_one, None
    stacked = StackedSurface(objective)
    start = objective.read()
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).to(start)
    theta = start + 1e-3 * torch.linspace(0, 1, replicas).to(start)[:, None] * noise
    try:
        # What a user's model raises under vmap can be anything; all of it means the same here.
        together = stacked.gradients(theta)[1] if first_order else stacked.values(theta)
        expected = one_by_one.values(theta)
        if not torch.allclose(together, expected, rtol=1e-3, atol=1e-6, equal_nan=True):
            return one_by_one, "the model gives other losses when several copies run together (torch.func.vmap)"
        # Clearly slower, not a little: timings on a busy machine must not change how a run is done.
        fast = _seconds(lambda: stacked.values(theta)) < 1.25 * _seconds(lambda: one_by_one.values(theta))
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return one_by_one, f"the model does not run under torch.func.vmap ({first_line})"
    finally:
        objective.write(start)
    return (stacked if fast else one_by_one), None


def choose_mini_batches(
    objective: Objective, batch_size: int, *, replicas: int, seed: int
) -> MiniBatchSurface | StackedMiniBatchSurface:
    """The faster way to give every replica mini-batches of its own: the same ones either way."""
    one_by_one = MiniBatchSurface(objective, batch_size, seed=seed)
    start = objective.read()
    if replicas == 1 or 2 * replicas * start.numel() * start.element_size() > STACKED_BYTES:
        return one_by_one
    try:
        stacked = StackedMiniBatchSurface(objective, batch_size, seed=seed)
        theta, u = start.repeat(replicas, 1), torch.ones_like(start).repeat(replicas, 1)
        stacked.begin(range(replicas))
        stacked.next_step()
        found = stacked.slopes(theta, u, 1e-3)
        one_by_one.begin([0])
        one_by_one.next_step()
        expected = one_by_one.slopes(theta[:1], u[:1], 1e-3)
        if not torch.allclose(found[1][:1], expected[1], rtol=1e-4, atol=1e-7):
            return one_by_one

        def turns() -> Tensor:
            return torch.cat([one_by_one.slopes(theta[:1], u[:1], 1e-3)[1] for _ in range(replicas)])

        fast = _seconds(lambda: stacked.slopes(theta, u, 1e-3)[1]) < 1.25 * _seconds(turns)
    except Exception:  # what a user's model raises under vmap can be anything
        return one_by_one
    finally:
        objective.write(start)
    return stacked if fast else one_by_one


def _seconds(function: Callable[[], Tensor]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function().sum().item()  # waits for a device that works ahead
        best = min(best, time.perf_counter() - start)
    return best
