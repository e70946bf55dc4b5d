"""``zoscope.plan``: which step size for a run of so many steps, with this batch size and schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np

from zoscope.analysis.check_runner import Cache, UncacheableError, problem_fingerprint
from zoscope.analysis.request import subject_of
from zoscope.config.load import Piecewise, Schedule, StepSizes, parse_step_sizes
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.optim.directions import check_law
from zoscope.optim.replicas import ZerothOrderEstimator
from zoscope.optim.rules import rule_from_options
from zoscope.options import SCHEDULES, PlanMethod, PlanOptions, keywords
from zoscope.planning.mu import PerturbationScale, measure_trained_scale, perturbation_notices
from zoscope.planning.rehearsal import Law
from zoscope.planning.runs import (
    FEW,
    FEWEST_MACRO,
    MOST_MACRO,
    Cost,
    Question,
    RealRuns,
    RehearsedRuns,
    Runs,
    first_guess,
    real_price,
    rehearsal_price,
    share_of,
)
from zoscope.planning.search import RISKY, SAFE, Edge, Run, Search, Trial, finite_range, loss_stderr
from zoscope.problem import Notice
from zoscope.registry import family_of, optimizer_record
from zoscope.result import JsonObject, MeasuredResult, ProblemInfo
from zoscope.theory.rules import estimator_moments, update_rule

if TYPE_CHECKING:
    from zoscope.problem import Objective, Problem

OnPlan = Callable[[str, float, float], None]
"""Called with what is done, and how much of how much: forward passes over all examples."""

LEFT = 4.0
"""A run has left above so many times the loss at the start."""

PLATEAU = 64.0
"""Multiple of the first guess from which a loss that does not pass that is taken to saturate."""

SATURATED = 0.1
"""Rise over the loss at the start, relative to it, from which a plateau tells runs that have left."""

AGREE = 0.05
"""Change of the edge, and of the loss in units of its fall, from one rehearsal to a finer one that is small enough."""

EDGE_RTOL, REHEARSED_RTOL = 0.1, 0.2
"""Width of the brackets of single runs' edges; a rehearsal is not worth a narrower one."""

SURE, MORE = 0.07, 3
"""Half of the 95 % interval of the log edge from which on more real runs are made, and most times as many."""

APPROACH_RTOL, NEIGHBOUR = 0.25, 1.5
"""Width of the bracket that few runs find, and the first factor between the step sizes tried for it."""

SWEEP = 15
"""Step sizes of the sweep that a plan is compared with."""

POINTS = 60
"""Points of a loss curve in the result."""

REMEDIES = (0.03, 0.1, 0.3)
"""Shares of the edge at which larger batches are tried where no step size lowers the loss."""

REMEDY_RUNS = 4
"""Most runs at each of them: a run with larger batches costs as many times more."""

WORTHWHILE = 0.005
"""Share of the loss that it has to fall by to count there."""


@dataclass(frozen=True)
class Answer(JsonObject):
    """The step size to use.

    Args:
        lr: Peak of the step size; ``None`` where none lowers the loss.
        risk: Share of runs that leave at it.
        expected_loss: Mean final loss.
        loss_start: Loss at the start.
    """

    lr: float | None
    risk: float | None
    expected_loss: float | None
    loss_start: float


@dataclass(frozen=True)
class EdgeEstimate(JsonObject):
    """Where half of the runs diverge.

    Args:
        lr: The step size; ``None`` where no such step size was found.
        ci95: Its 95 % interval.
    """

    lr: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class SafeStepSize(JsonObject):
    """A step size of small risk."""

    lr: float | None
    risk: float


@dataclass(frozen=True)
class CurvePoint(JsonObject):
    """Runs at a step size.

    Args:
        lr: Peak of the step size.
        risk: Share of runs that leave there, by the scatter of the edges.
        left: How many of the runs left.
        runs: How many there were; step sizes far from the answer have few.
        loss_mean: Mean final loss of those that stayed; ``None`` where all left.
        loss_lo: The lowest.
        loss_hi: The highest.
    """

    lr: float
    risk: float
    left: int
    loss_mean: float | None
    loss_lo: float | None
    loss_hi: float | None
    runs: int


