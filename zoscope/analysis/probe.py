"""``zoscope.probe``: training runs on both sides of a threshold, which confirm or refute it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zoscope.analysis import notices
from zoscope.analysis.measurement import NO_SPECTRUM, Measurement, curvature_operator, measure_problem
from zoscope.analysis.probe_prediction import (
    GradientFlow,
    Prediction,
    flow_times,
    follow_gradient,
    forecast,
    gradient_measure,
    preconditioned_gradient,
)
from zoscope.analysis.probe_results import (
    Edge,
    EdgePoint,
    ProbeInterruptedError,
    ProbeProgress,
    ProbeRequest,
    ProbeResult,
    ProbeRun,
    check_optimizer,
    numbers,
)
from zoscope.analysis.probe_runs import (
    ProbeRunner,
    choose_ground,
    edge_forecast,
    edge_outcome,
    find_edge,
    outcome,
    probe_run,
    summarise,
)
from zoscope.analysis.request import Progress, Request, sharded_basis, subject_of
from zoscope.analysis.thresholds import Estimator
from zoscope.curvature.operators import LinearOperator, Preconditioned, gradient
from zoscope.errors import NumericalError, UsageError
from zoscope.problem import Notice
from zoscope.problem.core import measurable
from zoscope.registry import family_of
from zoscope.result import ProblemInfo

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.analysis.advice import Threshold
    from zoscope.problem import Objective, Problem
    from zoscope.problem.core import Measurable
    from zoscope.registry import Differences, Directions


class Ticker:
    """Adds up replica steps for a progress bar.

    Args:
        report: Receives the label, the steps done and the steps expected.
        what: The label.
        total: Steps expected.
    """

    def __init__(self, report: ProbeProgress, what: str, total: int) -> None:
        self._report, self._what, self._total, self._done = report, what, total, 0
        report(what, 0, total)

    def __call__(self, count: int) -> None:
        """``count`` more replica steps are done."""
        self._done += count
        self._report(self._what, min(self._done, self._total), self._total)


@dataclass
class Session:
    """Goes through the parts of a probe in order.

    Args:
        objective: The prepared problem.
        measurable: What of it is measured.
        request: What is asked.
        spec: Name of the problem in the result.
    """

    objective: Objective
    measurable: Measurable
    request: ProbeRequest
    spec: str | None
    started: float = field(default_factory=time.perf_counter)
    measurement: Measurement | None = None
    forecast: Prediction | None = None
    edge_forecast: Prediction | None = None
    runner: ProbeRunner | None = None
    runs: list[ProbeRun] = field(default_factory=list)
    points: list[EdgePoint] = field(default_factory=list)
    edge: Edge | None = None

    def go(self) -> None:
        """Measure, predict, run."""
        request, objective = self.request, self.objective
        with self.measurable.at() as measured:
            self.measurement = measure_problem(measured, request.measure)
            if request.measure.strict:  # before the runs, which take the time
                self._require_precision(self.measurement)
            diagonal = None if self.measurement.preconditioner is None else self.measurement.preconditioner.diagonal
            _, g = gradient(measured)
            operator: LinearOperator = curvature_operator(measured, request.measure)
            if diagonal is not None:
                operator = Preconditioned(operator, diagonal)
            self.forecast = forecast(
                self.measurement.operators[request.family],
                gradient_measure(operator, preconditioned_gradient(g, diagonal)),
                request,
                loss=self.measurement.loss,
                dimension=objective.num_params,
                descent=self.measurement.descent[request.family],
            )
        deadline = time.perf_counter() + request.max_seconds
        self.runner = choose_ground(
            objective, self.measurable, request, forecast=self.forecast, diagonal=diagonal, deadline=deadline
        )
        self.runner.num_hvps = operator.num_hvps
        self.runner.allow(self.measurement.num_hvps)
        self.runner.flow = self._mean_path(self.forecast, diagonal)
        self._run_all(self.forecast, self.runner)
        if request.edge:
            self.edge_forecast = edge_forecast(self.forecast, self.runner)
            self.edge = find_edge(
                self.runner,
                self.edge_forecast,
                keep=self.points.append,
                on_step=self._ticker("edge", self.edge_forecast.steps, 5),
            )

    def _require_precision(self, measurement: Measurement) -> None:
        """Refuse a threshold that is less precise than asked for."""
        measure, entry = self.request.measure, measurement.operators[self.request.family]
        wanted = measure.precision([self.request.rule], moments=measure.moments(dimension=self.objective.num_params))
        reached = {entry.operator: wanted(entry.curvature.spectrum)}
        for missed in notices.precision_notices(
            reached, rtol=measure.rtol, max_hvps=measure.max_hvps, dimension=self.objective.num_params
        ):
            raise NumericalError(missed.message)

    def _mean_path(self, expected: Prediction, diagonal: Tensor | None) -> GradientFlow | None:
        """The path of the mean as long as the runs below the threshold follow it; others leave it soon."""
        below = [lr for lr in self._step_sizes(expected) if lr <= expected.threshold.value]
        if not expected.model.rule.is_linear:
            return None
        if self.request.first_order or self.request.linearized or expected.model.gradient is None or not below:
            return None
        end = flow_times(lr=max(below), steps=expected.steps, rule=expected.model.rule)[-1]
        with self.measurable.at() as measured:
            return follow_gradient(
                measured, until=float(end), sharpness=expected.model.spectrum.lambda_max, diagonal=diagonal
            )

    def _step_sizes(self, expected: Prediction) -> list[float]:
        return sorted({*(ratio * expected.threshold.value for ratio in self.request.ratios), *self.request.lrs})

    def _run_all(self, expected: Prediction, runner: ProbeRunner) -> None:
        lrs = self._step_sizes(expected)
        plan = [(lr, False) for lr in lrs]
        if self.request.rule.preconditioned and not self.request.linearized:
            plan += [(lr, True) for lr in lrs]
        for done, (lr, adaptive) in enumerate(plan):
            label = f"{lr / expected.threshold.value:.3g} × threshold{', adaptive' if adaptive else ''}"
            # An adaptive run has a quarter of the replicas and does not count: it gets little of the time.
            left = sum(0.2 if later else 1.0 for _, later in plan[done:]) / (0.2 if adaptive else 1.0)
            left += 2.0 * self.request.edge
            tick = self._ticker(label, expected.steps, 1)
            self.runs.append(probe_run(runner, expected, lr, adaptive=adaptive, runs_left=left, on_step=tick))

    def _ticker(self, what: str, steps: int, rounds: int) -> Ticker | None:
        report = self.request.on_progress
        replicas = 1 if self.runner is None else self.runner.replicas()
        return None if report is None else Ticker(report, what, steps * rounds * replicas)

    def result(self, *, interrupted: bool) -> ProbeResult:
        """What is known now."""
        assert self.forecast is not None
        assert self.measurement is not None
        request, expected = self.request, self.forecast
        verdict, reason = outcome(self.runs, few_modes=expected.few_modes)
        edge = self.edge
        if edge is None and self.points and self.edge_forecast is not None:
            edge = summarise(tuple(self.points), self.edge_forecast, closed=(None, None))
        if edge is not None and not self.runs:
            verdict, reason = edge_outcome(edge, expected)
        if interrupted and verdict == "confirmed":
            verdict, reason = "inconclusive", "interrupted before every run was done"
        info = ProblemInfo(
            self.objective.num_params, self.objective.num_examples, self.measurement.loss, self.measurement.grad_norm
        )
        return ProbeResult(
            optimizer=request.optimizer,
            settings=request.measure.settings(request.family),
            spec=self.spec,
            device=str(self.objective.device),
            dtype=str(self.objective.dtype).removeprefix("torch."),
            seed=request.measure.seed,
            problem=info,
            estimator=None if request.first_order else Estimator(request.measure.directions, request.measure.queries),
            threshold=expected.threshold,
            linearized=request.linearized,
            growth=request.growth,
            runs=tuple(self.runs),
            edge=edge,
            outcome=verdict,
            reason=reason,
            together=self.runner is not None and self.runner.together,
            interrupted=interrupted,
            num_hvps=self.measurement.num_hvps + (self.runner.num_hvps if self.runner else 0),
            seconds=time.perf_counter() - self.started,
            warnings=notices.without_repeats(self._notices(expected, info)),
        )

    def _notices(self, expected: Prediction, info: ProblemInfo) -> Iterable[Notice]:
        assert self.measurement is not None
        measured = self.measurement.operators[self.request.family]
        if not self.request.first_order:
            yield from notices.curvature_notices(measured.curvature, expected.row, jump=self.measurement.jump)
        if self.measurement.preconditioner is not None and measured.commutator is not None:
            yield from notices.preconditioner_notices(
                self.measurement.preconditioner, measured.commutator, expected.row
            )
        if expected.steps < expected.wanted_steps:
            yield Notice(
                "step-cap",
                f"The runs have {expected.steps:,} steps, but {expected.wanted_steps:,} are needed for the mean square "
                f"to grow by {self.request.growth:g} at the smallest ratio above 1. Raise --max-steps or --steps, or "
                "lower --growth.",
            )
        if any(run.steps_done < run.steps for run in self.runs):
            yield Notice(
                "time-cap",
                f"--max-seconds {self.request.max_seconds:g} cut runs short; such a run is inconclusive. Raise it.",
            )
        yield from self.objective.warnings


DEFAULT_RATIOS = (0.8, 1.25)


def probe(
    problem: Problem,
    *,
    optimizer: str = "zo-gd",
    ratios: float | Sequence[float] | None = None,
    lr: float | Sequence[float] | None = None,
    threshold: Threshold = "binding",
    steps: int | None = None,
    growth: float = 1e3,
    max_steps: int = 20_000,
    max_seconds: float = 600.0,
    replicas: int = 8,
    mu: float = 1e-3,
    batch_size: int | None = None,
    edge: bool = False,
    edge_rtol: float = 0.05,
    linearized: bool = False,
    assume_threshold: float | None = None,
    rtol: float = 0.02,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_hvps: int = 600,
    directions: Directions = "gaussian",
    differences: Differences = "central",
    queries: int = 1,
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    curvature: Literal["hessian", "ggn", "forward"] = "hessian",
    preconditioner: str = "expected",
    method: Literal["auto", "dense", "deflated-slq"] = "auto",
    micro_batch: int | None = None,
    max_memory: int | None = None,
    shard_basis: bool = False,
    hvp: str = "auto",
    strict: bool = False,
    params: str | None = None,
    spec: str | None = None,
    on_progress: Progress | None = None,
    on_run: ProbeProgress | None = None,
) -> ProbeResult:
    """Predict the threshold, then train briefly at step sizes on each side of it and say whether reality agrees.

    The problem comes back as it was. A loss that becomes NaN or infinite in a run is a result, not an error.

    Args:
        problem: Model, batches and loss.
        optimizer: ``"zo-gd"``, ``"zo-gdm"``, ``"zo-adam"``, or ``"gd"``, ``"gdm"``, ``"adam"``.
        ratios: Step sizes as multiples of the threshold; 0.8 and 1.25 unless ``lr`` or ``edge`` says otherwise.
        lr: Absolute step sizes, besides.
        threshold: Which one is probed: ``"exact"``, ``"horizon"``, ``"descent"``, or ``"binding"``, the smaller one of
            the last two. A first-order optimizer has one only.
        steps: Steps of a run; by default as many as the growth takes at the smallest ratio above 1.
        growth: Factor by which the mean square should grow above the threshold.
        max_steps: Most steps of a run.
        max_seconds: Time for all runs; a run that it cuts short is inconclusive.
        replicas: Independent direction streams.
        mu: Smoothing radius of the estimate.
        batch_size: Random batches of so many examples instead of all of them.
        edge: Look for the empirical edge by bisection.
        edge_rtol: Width of its bracket.
        linearized: Run on the quadratic model at the start.
        assume_threshold: Test this value instead of the predicted one.
        rtol: As for ``zoscope.bounds``; so for all arguments that follow.
        seed: Seed of probe vectors and of the direction streams.
        device: Device.
        dtype: Floating-point type.
        max_hvps: Most Hessian-vector products for the first measurement.
        directions: Law of the perturbations.
        differences: Loss differences: ``central``, or ``one-sided``, whose noise has a part of order μ.
        queries: Queries averaged per step.
        beta: Momentum of GDM.
        betas: Adam's ``(β₁, β₂)``.
        eps: Adam's ε.
        dampening: τ of GDM's ``m ← βm + (1−τ)g``.
        weight_decay: w of GD and GDM.
        curvature: Matrix in place of H.
        preconditioner: Adam's frozen P.
        method: How the spectrum is measured.
        micro_batch: Examples per pass.
        max_memory: Bytes that the process may hold in all: batches are cut, and vectors kept, accordingly.
        shard_basis: Spread the Lanczos vectors over the processes of a job; there have to be several.
        hvp: How products are computed.
        strict: Raise before any run where the precision asked for is not reached.
        params: Which parameters.
        spec: Name of the problem in the result.
        on_progress: As for ``zoscope.bounds``.
        on_run: Called as ``on_run(what, done, total)`` with replica steps done and expected.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        ValueError: If an argument is outside of its range.
        UsageError: If the curvature or the preconditioner asked for cannot be had.
        SpecError: If the problem cannot be measured.
        NumericalError: If the start is not finite, nothing limits the step size there, or, with ``strict``, a precision
            is not reached.
        ProbeInterruptedError: A ``KeyboardInterrupt`` that carries what was known.
    """
    check_optimizer(optimizer)
    if curvature == "forward":
        raise UsageError(NO_SPECTRUM.format(curvature=curvature))
    lrs = () if lr is None else numbers("lr", lr)
    multiples = numbers("ratios", ratios) if ratios is not None else () if lrs or edge else DEFAULT_RATIOS
    request = ProbeRequest(
        measure=Request(
            optimizers=(family_of(optimizer),),
            steps=steps or 1000,
            rtol=rtol,
            seed=seed,
            max_hvps=max_hvps,
            directions=directions,
            differences=differences,
            queries=queries,
            beta=beta,
            betas=betas,
            eps=eps,
            dampening=dampening,
            weight_decay=weight_decay,
            curvature=curvature,
            preconditioner=preconditioner,
            method=method,
            hvp=hvp,
            threshold=threshold,
            lr=None,
            strict=strict,
            on_progress=on_progress,
            batch_size=batch_size,
        ),
        optimizer=optimizer,
        mu=mu,
        replicas=replicas,
        growth=growth,
        ratios=multiples,
        lrs=lrs,
        steps=steps,
        max_steps=max_steps,
        max_seconds=max_seconds,
        edge=edge,
        edge_rtol=edge_rtol,
        linearized=linearized,
        assume_threshold=assume_threshold,
        batch_size=batch_size,
        on_progress=on_run,
    )
    subject = subject_of(problem, params)
    options: dict[str, Any] = {"device": device, "micro_batch": micro_batch, "max_memory": max_memory}
    with (
        sharded_basis(shard_basis),
        subject.prepare(dtype=dtype, trains=True, **options) as objective,
        measurable(subject, objective, **options) as measured,
    ):
        session = Session(objective, measured, request, spec=spec if spec is not None else problem.name)
        try:
            session.go()
        except KeyboardInterrupt:
            if session.forecast is None:
                raise
            raise ProbeInterruptedError(session.result(interrupted=True)) from None
        return session.result(interrupted=False)
