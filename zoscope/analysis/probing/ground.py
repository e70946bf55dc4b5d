"""Where a probe stands: the prepared problem, the starting point, the surface that runs walk on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoscope.analysis.measuring import curvature_operator
from zoscope.analysis.probing.linear import DENSE_LIMIT, eigenbasis_model, matrix_model
from zoscope.curvature.measure import measure
from zoscope.curvature.operators import DENSE_BLOCK, LinearOperator, Preconditioned
from zoscope.errors import NumericalError
from zoscope.optim.dealt import run_mini_batches
from zoscope.optim.replicas import Limits, Plan, run
from zoscope.optim.rules import GD, GDM, Adam, FrozenAdam, Rule
from zoscope.optim.surface import MiniBatchSurface, SequentialSurface, Surface, choose_surface

if TYPE_CHECKING:
    from zoscope.analysis.probing.forecast import Forecast
    from zoscope.analysis.probing.path import GradientFlow
    from zoscope.analysis.probing.request import ProbeRequest
    from zoscope.curvature.results import Curvature
    from zoscope.optim.trajectory import Trajectory
    from zoscope.problem import Objective
    from zoscope.problem.precision import Measurable
    from zoscope.theory.moments import EstimatorMoments

FEWEST_REMEASURE_HVPS, REMEASURE_HVPS = 60, 200
REMEASURE_RTOL = 0.05


@dataclass
class Ground:
    """Runs things, and measures again where they end.

    Args:
        objective: The prepared problem.
        measurable: What of it is measured.
        request: What is asked.
        origin: ``(d,)`` parameters at the start.
        start: Where runs start: ``origin``, or the same point in the coordinates of the surface.
        diagonal: Adam's frozen P; ``None`` for other rules.
        surface: What runs walk on.
        together: Whether replicas are stepped together.
        deadline: ``time.perf_counter()`` at which everything has to be over.
        flow: The mean path of the runs; ``None`` where it was not measured.
        remeasure_hvps: Products that measuring again may take.
        num_hvps: Hessian-vector products spent since the start was measured.
    """

    objective: Objective
    measurable: Measurable
    request: ProbeRequest
    origin: Tensor
    start: Tensor
    diagonal: Tensor | None
    surface: Surface
    together: bool
    deadline: float
    flow: GradientFlow | None = None
    remeasure_hvps: int = REMEASURE_HVPS
    num_hvps: int = 0

    def allow(self, start_hvps: int) -> None:
        """Let measuring again take half of what the start took: it is done to a precision that is less than half."""
        self.remeasure_hvps = min(max(FEWEST_REMEASURE_HVPS, start_hvps // 2), REMEASURE_HVPS)

    def rule(self, *, adaptive: bool) -> Rule:
        """The update rule of a run."""
        measure_request = self.request.measure
        if self.request.family == "gd":
            return GD()
        if self.request.family == "gdm":
            return GDM(beta=measure_request.beta)
        if adaptive or self.diagonal is None:
            return Adam(betas=measure_request.betas, eps=measure_request.eps)
        return FrozenAdam([self.diagonal], beta1=measure_request.betas[0])

    def replicas(self, *, adaptive: bool = False) -> int:
        """Number of direction streams: one for a gradient, few for a run that is shown and does not count."""
        if self.request.first_order:
            return 1
        return max(min(2, self.request.replicas), self.request.replicas // 4) if adaptive else self.request.replicas

    def walk(
        self,
        lr: float,
        *,
        forecast: Forecast,
        runs_left: float,
        adaptive: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """Run all replicas at one step size, within this run's share of the time that is left."""
        now = time.perf_counter()
        share = now + max(self.deadline - now, 0.0) / max(runs_left, 1.0)
        limits = Limits(left=forecast.left, valley=forecast.loss + forecast.scale, deadline=share)
        plan = Plan(
            rule=self.rule(adaptive=adaptive),
            estimator=self.request.estimator,
            lr=lr,
            steps=forecast.steps,
            replicas=self.replicas(adaptive=adaptive),
            seed=self.request.measure.seed,
            limits=limits,
        )
        try:
            if isinstance(self.surface, MiniBatchSurface):
                return run_mini_batches(self.objective, self.surface, self.start, plan, on_step=on_step)
            return run(self.surface, self.start, plan, together=self.together, on_step=on_step)
        finally:
            self.objective.write(self.origin)

    def measure_at(self, theta: Tensor, diagonal: Tensor | None) -> Curvature | None:
        """Curvature at ``theta`` of the operator that the rule acts through; ``None`` where it is not finite."""
        try:
            with self.measurable.at(theta) as measured:
                base = curvature_operator(measured, self.request.measure)
                operator: LinearOperator = base if diagonal is None else Preconditioned(base, diagonal)
                result = measure(
                    operator,
                    method="dense" if operator.dim <= DENSE_BLOCK else "deflated-slq",
                    precision=self.request.measure.precision([self.request.rule], moments=self._zeroth_order_moments),
                    rtol=max(REMEASURE_RTOL, self.request.measure.rtol),
                    max_hvps=min(self.remeasure_hvps, self.request.measure.max_hvps),
                    seed=self.request.measure.seed,
                )
        except NumericalError:
            return None  # the run went where derivatives overflow: nothing to report, and no reason to fail
        self.num_hvps += result.num_hvps
        return result

    @property
    def _zeroth_order_moments(self) -> EstimatorMoments:
        return self.request.measure.moments(dimension=self.objective.num_params)


def choose_ground(
    objective: Objective,
    measurable: Measurable,
    request: ProbeRequest,
    *,
    forecast: Forecast,
    diagonal: Tensor | None,
    deadline: float,
) -> Ground:
    """The loss itself, or its quadratic model at the start."""
    origin = objective.read()
    if diagonal is not None and not request.linearized:
        diagonal = diagonal.to(objective.dtype)  # what is measured is wider than the runs in half precision are

    def ground(surface: Surface, *, together: bool) -> Ground:
        return Ground(objective, measurable, request, origin, origin, diagonal, surface, together, deadline)

    if request.linearized and objective.num_params <= DENSE_LIMIT:
        with measurable.at() as measured:
            start = measured.read()
            model = matrix_model(measured, request, start)
        return Ground(objective, measurable, request, origin, start, diagonal, model, together=True, deadline=deadline)
    if request.linearized:
        objective.notify(
            "linearized-spectrum",
            f"The quadratic model has {objective.num_params:,} dimensions: the runs are in its eigenbasis, with the "
            "eigenvalues and the gradient that were measured.",
        )
        model, start = eigenbasis_model(forecast, device=objective.device)
        flat = None if diagonal is None else torch.ones_like(start)
        return Ground(objective, measurable, request, origin, start, flat, model, together=True, deadline=deadline)
    if request.batch_size is not None:
        objective.notify(
            "mini-batch",
            f"The runs draw {request.batch_size:,} of {objective.num_examples:,} examples at random at every step, and "
            "the threshold is that of such mini-batches. Forecasts of single runs leave their noise out.",
        )
        return ground(MiniBatchSurface(objective, request.batch_size, seed=request.measure.seed), together=False)
    replicas = 1 if request.first_order else request.replicas
    surface, why_not = choose_surface(objective, replicas=replicas, first_order=request.first_order)
    if why_not is not None:
        objective.notify("replicas-in-turn", f"The replicas run one after another: {why_not}.")
    return ground(surface, together=not isinstance(surface, SequentialSurface))