@dataclass(frozen=True)
class LossPath(JsonObject):
    """Mean loss over steps at a step size, of the runs that are still there."""

    lr: float
    steps: tuple[int, ...]
    loss: tuple[float | None, ...]


@dataclass(frozen=True)
class PlanCost(JsonObject):
    """What the plan took.

    Args:
        gradients: Gradients over all examples.
        forward_passes: Everything, in forward passes over all examples; a gradient counts as three.
        run: What one run of the planned training takes.
        sweep: What a sweep over 15 step sizes takes, with as many runs each.
    """

    gradients: float
    forward_passes: float
    run: float
    sweep: float


@dataclass(frozen=True)
class ScheduleAnswer(JsonObject):
    """The answer for one schedule."""

    schedule: str
    lr: float | None
    risk: float | None
    expected_loss: float | None
    edge: float | None


@dataclass(frozen=True, kw_only=True)
class PlanResult(MeasuredResult):
    """What ``zoscope.plan`` found.

    Args:
        question: Optimizer, steps, batch size and schedule.
        answer: The best step size: the lowest expected final loss at a risk of at most 5 %.
        edge: Where half of the runs diverge.
        safe: A step size with a risk of 1 %.
        curve: Every step size that was tried, rising.
        paths: Loss over steps at some of them.
        method: How runs were looked ahead at.
        replicas: Runs at every step size.
        cost: What it took.
        perturbation: At which μ slopes are right, with the batch and in the dtype that train; ``None`` if interrupted.
        schedules: The answers for other schedules, if they were asked for, lowest expected loss first.
        interrupted: Whether this is what was known when it was stopped.
    """

    schema: ClassVar[str] = "zoscope.plan/1"
    keys: ClassVar[str] = (
        "question answer edge safe curve paths method replicas cost perturbation schedules interrupted"
    )

    question: Mapping[str, Any]
    answer: Answer
    edge: EdgeEstimate
    safe: SafeStepSize
    curve: tuple[CurvePoint, ...]
    paths: tuple[LossPath, ...]
    method: str
    replicas: int
    cost: PlanCost
    perturbation: PerturbationScale | None
    schedules: tuple[ScheduleAnswer, ...] = ()
    interrupted: bool = False


class PlanInterruptedError(KeyboardInterrupt):
    """The user interrupted a plan.

    Args:
        result: What was known by then.
    """

    def __init__(self, result: PlanResult) -> None:
        super().__init__()
        self.result = result


class _BudgetSpentError(Exception):
    """``max_cost`` is reached."""


class _DearError(Exception):
    """A rehearsal took more than real runs would."""


