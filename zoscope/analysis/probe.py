"""``zoscope.probe``: training runs on both sides of a threshold, which confirm or refute it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

from zoscope.analysis import notices
from zoscope.analysis.advice import MARGIN
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
from zoscope.analysis.request import CurvatureSession, Progress, curvature_session
from zoscope.analysis.thresholds import Estimator
from zoscope.curvature.operators import LinearOperator, Preconditioned, gradient
from zoscope.errors import UsageError
from zoscope.options import ProbeOptions
from zoscope.problem import Notice

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem import Objective, Problem
    from zoscope.problem.core import Measurable


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
        prepared: The problem.
        request: What is asked.
    """

    prepared: CurvatureSession
    request: ProbeRequest
    measurement: Measurement | None = None
    forecast: Prediction | None = None
    edge_forecast: Prediction | None = None
    runner: ProbeRunner | None = None
    runs: list[ProbeRun] = field(default_factory=list)
    points: list[EdgePoint] = field(default_factory=list)
    edge: Edge | None = None

    @property
    def objective(self) -> Objective:
        """The prepared problem."""
        return self.prepared.objective

    @property
    def measurable(self) -> Measurable:
        """What of it is measured."""
        return self.prepared.trained

    def go(self) -> None:
        """Measure, predict, run."""
        request, objective = self.request, self.objective
        with self.measurable.at() as measured:
            self.measurement = measure_problem(measured, request.measure)
            self._require_precision(self.measurement)  # before the runs, which take the time
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
        if request.edge or self._sharpened:
            self.edge_forecast = edge_forecast(self.forecast, self.runner) if request.edge else self.forecast
            self.edge = find_edge(
                self.runner,
                self.edge_forecast,
                keep=self.points.append,
                on_step=self._ticker("edge", self.edge_forecast.steps, 5),
            )

    @property
    def _sharpened(self) -> bool:
        """Whether runs below the threshold were lost to curvature that came on the way: then their own edge counts."""
        return any(run.verdict == "sharpened" for run in self.runs)

    def _require_precision(self, measurement: Measurement) -> None:
        """Refuse a threshold that is less precise than asked for, where the request is strict."""
        measure, entry = self.request.measure, measurement.operators[self.request.family]
        wanted = measure.precision([self.request.rule], moments=measure.moments(dimension=self.objective.num_params))
        reached = {entry.operator: wanted(entry.curvature.spectrum)}
        self.prepared.missed(
            notices.precision_notices(
                reached, rtol=measure.rtol, max_hvps=measure.max_hvps, dimension=self.objective.num_params
            )
        )

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
        recommended = None
        if edge is not None and not self.runs:
            verdict, reason = edge_outcome(edge, expected)
        elif edge is not None and edge.found and self._sharpened:
            recommended = MARGIN * edge.value
            if edge.value < expected.threshold.value:
                verdict, reason = (
                    "refuted",
                    (
                        f"the landscape sharpens on the way: within {edge.steps} steps half of the runs diverge at "
                        f"{edge.value:.3g}, {edge.value / expected.threshold.value:.2g} × the threshold; use lr ≤ "
                        f"{recommended:.3g}"
                    ),
                )
        if interrupted and verdict == "confirmed":
            verdict, reason = "inconclusive", "interrupted before every run was done"
        return ProbeResult(
            optimizer=request.optimizer,
            settings=request.measure.settings(request.family),
            estimator=None if request.first_order else Estimator(request.measure.directions, request.measure.queries),
            threshold=expected.threshold,
            linearized=request.linearized,
            growth=request.growth,
            runs=tuple(self.runs),
            edge=edge,
            outcome=verdict,
            reason=reason,
            recommended=recommended,
            together=self.runner is not None and self.runner.together,
            interrupted=interrupted,
            **self.prepared.header(
                loss=self.measurement.loss,
                grad_norm=self.measurement.grad_norm,
                num_hvps=self.measurement.num_hvps + (self.runner.num_hvps if self.runner else 0),
                warnings=self._notices(expected),
            ),
        )

    def _notices(self, expected: Prediction) -> Iterable[Notice]:
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


def probe(
    problem: Problem,
    *,
    on_progress: Progress | None = None,
    on_run: ProbeProgress | None = None,
    **options: Unpack[ProbeOptions],
) -> ProbeResult:
    """Predict the threshold, then train briefly at step sizes on each side of it and say whether reality agrees.

    The problem comes back as it was. A loss that becomes NaN or infinite in a run is a result, not an error.

    Args:
        problem: Model, batches and loss.
        on_progress: As for ``zoscope.bounds``.
        on_run: Called as ``on_run(what, done, total)`` with replica steps done and expected.
        **options: Those of ``zoscope probe``: ``examples/guide/options.md`` has types, defaults and ranges. ``ratios``
            are 0.8 and 1.25 unless ``lr`` or ``edge`` says otherwise.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range.
        UsageError: If the curvature or the preconditioner asked for cannot be had.
        SpecError: If the problem cannot be measured.
        NumericalError: If the start is not finite, nothing limits the step size there, or, with ``strict``, a precision
            is not reached.
        ProbeInterruptedError: A ``KeyboardInterrupt`` that carries what was known.
    """
    request = ProbeRequest.of(on_progress=on_progress, on_run=on_run, **options)
    if request.measure.curvature == "forward":
        raise UsageError(NO_SPECTRUM.format(curvature="forward"))
    with curvature_session(problem, request.measure, trains=True) as prepared:
        session = Session(prepared, request)
        try:
            session.go()
        except KeyboardInterrupt:
            if session.forecast is None:
                raise
            raise ProbeInterruptedError(session.result(interrupted=True)) from None
        return session.result(interrupted=False)
