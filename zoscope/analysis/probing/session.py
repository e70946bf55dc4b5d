"""A probe under way: what is known at any moment makes a result."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zoscope.analysis import notices
from zoscope.analysis.measured import ProblemInfo
from zoscope.analysis.measuring import Measurement, curvature_operator, measure_problem
from zoscope.analysis.probing.edge import edge_forecast, edge_outcome, find_edge, summarise
from zoscope.analysis.probing.forecast import Forecast, forecast, gradient_measure, preconditioned_gradient
from zoscope.analysis.probing.ground import Ground, choose_ground
from zoscope.analysis.probing.path import GradientFlow, flow_times, follow_gradient
from zoscope.analysis.probing.request import ProbeProgress, ProbeRequest
from zoscope.analysis.probing.results import Edge, EdgePoint, ProbeResult, ProbeRun
from zoscope.analysis.probing.runs import probe_run
from zoscope.analysis.probing.verdict import outcome
from zoscope.analysis.results import Estimator
from zoscope.curvature.operators import LinearOperator, Preconditioned, gradient
from zoscope.problem import Notice

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem import Objective
    from zoscope.problem.precision import Measurable


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
    forecast: Forecast | None = None
    edge_forecast: Forecast | None = None
    ground: Ground | None = None
    runs: list[ProbeRun] = field(default_factory=list)
    points: list[EdgePoint] = field(default_factory=list)
    edge: Edge | None = None

    def go(self) -> None:
        """Measure, predict, run."""
        request, objective = self.request, self.objective
        with self.measurable.at() as measured:
            self.measurement = measure_problem(measured, request.measure)
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
        self.ground = choose_ground(
            objective, self.measurable, request, forecast=self.forecast, diagonal=diagonal, deadline=deadline
        )
        self.ground.num_hvps = operator.num_hvps
        self.ground.allow(self.measurement.num_hvps)
        self.ground.flow = self._mean_path(self.forecast, diagonal)
        self._run_all(self.forecast, self.ground)
        if request.edge:
            self.edge_forecast = edge_forecast(self.forecast, self.ground)
            self.edge = find_edge(
                self.ground,
                self.edge_forecast,
                keep=self.points.append,
                on_step=self._ticker("edge", self.edge_forecast.steps, 5),
            )

    def _mean_path(self, expected: Forecast, diagonal: Tensor | None) -> GradientFlow | None:
        """The path of the mean as long as the runs below the threshold follow it; others leave it soon."""
        below = [lr for lr in self._step_sizes(expected) if lr <= expected.threshold.value]
        if self.request.first_order or self.request.linearized or expected.gradient is None or not below:
            return None
        end = flow_times(lr=max(below), steps=expected.steps, rule=expected.rule)[-1]
        with self.measurable.at() as measured:
            return follow_gradient(
                measured, until=float(end), sharpness=expected.spectrum.lambda_max, diagonal=diagonal
            )

    def _step_sizes(self, expected: Forecast) -> list[float]:
        return sorted({*(ratio * expected.threshold.value for ratio in self.request.ratios), *self.request.lrs})

    def _run_all(self, expected: Forecast, ground: Ground) -> None:
        lrs = self._step_sizes(expected)
        plan = [(lr, False) for lr in lrs]
        if self.request.family == "adam" and not self.request.linearized:
            plan += [(lr, True) for lr in lrs]
        for done, (lr, adaptive) in enumerate(plan):
            label = f"{lr / expected.threshold.value:.3g} × threshold{', adaptive' if adaptive else ''}"
            # An adaptive run has a quarter of the replicas and does not count: it gets little of the time.
            left = sum(0.2 if later else 1.0 for _, later in plan[done:]) / (0.2 if adaptive else 1.0)
            left += 2.0 * self.request.edge
            tick = self._ticker(label, expected.steps, 1)
            self.runs.append(probe_run(ground, expected, lr, adaptive=adaptive, runs_left=left, on_step=tick))

    def _ticker(self, what: str, steps: int, rounds: int) -> Ticker | None:
        report = self.request.on_progress
        replicas = 1 if self.ground is None else self.ground.replicas()
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
            together=self.ground is not None and self.ground.together,
            interrupted=interrupted,
            num_hvps=self.measurement.num_hvps + (self.ground.num_hvps if self.ground else 0),
            seconds=time.perf_counter() - self.started,
            warnings=notices.without_repeats(self._notices(expected, info)),
        )

    def _notices(self, expected: Forecast, info: ProblemInfo) -> Iterable[Notice]:
        assert self.measurement is not None
        measured = self.measurement.operators[self.request.family]
        if not self.request.first_order:
            yield from notices.curvature_notices(measured.curvature, expected.row, jump=self.measurement.jump)
        if self.measurement.preconditioner is not None and measured.commutator is not None:
            yield from notices.preconditioner_notices(self.measurement.preconditioner, measured.commutator)
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
