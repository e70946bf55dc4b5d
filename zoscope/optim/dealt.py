"""Replicas of a mini-batch run on several ranks: each runs its own to the end, on all of the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from zoscope.optim.replicas import Plan, run, run_groups
from zoscope.optim.rules import FrozenAdam, Rule
from zoscope.optim.surface import MiniBatchSurface, Surface
from zoscope.optim.trajectory import Trajectory, joined
from zoscope.problem.together import Crew

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem import Objective
    from zoscope.problem.together import Post
    from zoscope.runtime import Ranks

CPU = torch.device("cpu")


def run_mini_batches(
    objective: Objective,
    surface: MiniBatchSurface,
    start: Tensor,
    plan: Plan,
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
    crew = objective.crew
    if not isinstance(crew, Crew) or not crew.follows or plan.replicas == 1:
        return run(surface, start, plan, together=False, on_step=on_step)
    crew.work("zoscope.optim.dealt:take_part", surface.batch_size, surface.seed, _packed(plan))
    objective.crew = None  # losses are this rank's own from here on
    try:
        parts = _dealt(crew.ranks, surface, start, plan, on_step=on_step)
    finally:
        objective.crew = crew
    return joined([part.to(start.device) for part in parts])


def take_part(post: Post, batch_size: int, seed: int, plan: Plan) -> None:
    """The replicas of another rank."""
    objective = post.objective
    surface = MiniBatchSurface(objective, batch_size, seed=seed)
    _dealt(post.ranks, surface, objective.read(), _unpacked(plan, objective.device))


def _dealt(
    ranks: Ranks, surface: Surface, start: Tensor, plan: Plan, *, on_step: Callable[[int], None] | None = None
) -> list[Trajectory]:
    """Run this rank's replicas; those of all ranks on rank 0, on the CPU, and nothing on the others."""
    mine = np.array_split(np.arange(plan.replicas), ranks.size)[ranks.rank]
    groups = [[int(replica)] for replica in mine]
    parts = ranks.attempt(lambda: run_groups(surface, start, plan, groups=groups, on_step=on_step))
    return [part for found in ranks.gather([part.to(CPU) for part in parts]) for part in found]


def _packed(plan: Plan) -> Plan:
    """A plan that can travel: the clock of another machine shows another time."""
    deadline = plan.limits.deadline
    left = None if deadline is None else deadline - time.perf_counter()
    return replace(plan, rule=_moved(plan.rule, CPU), limits=replace(plan.limits, deadline=left))


def _unpacked(plan: Plan, device: torch.device) -> Plan:
    left = plan.limits.deadline
    deadline = None if left is None else left + time.perf_counter()
    return replace(plan, rule=_moved(plan.rule, device), limits=replace(plan.limits, deadline=deadline))


def _moved(rule: Rule, device: torch.device) -> Rule:
    if not isinstance(rule, FrozenAdam):
        return rule
    return FrozenAdam([p.to(device) for p in rule.preconditioner], beta1=rule.beta1)
