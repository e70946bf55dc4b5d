"""What replicas of a run did."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.optim.directions import fill_rows, spawn_streams
from zoscope.optim.perturbation import MiniBatchSurface, Surface
from zoscope.optim.rules import Rule, new_state
from zoscope.registry import Directions
from zoscope.runtime import collective

if TYPE_CHECKING:
    from zoscope.problem import Objective


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What R replicas did.

    Args:
        steps: ``(n,)`` steps at which they were looked at, 0 first.
        losses: ``(n, R)``; infinite from where a replica has left.
        distances: ``(n, R)`` squared distances from the start, param²; infinite likewise.
        left: For each replica the step at which its loss passed the limit or stopped being finite; ``None`` if never.
        last: ``(R, d)`` where each replica was when it was last seen in the valley.
        last_steps: The step of that.
        second_moment: ``(R, d)`` Adam's v at that step; ``None`` for other rules.
        length: Steps asked for.
        done: Steps run by the replicas that stayed.
        seconds: Wall time.
    """

    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    distances: NDArray[np.float64]
    left: tuple[int | None, ...]
    last: Tensor
    last_steps: tuple[int, ...]
    second_moment: Tensor | None
    length: int
    done: int
    seconds: float

    @property
    def capped(self) -> bool:
        """Whether time ran out before the run was over."""
        return self.done < self.length

    def to(self, device: torch.device) -> Trajectory:
        """The same with its tensors on a device."""
        moment = None if self.second_moment is None else self.second_moment.to(device)
        return replace(self, last=self.last.to(device), second_moment=moment)


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """The trajectories of groups, in the order of their replicas, as one."""
    if len(parts) == 1:
        return parts[0]
    longest = max(parts, key=lambda part: len(part.steps))

    def side_by_side(columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        rows = len(longest.steps)
        return np.hstack([np.pad(c, ((0, rows - len(c)), (0, 0)), constant_values=np.inf) for c in columns])

    stayed = [part.done for part in parts if None in part.left]
    moments = [part.second_moment for part in parts if part.second_moment is not None]
    return Trajectory(
        longest.steps,
        side_by_side([part.losses for part in parts]),
        side_by_side([part.distances for part in parts]),
        tuple(step for part in parts for step in part.left),
        torch.cat([part.last for part in parts]),
        tuple(step for part in parts for step in part.last_steps),
        torch.cat(moments) if moments else None,
        longest.length,
        min(stayed, default=longest.length),
        sum(part.seconds for part in parts),
    )


RECORDS = 100  # points of a recorded curve
Tick = Callable[[int], None]


@dataclass(frozen=True)
class ZerothOrderEstimator:
    """Where the update comes from.

    Args:
        order: 0 for the two-point estimate, 1 for the gradient.
        mu: Smoothing radius μ, in the parameters' unit.
        queries: Directions averaged in an estimate.
        directions: Their law.
        one_sided: Whether differences are those of ``f(θ+μu)`` and ``f(θ)``.
    """

    order: int = 0
    mu: float = 1e-3
    queries: int = 1
    directions: Directions = "gaussian"
    one_sided: bool = False


@dataclass(frozen=True)
class Limits:
    """When a replica is given up.

    Args:
        left: Loss above which a replica has left the valley.
        valley: Loss up to which it counts as inside, so that its position is worth keeping.
        deadline: ``time.perf_counter()`` at which to stop; ``None`` for never.
    """

    left: float = math.inf
    valley: float = math.inf
    deadline: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # the clock of another machine shows another time
        return _limits, (self.left, self.valley, None if self.deadline is None else self.deadline - time.perf_counter())


def _limits(left: float, valley: float, seconds: float | None) -> Limits:
    return Limits(left, valley, None if seconds is None else time.perf_counter() + seconds)


@dataclass(frozen=True, eq=False)
class ReplicaPlan:
    """A run of several replicas.

    Args:
        rule: Update rule.
        estimator: Source of the update.
        lr: Step size.
        steps: Steps to run.
        replicas: Number R of direction streams; replica r sees the same directions however the replicas are run.
        chosen: The replicas to run; ``None`` for all of them.
        seed: Seed that the streams are spawned from.
        limits: When to stop.
        shape: Step size of a step, from 0, over ``lr``; ``None`` for a constant one.
        records: Points of the recorded curve; each is a loss over all examples.
    """

    rule: Rule
    estimator: ZerothOrderEstimator
    lr: float
    steps: int
    replicas: int
    seed: int
    limits: Limits
    shape: Callable[[float], float] | None = None
    records: int = RECORDS
    chosen: tuple[int, ...] | None = None

    @property
    def numbers(self) -> Sequence[int]:
        """Which replicas run."""
        return range(self.replicas) if self.chosen is None else self.chosen


@dataclass
class _Rows:
    """Replicas that are still running."""

    index: list[int]
    theta: Tensor
    state: dict[str, list[Tensor]]
    streams: list[torch.Generator]

    def keep(self, alive: Tensor) -> None:
        if bool(alive.all()):
            return
        numbers = [n for n, yes in enumerate(alive.tolist()) if yes]
        self.index = [self.index[n] for n in numbers]
        self.streams = [self.streams[n] for n in numbers]
        self.theta = self.theta[alive]
        self.state = {slot: [tensors[0][alive]] for slot, tensors in self.state.items()}


@dataclass
class _Record:
    """The curve so far."""

    start: Tensor
    replicas: int
    steps: list[int] = field(default_factory=list)
    losses: list[NDArray[np.float64]] = field(default_factory=list)
    distances: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, step: int, rows: _Rows, losses: Tensor) -> None:
        self.steps.append(step)
        loss, distance = np.full(self.replicas, np.inf), np.full(self.replicas, np.inf)
        loss[rows.index] = losses.cpu().numpy()
        squares = (rows.theta - self.start).double().square().sum(dim=1)
        distance[rows.index] = squares.where(torch.isfinite(losses), math.inf).cpu().numpy()
        self.losses.append(loss)
        self.distances.append(distance)


