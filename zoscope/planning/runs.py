"""Runs of a planned training at one step size: rehearsed, or real ones where those are cheaper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import Chain
from zoscope.curvature.operators import HessianOperator
from zoscope.optim.directions import new_generator
from zoscope.optim.perturbation import MiniBatchSurface, SequentialSurface, choose_mini_batches, choose_surface
from zoscope.optim.replicas import Limits, ReplicaPlan, ZerothOrderEstimator, run, run_mini_batches
from zoscope.optim.rules import Rule
from zoscope.planning.rehearsal import Law, Rehearsal, Shape, TopSpace
from zoscope.planning.search import Run
from zoscope.planning.sources import ObjectiveGradients

if TYPE_CHECKING:
    from zoscope.problem import Objective

GRADIENT = 3.0
"""Forward passes that a gradient costs: itself one, and a backward pass two."""

LANCZOS_STEPS = 40
"""Products of the Hessian that the top directions at the start are found with."""

TOP = 20
"""Top directions to begin with."""

FEWEST_MACRO, MOST_MACRO = 50, 3200
"""Macro steps of the coarsest rehearsal, and of the finest."""

LOOSEST = 0.25
"""``trust`` of the coarsest rehearsal; twice the macro steps, half of it."""

FEW = 2
"""Runs for every step size while the answer is only approached."""

LOOKS = 25
"""Times that real replicas are looked at with all examples."""

DIRECTIONS = 8
"""Directions that the first guess is taken from."""

OnStep = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Question:
    """What is planned.

    Args:
        law: The optimizer as a rehearsal sees it.
        rule: Its update rule.
        estimator: Its gradient estimate.
        steps: N.
        batch_size: Examples of a step; ``None`` for all of them.
        shape: Step size over its peak at a step; ``None`` for a constant one.
        replicas: Runs for every step size; half as many where they are rehearsed.
        seed: Seed of every random number.
    """

    law: Law
    rule: Rule
    estimator: ZerothOrderEstimator
    steps: int
    batch_size: int | None
    shape: Shape | None
    replicas: int
    seed: int


@dataclass
class Cost:
    """What was spent.

    Args:
        gradients: Gradients over all examples.
        forward_passes: Everything, in forward passes over all examples.
    """

    gradients: float = 0.0
    forward_passes: float = 0.0


class Runs(Protocol):
    """Runs at a step size.

    Attributes:
        replicas: How many the answer is from.
        question: What is planned.
    """

    replicas: int
    question: Question

    def of(self, question: Question) -> Runs:
        """The same kind of runs for another question."""

    def __call__(
        self, lr: float, ceiling: float, runs: Sequence[int], *, enough: int, on_step: OnStep | None = None
    ) -> dict[int, Run]:
        """Make the runs of these numbers, to the end or until the loss is above ``ceiling``.

        Those that are not decided when ``enough`` have left may be missing.
        """

    @property
    def price(self) -> float:
        """Forward passes over all examples that a run takes, about."""


class RealRuns:
    """Replicas of the run itself.

    Args:
        objective: The prepared problem.
        question: What is planned.
        cost: Where what is spent is added up.
    """

    def __init__(self, objective: Objective, question: Question, cost: Cost) -> None:
        self._objective, self.question, self._cost = objective, question, cost
        self._start = objective.read()
        self._share, self.replicas = share_of(objective, question), question.replicas
        if question.batch_size is None:
            self._surface, self.why_not = choose_surface(objective, replicas=self.replicas, first_order=False)
        else:
            self._surface, self.why_not = (
                choose_mini_batches(objective, question.batch_size, replicas=self.replicas, seed=question.seed),
                None,
            )

    def of(self, question: Question) -> RealRuns:
        """See `Runs`."""
        return RealRuns(self._objective, question, self._cost)

    @property
    def price(self) -> float:
        """See `Runs.price`."""
        return real_price(self.question, self._share)

    def __call__(
        self, lr: float, ceiling: float, runs: Sequence[int], *, enough: int, on_step: OnStep | None = None
    ) -> dict[int, Run]:
        """See `Runs`."""
        question, surface = self.question, self._surface
        plan = ReplicaPlan(
            rule=question.rule,
            estimator=question.estimator,
            lr=lr,
            steps=question.steps,
            replicas=max(runs) + 1,
            chosen=tuple(runs),
            seed=question.seed,
            limits=Limits(left=ceiling),
            shape=question.shape,
            records=LOOKS,
        )
        done = 0

        def counted(count: int) -> None:
            nonlocal done
            done += count
            if on_step is not None:
                on_step(count)

        try:
            if isinstance(surface, MiniBatchSurface):
                found = run_mini_batches(self._objective, surface, self._start, plan, on_step=counted)
            else:
                together = not isinstance(surface, SequentialSurface)
                found = run(surface, self._start, plan, together=together, on_step=counted)
        finally:
            self._objective.write(self._start)
        looks = float(np.isfinite(found.losses).sum())
        self._cost.forward_passes += 2.0 * question.estimator.queries * self._share * done + looks
        made = zip(runs, found.left, found.losses.T, strict=True)
        return {run: Run(left, found.steps.astype(float), losses) for run, left, losses in made}


class RehearsedRuns:
    """Rehearsals.

    Args:
        objective: The prepared problem.
        question: What is planned.
        cost: Where what is spent is added up.
        macro: Macro steps.
        top: Directions of large curvature at the start; measured where it is ``None``.
    """

    def __init__(
        self, objective: Objective, question: Question, cost: Cost, *, macro: int, top: TopSpace | None = None
    ) -> None:
        self._objective, self.question, self._cost, self.macro = objective, question, cost, macro
        self._start = objective.read()
        self._share, self.replicas = share_of(objective, question), max(FEW, question.replicas // 2)
        self._source = ObjectiveGradients(
            objective, batch_size=question.batch_size, most=self.replicas, seed=question.seed
        )
        self.top = top if top is not None else top_space(objective, seed=question.seed, cost=cost)

    def of(self, question: Question) -> RehearsedRuns:
        """See `Runs`."""
        return RehearsedRuns(self._objective, question, self._cost, macro=self.macro, top=self.top)

    def finer(self) -> RehearsedRuns:
        """The same with twice the macro steps."""
        return RehearsedRuns(self._objective, self.question, self._cost, macro=2 * self.macro, top=self.top)

    @property
    def price(self) -> float:
        """See `Runs.price`."""
        return rehearsal_price(self.question, self._share, macro=self.macro)

    def __call__(
        self, lr: float, ceiling: float, runs: Sequence[int], *, enough: int, on_step: OnStep | None = None
    ) -> dict[int, Run]:
        """See `Runs`."""
        question = self.question
        try:
            found = Rehearsal(
                self._source,
                self._start,
                law=question.law,
                lr=lr,
                steps=question.steps,
                macro=self.macro,
                runs=runs,
                seed=question.seed,
                ceiling=ceiling,
                top=self.top,
                shape=question.shape,
                trust=LOOSEST * FEWEST_MACRO / self.macro,
            ).go(enough=enough, on_step=on_step)
        finally:
            self._objective.write(self._start)
        self._cost.gradients += found.gradients
        of_batches = self._share * (GRADIENT * found.batches + found.losses_seen)
        self._cost.forward_passes += GRADIENT * found.gradients + of_batches + len(runs)
        made = zip(runs, found.left, found.losses.T, strict=True)
        decided = ((run, left, losses) for run, left, losses in made if left is not None or math.isfinite(losses[-1]))
        return {run: Run(left, found.steps, losses) for run, left, losses in decided}


def share_of(objective: Objective, question: Question) -> float:
    """Share of the examples that a step sees."""
    return 1.0 if question.batch_size is None else min(question.batch_size / objective.num_examples, 1.0)


def real_price(question: Question, share: float) -> float:
    """Forward passes over all examples that one real run takes."""
    return 2.0 * question.estimator.queries * share * question.steps + LOOKS


def rehearsal_price(question: Question, share: float, *, macro: int) -> float:
    """Forward passes over all examples that one rehearsed run takes; a Hessian product goes with each gradient."""
    batches = 0.0 if question.batch_size is None else 2.0 * share
    return GRADIENT * macro * (2.0 + batches)


def top_space(objective: Objective, *, seed: int, cost: Cost) -> TopSpace:
    """The largest eigenvalues of the Hessian, as far as a short Lanczos recurrence knows them."""
    operator = HessianOperator(objective)
    like = objective.read()
    start = torch.randn(like.shape, generator=new_generator(seed)).to(like)
    chain = Chain(operator, start, capacity=LANCZOS_STEPS)
    chain.extend(LANCZOS_STEPS)
    values, vectors = chain.jacobi.eigh()
    order = np.argsort(-np.abs(values))
    kept = order[:TOP]
    rows = chain.combine(vectors[:, kept])
    basis = rows if isinstance(rows, Tensor) else rows.whole()
    cost.gradients += 2 * operator.num_hvps
    cost.forward_passes += 2 * GRADIENT * operator.num_hvps
    operator.release()
    return TopSpace(basis.clone(), values[kept], float(abs(values[order[TOP]])) if len(order) > TOP else 0.0)


def first_guess(objective: Objective, question: Question, cost: Cost) -> float:
    """A step size to begin with, from second and first differences along a few random directions.

    ``2/Tr H`` for gradient descent, times ``1-β`` with momentum, times the gradient's norm for Adam.
    """
    start, mu = objective.read(), question.estimator.mu
    generator = new_generator(np.random.SeedSequence(question.seed, spawn_key=(2,)), start.device)
    f = objective.value()
    curvatures, slopes = [], []
    try:
        for _ in range(DIRECTIONS):
            u = torch.randn(start.shape, generator=generator, device=start.device, dtype=start.dtype)
            pair = []
            for sign in (1.0, -1.0):
                objective.write(start + sign * mu * u)
                pair.append(objective.value())
            curvatures.append((pair[0] + pair[1] - 2 * f) / mu**2)
            slopes.append((pair[0] - pair[1]) / (2 * mu))
    finally:
        objective.write(start)
    cost.forward_passes += 1 + 2 * DIRECTIONS
    trace, norm = abs(float(np.mean(curvatures))), float(np.sqrt(np.mean(np.square(slopes))))
    if not (math.isfinite(trace) and trace > 0):
        trace = 1.0
    law, guess = question.law, question.estimator.queries * 2.0 / trace
    if law.family == "adam":
        return guess * (norm if math.isfinite(norm) and norm > 0 else 1.0)
    return guess * (1 - law.momentum)