@dataclass
class _Planner:
    """One question, from the first guess to the answer."""

    objective: Objective
    question: Question
    cost: Cost
    method: PlanMethod
    max_cost: float
    loss: float
    store: dict[str, Any]
    save: Callable[[], None]
    on_progress: OnPlan | None
    differentiable: bool
    ceiling: float = field(init=False)
    runs: Runs = field(init=False)
    search: Search = field(init=False)
    spent: bool = False
    interrupted: bool = False
    coarse: bool = False
    saturated: bool = False

    def __post_init__(self) -> None:
        self.ceiling = self.loss + (LEFT - 1) * abs(self.loss) if self.loss else math.inf
        self._share = share_of(self.objective, self.question)

    @property
    def used(self) -> str:
        """Which kind of runs the answer is from."""
        return "rehearsal" if isinstance(self.runs, RehearsedRuns) else "replicas"

    @property
    def tried(self) -> list[Trial]:
        """Trials by step size, rising."""
        return sorted(self.search.trials.values(), key=lambda trial: trial.lr)

    def go(self) -> tuple[Edge, Trial | None]:
        """The edge, and the trial of the best step size: approached by few runs, then by all of them."""
        edge, best = Edge(np.empty((0, 2)), np.empty((0, 2))), None
        self._go_on(self._first_runs(), FEW)
        try:
            guess = self._guess()
            try:
                edge, best = self._found(guess)
                while isinstance(self.runs, RehearsedRuns) and not self._holds(self.runs, edge, best):
                    if not self._refined():
                        break
                    lowest = None if best is None else best.lr
                    edge, best = self._answer(edge.lr or lowest, lowest)
            except _DearError:
                self._go_on(RealRuns(self.objective, self.question, self.cost), FEW)
                edge, best = self._found(guess)
        except (_BudgetSpentError, KeyboardInterrupt) as stopped:
            self.interrupted = isinstance(stopped, KeyboardInterrupt)
            self.spent = not self.interrupted
            edge = self.search.edge() if self.search.trials else edge
            trials = [t for t in self.search.trials.values() if math.isfinite(t.mean) and edge.risk(t.lr) <= RISKY]
            best = min(trials, key=lambda trial: trial.mean, default=best)
        return edge, best

    def _go_on(self, runs: Runs, replicas: int | None = None) -> None:
        """Search anew, with other runs: all of them, or few."""
        self.runs = runs
        self.search = Search(self._made, min(replicas or runs.replicas, runs.replicas))

    def _found(self, guess: float) -> tuple[Edge, Trial | None]:
        """The answer by all runs, from a guess: few of them come near to it."""
        near, lowest = self._approach(guess)
        self.search.replicas = self.runs.replicas
        return self._answer(near, lowest)

    def _approach(self, guess: float) -> tuple[float | None, float | None]:
        """About where half of the runs leave, and where the loss is lowest; ``None`` where there is no such thing."""
        low, high = self._bracket(guess)
        if low is None:
            return high, None
        edge = None
        if high is not None:
            low, high = self.search.refine(low, high, rtol=APPROACH_RTOL)
            edge = math.sqrt(low * high)
        best = self.search.lowest(low)
        return edge, best.lr if math.isfinite(best.mean) else None

    def _holds(self, runs: RehearsedRuns, edge: Edge, best: Trial | None) -> bool:
        """Whether a finer rehearsal says the same of a step size just above the edge, and of the loss at the best."""
        if 2 * runs.macro > min(self.question.steps, MOST_MACRO):
            return True
        search = self.search
        self._go_on(runs.finer(), FEW)
        try:
            if edge.lr is not None and not self.search.half_leave(edge.lr * (1 + AGREE)):
                return False
            if best is None:
                return True
            moved = abs(self.search.trial(best.lr).mean - float(best.ends[: self.search.replicas].mean()))
            return moved <= AGREE * max(abs(self.loss - best.mean), 1e-12)
        finally:
            self.runs, self.search = runs, search

    def _bracket(self, guess: float) -> tuple[float | None, float | None]:
        """A bracket around the edge, by a lower loss than ``LEFT`` times that at the start where the loss saturates."""
        low, high = self.search.bracket(guess, factor=NEIGHBOUR)
        if high is not None or self.saturated:
            return low, high
        far = [trial.ends for lr, trial in self.search.trials.items() if lr >= PLATEAU * guess]
        ends = np.concatenate([found[np.isfinite(found)] for found in far]) if far else np.empty(0)
        plateau = float(np.median(ends)) if len(ends) else -math.inf
        if plateau <= self.loss + SATURATED * abs(self.loss):
            return low, high
        self.saturated, self.ceiling = True, 0.5 * (self.loss + plateau)
        self._go_on(self.runs, FEW)
        return self.search.bracket(guess, factor=NEIGHBOUR)

    def runs_of(self, question: Question) -> Runs:
        """Runs of another question, of the kind that the answer is from."""
        return self.runs.of(question)

    def _first_runs(self) -> Runs:
        question = self.question
        real = real_price(question, self._share)
        coarse = rehearsal_price(question, self._share, macro=FEWEST_MACRO)
        # A rehearsal is done at least twice, the second time twice as finely.
        if self.method == "replicas" or not self.differentiable or (self.method == "auto" and 3 * coarse > real):
            return RealRuns(self.objective, question, self.cost)
        return RehearsedRuns(self.objective, question, self.cost, macro=FEWEST_MACRO)

    def _refined(self) -> bool:
        """Go over to a finer rehearsal, or to real runs where those are cheaper; whether there is one."""
        assert isinstance(self.runs, RehearsedRuns)
        macro, question = 2 * self.runs.macro, self.question
        if self.method == "auto" and rehearsal_price(question, self._share, macro=macro) > real_price(
            question, self._share
        ):
            self._go_on(RealRuns(self.objective, question, self.cost))
            return True
        if macro > min(question.steps, MOST_MACRO):
            self.coarse = True
            return False
        self._go_on(self.runs.finer())
        return True

    def _guess(self) -> float:
        guess = self.store.get("guess")
        if not isinstance(guess, float):
            guess = first_guess(self.objective, self.question, self.cost)
            self.store["guess"] = guess
            self._keep_cost()
            self.save()
        return guess

    def _keep_cost(self) -> None:
        self.store["cost"] = [self.cost.gradients, self.cost.forward_passes]

    def _answer(self, near: float | None, lowest: float | None) -> tuple[Edge, Trial | None]:
        """The edge and the best step size by all runs, from about where few runs found them."""
        search = self.search
        if near is None:
            assert lowest is not None
            best = search.trial(lowest)
            return search.edge(), best if math.isfinite(best.mean) else None
        low, high = search.bracket(near, factor=1 + EDGE_RTOL)
        if low is None or high is None:
            return search.edge(), None
        search.refine(low, high, rtol=EDGE_RTOL)
        edge = self._settled()
        top = edge.at_risk(RISKY)
        if top is None:
            return edge, None
        best = search.trial(min(top, lowest or top))
        if not math.isfinite(best.mean):  # an edge far from the one that few runs found
            best = search.lowest(best.lr)
        best = search.lower(best, top)
        return edge, best if math.isfinite(best.mean) else None

    def _settled(self) -> Edge:
        """The edges of all runs, and of more real ones where theirs scatter."""
        search, count = self.search, self.search.replicas
        if isinstance(self.runs, RehearsedRuns):
            return search.settle(rtol=REHEARSED_RTOL)
        edge = search.settle(rtol=EDGE_RTOL)
        try:
            while edge.found and edge.half_width > SURE and search.replicas < MORE * count:
                search.replicas += count
                edge = search.settle(rtol=REHEARSED_RTOL)
        finally:
            search.replicas = count
        return edge

    def _made(self, lr: float, numbers: Sequence[int], enough: int) -> dict[int, Run]:
        """Runs at a step size; those that are in the store are not made again."""
        runs, macro = self.runs, self.runs.macro if isinstance(self.runs, RehearsedRuns) else 0
        kind = f"{self.used}:{macro}:{lr!r}:{self.ceiling!r}"
        if self.store.get("dear") == kind:
            raise _DearError
        kept = {run: _read_run(self.store[f"{kind}:{run}"]) for run in numbers if f"{kind}:{run}" in self.store}
        missing, gone = [run for run in numbers if run not in kept], sum(run.left is not None for run in kept.values())
        if not missing or gone >= enough:
            return kept
        if self.cost.forward_passes + 0.2 * len(missing) * runs.price > self.max_cost:
            raise _BudgetSpentError
        tick = None
        if self.on_progress is not None:
            report, done, total = self.on_progress, 0.0, float(self.question.steps)
            if isinstance(runs, RealRuns):
                total *= len(missing)
            what = f"{self.used} {len(self.search.trials) + 1}, lr {lr:.3g}"
            report(what, 0.0, total)

            def tick(count: int) -> None:
                nonlocal done
                done += count
                report(what, min(done, total), total)

        before = self.cost.forward_passes
        made = runs(lr, self.ceiling, missing, enough=enough - gone, on_step=tick)
        self.store.update({f"{kind}:{run}": _written_run(one) for run, one in made.items()})
        dear = len(missing) * real_price(self.question, self._share)
        if self.method == "auto" and self.used == "rehearsal" and self.cost.forward_passes - before > dear:
            self.store["dear"] = kind
        self._keep_cost()
        self.save()
        if self.store.get("dear") == kind:
            raise _DearError
        return kept | made