def run(
    surface: Surface, start: Tensor, plan: ReplicaPlan, *, together: bool, on_step: Tick | None = None
) -> Trajectory:
    """Run the replicas of a plan, copies of an optimizer, from ``start`` ``(d,)``.

    Args:
        surface: The loss.
        start: Where every replica starts.
        plan: How.
        together: Whether to step all replicas at a time; otherwise one is run to its end after another.
        on_step: Called with the number of replica steps just done.
    """
    groups = [list(plan.numbers)] if together else [[replica] for replica in plan.numbers]
    return joined(run_groups(surface, start, plan, groups=groups, on_step=on_step))


@torch.no_grad()
def run_groups(
    surface: Surface, start: Tensor, plan: ReplicaPlan, *, groups: Sequence[Sequence[int]], on_step: Tick | None = None
) -> list[Trajectory]:
    """Run some of the replicas: those of a group together, and one group to its end after another.

    Returns:
        A trajectory per group.
    """
    streams, limits = spawn_streams(plan.seed, plan.replicas, start.device), plan.limits
    parts = []
    for number, group in enumerate(groups):
        share = None
        if limits.deadline is not None:
            now = time.perf_counter()
            share = now + (limits.deadline - now) / (len(groups) - number)
        surface.begin(group)
        runner = _Runner(surface, start, replace(plan, limits=replace(limits, deadline=share)), on_step)
        parts.append(runner.run([streams[r] for r in group]))
    return parts