def _written_run(run: Run) -> dict[str, Any]:
    losses = [loss if math.isfinite(loss) else None for loss in run.losses.tolist()]
    return {"left": run.left, "steps": run.steps.tolist(), "losses": losses}


def _read_run(entry: Mapping[str, Any]) -> Run:
    losses = [math.inf if loss is None else loss for loss in entry["losses"]]
    return Run(entry["left"], np.array(entry["steps"]), np.array(losses))


def plan(problem: Problem, *, on_progress: OnPlan | None = None, **options: Unpack[PlanOptions]) -> PlanResult:
    """Look ahead: which step size for this run, how far the loss falls at it, and at which risk.

    The run is rehearsed with few gradients, or run as it is where that is cheaper, at step sizes that are chosen by
    common random numbers. The problem comes back as it was.

    Args:
        problem: Model, batches and loss.
        on_progress: Called as ``on_progress(what, done, total)``, with steps.
        **options: Those of ``zoscope plan``: ``examples/guide/options.md`` has types, defaults and ranges.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range.
        UsageError: If the schedule cannot be read, or no rehearsal is possible where one is asked for.
        SpecError: If the problem cannot be evaluated.
        NumericalError: If the loss at the start is not finite.
        PlanInterruptedError: A ``KeyboardInterrupt`` that carries what was known.
    """
    began = time.perf_counter()
    found = keywords("plan", options)
    sizes = read_schedule(found["schedule"], warmup=found["warmup"])
    subject, settings = subject_of(problem, found["params"]), _settings(found, sizes)
    no_rehearsal = _no_rehearsal(family_of(found["optimizer"]))
    if no_rehearsal is not None and found["method"] == "rehearsal":
        raise UsageError(f"--method rehearsal: {no_rehearsal} Use --method replicas.")
    method: PlanMethod = found["method"] if no_rehearsal is None else "replicas"
    device = {name: found[name] for name in ("device", "dtype", "micro_batch", "max_memory")}
    with prepared(subject, **device) as (objective, differentiable):
        loss = objective.value()
        if not math.isfinite(loss):
            raise NumericalError("The loss at the start is not finite. Expected a number: there is nothing to plan.")
        if method == "rehearsal" and not differentiable:
            raise UsageError("--method rehearsal takes gradients, and this loss has none. Use --method replicas.")
        question = _question(found, sizes, objective)
        settings["batch_size"] = question.batch_size
        costs: list[Cost] = []
        budget = math.inf if found["max_cost"] is None else found["max_cost"]

        def answered(asked: Question, schedule_name: str) -> tuple[_Planner, Edge, Trial | None]:
            identity = settings | {"schedule": schedule_name, **{key: found[key] for key in ("replicas", "seed")}}
            store, save = _store(found["cache"], subject, identity)
            own = Cost(*store.get("cost", (0.0, 0.0)))
            left = budget - sum(cost.forward_passes for cost in costs)
            costs.append(own)
            planner = _Planner(objective, asked, own, method, left, loss, store, save, on_progress, differentiable)
            edge, best = planner.go()
            return planner, edge, best

        planner, edge, best = answered(question, settings["schedule"])
        if planner.interrupted and not planner.tried:
            raise KeyboardInterrupt
        rows, last = [_schedule_answer(settings["schedule"], edge, best, loss)], planner
        for kind in SCHEDULES if found["compare_schedules"] else ():
            if kind != settings["schedule"] and not last.interrupted:
                other = Schedule(kind, 1.0, found["warmup"] or 0.0)
                asked = replace(question, shape=shape_of(other, steps=question.steps))
                last, other_edge, other_best = answered(asked, kind)
                rows.append(_schedule_answer(kind, other_edge, other_best, loss))
        rows.sort(key=lambda row: math.inf if row.expected_loss is None else row.expected_loss)
        run = 2.0 * question.estimator.queries * share_of(objective, question) * question.steps
        grad_norm = float(objective.gradient()[1].double().norm()) if differentiable else math.nan
        answer = _answer(edge, best, loss)
        told = tuple(_notices(planner, edge, answer, differentiable=differentiable, no_rehearsal=no_rehearsal))
        passes = sum(cost.forward_passes for cost in costs)
        scale = None if last.interrupted else _perturbation(subject, found, objective, question, answer.lr)
        if scale is not None:
            passes += scale.num_evaluations * share_of(objective, question)
            told += tuple(perturbation_notices(scale, found["mu"]))
        result = PlanResult(
            question=settings,
            answer=answer,
            edge=EdgeEstimate(edge.lr, edge.ci95),
            safe=SafeStepSize(edge.at_risk(SAFE), SAFE),
            curve=tuple(_curve_point(trial, edge, planner.search.fates(trial.lr)) for trial in planner.tried),
            paths=tuple(_path(trial) for trial in planner.tried if trial.runs),
            method=planner.used,
            replicas=planner.runs.replicas,
            perturbation=scale,
            cost=PlanCost(sum(own.gradients for own in costs), passes, run, SWEEP * planner.runs.replicas * run),
            schedules=tuple(rows) if found["compare_schedules"] else (),
            interrupted=last.interrupted,
            spec=problem.name if found["spec"] is None else found["spec"],
            device=str(objective.device),
            dtype=str(objective.dtype).removeprefix("torch."),
            seed=found["seed"],
            problem=ProblemInfo(objective.num_params, objective.num_examples, loss, grad_norm),
            num_hvps=0,
            seconds=time.perf_counter() - began,
            warnings=told,
        )
    if result.interrupted:
        raise PlanInterruptedError(result)
    return result


def _perturbation(
    subject: Problem, found: Mapping[str, Any], objective: Objective, question: Question, lr: float | None
) -> PerturbationScale:
    return measure_trained_scale(
        subject,
        objective,
        found,
        batch_size=question.batch_size,
        lr=lr if question.law.family == "gd" else None,
        one_sided=question.estimator.one_sided,
        seed=question.seed,
    )


def _notices(
    planner: _Planner, edge: Edge, answer: Answer, *, differentiable: bool, no_rehearsal: str | None
) -> Iterator[Notice]:
    question = planner.question
    if planner.spent:
        yield Notice(
            "max-cost",
            f"--max-cost {planner.max_cost:,.0f} was reached: this is what was known by then. Raise it for more.",
        )
    if planner.coarse:
        yield Notice(
            "coarse",
            "The answer still moved by more than 5 % with twice the macro steps; --method replicas makes real runs.",
        )
    if no_rehearsal is not None:
        yield Notice("no-rehearsal", f"{no_rehearsal} Real runs were made instead.")
    elif not differentiable and planner.method != "replicas":
        yield Notice(
            "no-gradient",
            "No gradient can be had: real runs were made instead of rehearsals. A step size that sets itself, "
            "zoscope.AutoLR, does without both.",
        )
    whole = not (planner.spent or planner.interrupted)
    if answer.lr is None and whole:
        tried = [trial.lr for trial in planner.tried]
        sees = "all examples" if question.batch_size is None else f"{question.batch_size:,} examples a step"
        yield Notice(
            "noise-floor",
            f"With {sees} no step size from {tried[0]:.2g} on lowers the loss in {question.steps:,} steps: the noise "
            f"of the estimates holds it up. {_remedy(planner, edge)}",
        )
    if planner.saturated:
        yield Notice(
            "saturates",
            f"The loss does not rise to {LEFT:g} times that at the start, whatever the step size: a run counts as "
            f"diverged above {planner.ceiling:.4g}, half of the way to where the loss saturates.",
        )
    if edge.lr is None and whole:
        yield Notice("no-edge", "No step size was found at which half of the runs diverge.")
    yield from planner.objective.warnings