class _Runner:
    def __init__(self, surface: Surface, start: Tensor, plan: ReplicaPlan, on_step: Tick | None) -> None:
        self._surface, self._start, self._on_step = surface, start, on_step
        self._rule, self._estimator, self._lr = plan.rule, plan.estimator, plan.lr
        self._steps, self._limits = plan.steps, plan.limits
        self._shape, self._records = plan.shape, plan.records

    def run(self, streams: list[torch.Generator]) -> Trajectory:
        began, count, steps = time.perf_counter(), len(streams), self._steps
        theta = self._start.repeat(count, 1)
        rows = _Rows(list(range(count)), theta, new_state(self._rule, [theta]), list(streams))
        left: list[int | None] = [None] * count
        last, last_steps = theta.clone(), [0] * count
        moments = torch.zeros_like(theta) if "exp_avg_sq" in rows.state else None
        ceiling = min(self._limits.left, sys.float_info.max)
        record, done, every = _Record(self._start, count), 0, max(1, steps // self._records)
        record.add(0, rows, self._surface.values(rows.theta))
        for step in range(1, steps + 1):
            if self._limits.deadline is not None and time.perf_counter() > self._limits.deadline:
                break
            alive = self._advance(rows, step) <= ceiling  # not when it is NaN
            looking = step % every == 0 or step == steps
            # What a step sees is the loss smoothed over μ, far above a small loss perhaps: it only raises a doubt.
            if looking or not bool(alive.all()):
                losses = self._surface.values(rows.theta)
                alive = losses <= ceiling
                if looking:
                    for n in torch.nonzero(losses <= self._limits.valley).flatten().tolist():
                        last[rows.index[n]], last_steps[rows.index[n]] = rows.theta[n], step
                        if moments is not None:
                            moments[rows.index[n]] = rows.state["exp_avg_sq"][0][n]
                    record.add(step, rows, losses.where(alive, math.inf))
                for n in torch.nonzero(~alive).flatten().tolist():
                    left[rows.index[n]] = step
                rows.keep(alive)
                self._surface.keep(rows.index)
            done = step
            if self._on_step is not None:
                self._on_step(max(len(rows.index), 1))
            if not rows.index:
                done = steps
                break
        return Trajectory(
            np.array(record.steps),
            np.array(record.losses),
            np.array(record.distances),
            tuple(left),
            last,
            tuple(last_steps),
            moments,
            steps,
            done,
            time.perf_counter() - began,
        )

    def _advance(self, rows: _Rows, step: int) -> Tensor:
        """One step of every row; losses before it."""
        self._surface.next_step()
        if self._estimator.order == 1:
            estimate, losses = self._surface.gradients(rows.theta)
        else:
            estimate, losses = self._estimate(rows)
        lr = self._lr if self._shape is None else self._lr * self._shape(step - 1)
        self._rule.update([rows.theta], [estimate], rows.state, lr=lr, step=step)
        return losses

    def _estimate(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        total, losses, slopes = self._query(rows)
        squares = slopes.square()
        for _ in range(self._estimator.queries - 1):
            estimate, means, slopes = self._query(rows)
            total += estimate
            losses = losses + means
            squares += slopes.square()
        queries = self._estimator.queries
        if queries > 1:
            total, losses = total.div_(queries), losses / queries
        if self._rule.normalizes:
            size = (squares / queries).sqrt()
            total /= size.where(size > 0, 1.0).to(total.dtype)[:, None]
        return total, losses

    def _query(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """A two-point estimate along one direction per row, the loss, and the slope along it."""
        directions = fill_rows(torch.empty_like(rows.theta), law=self._estimator.directions, streams=rows.streams)
        slopes, means = self._surface.slopes(
            rows.theta, directions, self._estimator.mu, one_sided=self._estimator.one_sided
        )
        return directions.mul_(slopes.to(directions.dtype)[:, None]), means, slopes


CPU = torch.device("cpu")


def run_mini_batches(
    objective: Objective,
    surface: MiniBatchSurface,
    start: Tensor,
    plan: ReplicaPlan,
    *,
    on_step: Callable[[int], None] | None = None,
) -> Trajectory:
    """Replicas with mini-batches, here one after another or dealt out to the ranks of a job: the same, bit for bit.

    Args:
        objective: The prepared problem; its parameters are at ``start``.
        surface: Its mini-batches.
        start: Where every replica starts, ``(d,)``.
        plan: How.
        on_step: Called with the number of replica steps just done, on this rank.
    """
    if len(plan.numbers) == 1:
        return run(surface, start, plan, together=False, on_step=on_step)
    parts = _dealt(objective, surface.batch_size, surface.seed, start, plan, surface=surface, on_step=on_step)
    return joined([part.to(start.device) for part in parts])


@collective
def _dealt(
    objective: Objective,
    batch_size: int,
    seed: int,
    start: Tensor,
    plan: ReplicaPlan,
    *,
    surface: MiniBatchSurface | None = None,
    on_step: Tick | None = None,
) -> list[Trajectory]:
    """Run this rank's replicas; those of all ranks on rank 0, on the CPU, and nothing on the others."""
    ranks = objective.ranks
    surface = surface or MiniBatchSurface(objective, batch_size, seed=seed)
    groups = [[int(replica)] for replica in np.array_split(np.array(plan.numbers), ranks.size)[ranks.rank]]
    with objective.alone():  # losses are this rank's own
        parts = ranks.attempt(lambda: run_groups(surface, start, plan, groups=groups, on_step=on_step))
    return [part for found in ranks.gather([part.to(CPU) for part in parts]) for part in found]