def _settings(found: Mapping[str, Any], sizes: StepSizes) -> dict[str, Any]:
    """The question, as the result has it."""
    record = optimizer_record(family_of(found["optimizer"]))
    asked = {name: found[name] for name in ("steps", "batch_size", "mu", "queries", "directions", "differences")}
    schedule = {"schedule": _name(sizes), "warmup": getattr(sizes, "warmup", 0.0)}
    return {"optimizer": found["optimizer"], **record.settings(found), **asked, **schedule}


def _question(found: Mapping[str, Any], sizes: StepSizes, objective: Objective) -> Question:
    family, batch_size = family_of(found["optimizer"]), found["batch_size"]
    names = ("beta", "betas", "dampening", "weight_decay")
    update = update_rule(family, **{name: found[name] for name in names})
    moments = estimator_moments(found["directions"], queries=found["queries"], dimension=objective.num_params)
    if batch_size is not None and batch_size >= objective.num_examples:
        objective.notify(
            "all-examples",
            f"--batch-size {batch_size:,}: the problem has {objective.num_examples:,} examples, so that every step "
            "sees all of them.",
        )
        batch_size = None
    constants = optimizer_record(family).options
    law = Law(
        family=family,
        momentum=update.momentum,
        scale=1.0 - found["dampening"] if "dampening" in constants else 1.0,
        second=found["betas"][1],
        eps=found["eps"],
        weight_decay=found["weight_decay"] if "weight_decay" in constants else 0.0,
        a=moments.a,
        b=moments.b,
        one_sided_mu=found["mu"] if found["differences"] == "one-sided" else 0.0,
    )
    estimator = ZerothOrderEstimator(
        mu=found["mu"],
        queries=found["queries"],
        directions=check_law(found["directions"]),
        one_sided=found["differences"] == "one-sided",
    )
    return Question(
        law=law,
        rule=rule_from_options(family, found),
        estimator=estimator,
        steps=found["steps"],
        batch_size=batch_size,
        shape=shape_of(sizes, steps=found["steps"]),
        replicas=found["replicas"],
        seed=found["seed"],
    )


def _remedy(planner: _Planner, edge: Edge) -> str:
    """More examples a step that lower the loss, or a step size that decays; found by trying."""
    question, size = planner.question, planner.question.batch_size
    count, advice = planner.objective.num_examples, "More queries a step or a longer run may lower it."
    if edge.lr is None:
        return advice
    tries: list[tuple[str, Question]] = []
    while size is not None and size < count:
        size = min(4 * size, count)
        told = f"{size:,} examples a step" if size < count else "all examples"
        tries.append((told, replace(question, batch_size=size if size < count else None)))
    if question.shape is None:
        shape = shape_of(Schedule("linear", 1.0), steps=question.steps)
        tries.append(("a step size that decays (--schedule linear)", replace(question, shape=shape)))
    for told, asked in tries:
        runs = planner.runs_of(asked)
        for share in REMEDIES:
            lr, numbers = share * edge.lr, range(min(runs.replicas, REMEDY_RUNS))
            found = Trial(lr, runs(lr, planner.ceiling, numbers, enough=len(numbers)))
            if found.mean + loss_stderr(found, planner.loss) < planner.loss * (1 - WORTHWHILE):
                return f"{told[0].upper()}{told[1:]} does: at {found.lr:.2g} the loss falls to {found.mean:.4g}."
    return advice


def _no_rehearsal(family: str) -> str | None:
    """Why runs of an optimizer cannot be rehearsed."""
    record = optimizer_record(family)
    if record.adapts is not None and not record.preconditioned:
        return f"No rehearsal of zo-{family} is known."
    return None


def read_schedule(schedule: str | StepSizes, *, warmup: float | None) -> StepSizes:
    """A schedule with peak 1.

    Raises:
        UsageError: If it is neither a shape nor factors.
    """
    if not isinstance(schedule, str):
        return schedule
    if schedule in SCHEDULES:
        return Schedule(schedule, 1.0, warmup or 0.0)
    try:
        sizes = parse_step_sizes(schedule)
    except ValueError:
        raise UsageError(
            f"--schedule: got {schedule!r}. Expected constant, linear, cosine, or factors from a step on, such as "
            "1,2000:0.1."
        ) from None
    if warmup:
        raise UsageError("--warmup goes with constant, linear and cosine. Leave it out, or write it into the factors.")
    return sizes


@dataclass(frozen=True)
class ScheduleShape:
    """Step size over its peak at a step."""

    sizes: StepSizes
    steps: int

    def __call__(self, step: float) -> float:
        """At a step from 0 on."""
        return self.sizes.lr_at(int(step), steps=self.steps) / self.sizes.peak


def shape_of(sizes: StepSizes, *, steps: int) -> ScheduleShape | None:
    """A schedule without its peak; ``None`` for a constant step size."""
    if isinstance(sizes, Schedule) and sizes.kind == "constant" and not sizes.warmup:
        return None
    return ScheduleShape(sizes, steps)


def _name(sizes: StepSizes) -> str:
    if isinstance(sizes, Schedule):
        return sizes.kind
    assert isinstance(sizes, Piecewise)
    return str(sizes.to_config())


@contextmanager
def prepared(subject: Problem, **options: Any) -> Iterator[tuple[Objective, bool]]:
    """The problem, and whether it has gradients."""
    with ExitStack() as stack:
        try:
            objective = stack.enter_context(subject.prepare(trains=True, **options))
            differentiable = True
        except SpecError as refused:
            try:
                objective = stack.enter_context(subject.prepare(differentiable=False, **options))
            except SpecError:
                raise refused from None
            differentiable = False
        yield objective, differentiable


def _store(
    cache: str | Path | None, subject: Problem, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Trials of a question that were kept, and how to keep them."""
    if cache is None:
        return {}, lambda: None
    folder = Cache.open(Path(cache))
    try:
        key = folder.key(problem_fingerprint(subject, source=None), {"plan": 4, **settings})
    except UncacheableError as error:
        raise UsageError(f"--cache: runs of this problem cannot be kept, as it holds {error}. Leave it out.") from None
    store = folder.get(key) or {}
    return store, lambda: folder.put(key, store)


def _answer(edge: Edge, best: Trial | None, loss: float) -> Answer:
    """The best step size, where it clearly lowers the loss."""
    if best is None or best.mean + loss_stderr(best, loss) >= loss:
        return Answer(None, None, None, loss)
    return Answer(best.lr, edge.risk(best.lr), best.mean, loss)


def _schedule_answer(name: str, edge: Edge, best: Trial | None, loss: float) -> ScheduleAnswer:
    answer = _answer(edge, best, loss)
    return ScheduleAnswer(name, answer.lr, answer.risk, answer.expected_loss, edge.lr)


def _curve_point(trial: Trial, edge: Edge, fates: Sequence[bool | None]) -> CurvePoint:
    stayed = trial.ends[np.isfinite(trial.ends)]
    low, high = finite_range(list(trial.ends))
    mean = float(stayed.mean()) if len(stayed) else None
    known = len(fates) - fates.count(None)
    return CurvePoint(trial.lr, edge.risk(trial.lr), fates.count(True), mean, low, high, known)


def _path(trial: Trial) -> LossPath:
    """The mean of the runs that were made, at the steps of the one that was looked at most often."""
    longest = max(trial.runs.values(), key=lambda run: len(run.steps))
    keep = np.unique(np.linspace(0, len(longest.steps) - 1, min(POINTS, len(longest.steps))).round().astype(int))
    steps = longest.steps[keep]
    rows = np.array([np.interp(steps, run.steps, run.losses, right=math.inf) for run in trial.runs.values()]).T
    means = [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else None for row in rows]
    return LossPath(trial.lr, tuple(int(step) for step in steps), tuple(means))
