"""The runs of a probe: walked, judged, and bisected for the edge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.analysis.measurement import curvature_operator
from zoscope.analysis.probe_prediction import DENSE_LIMIT, eigenbasis_model, matrix_model, steps_needed
from zoscope.analysis.probe_results import (
    Curves,
    Edge,
    EdgePoint,
    EndState,
    Outcome,
    PredictionError,
    ProbeRun,
    RunVerdict,
    Variant,
)
from zoscope.curvature.operators import DENSE_BLOCK, LinearOperator, Preconditioned
from zoscope.curvature.preconditioner import current_diagonal
from zoscope.curvature.slq import measure
from zoscope.errors import NumericalError
from zoscope.optim.perturbation import MiniBatchSurface, SequentialSurface, Surface, choose_surface
from zoscope.optim.replicas import Limits, ReplicaPlan, run, run_mini_batches
from zoscope.optim.rules import FrozenAdam, Rule, rule_from_options
from zoscope.theory.stability import MomentBounds, StabilityCondition, Version, fo_threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.analysis.probe_prediction import GradientFlow, Prediction
    from zoscope.analysis.probe_results import ProbeRequest
    from zoscope.curvature.slq import Curvature
    from zoscope.optim.replicas import Trajectory
    from zoscope.problem import Objective
    from zoscope.problem.core import Measurable
    from zoscope.theory.rules import EstimatorMoments

FEWEST_REMEASURE_HVPS, REMEASURE_HVPS = 60, 200
REMEASURE_RTOL = 0.05


@dataclass
class ProbeRunner:
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
        if adaptive or self.diagonal is None:
            return rule_from_options(self.request.family, vars(measure_request))
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
        forecast: Prediction,
        runs_left: float,
        adaptive: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """Run all replicas at one step size, within this run's share of the time that is left."""
        now = time.perf_counter()
        share = now + max(self.deadline - now, 0.0) / max(runs_left, 1.0)
        limits = Limits(left=forecast.left, valley=forecast.model.loss + forecast.scale, deadline=share)
        plan = ReplicaPlan(
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
    forecast: Prediction,
    diagonal: Tensor | None,
    deadline: float,
) -> ProbeRunner:
    """The loss itself, or its quadratic model at the start."""
    origin = objective.read()
    if diagonal is not None and not request.linearized:
        diagonal = diagonal.to(objective.dtype)  # what is measured is wider than the runs in half precision are

    def runner(surface: Surface, *, together: bool = True, start: Tensor = origin) -> ProbeRunner:
        return ProbeRunner(objective, measurable, request, origin, start, diagonal, surface, together, deadline)

    if request.linearized and objective.num_params <= DENSE_LIMIT:
        with measurable.at() as measured:
            start = measured.read()
            return runner(matrix_model(measured, request, start), start=start)
    if request.linearized:
        objective.notify(
            "linearized-spectrum",
            f"The quadratic model has {objective.num_params:,} dimensions: the runs are in its eigenbasis, with the "
            "eigenvalues and the gradient that were measured.",
        )
        model, start = eigenbasis_model(forecast, device=objective.device)
        diagonal = None if diagonal is None else torch.ones_like(start)
        return runner(model, start=start)
    if request.batch_size is not None:
        objective.notify(
            "mini-batch",
            f"The runs draw {request.batch_size:,} of {objective.num_examples:,} examples at random at every step, and "
            "the threshold is that of such mini-batches. Forecasts of single runs leave their noise out.",
        )
        return runner(MiniBatchSurface(objective, request.batch_size, seed=request.measure.seed), together=False)
    replicas = 1 if request.first_order else request.replicas
    surface, why_not = choose_surface(objective, replicas=replicas, first_order=request.first_order)
    if why_not is not None:
        objective.notify("replicas-in-turn", f"The replicas run one after another: {why_not}.")
    return runner(surface, together=not isinstance(surface, SequentialSurface))


MAJORITY = 0.75
"""Share of the replicas that has to agree."""

STILL = 0.05
"""A replica that ends within this share of the starting loss above it counts as stable."""

FEW_MODES_REMARK = (
    "few modes carry the curvature: typical runs survive beyond the mean-square threshold, because rare directions "
    "carry the mean, so that runs can neither confirm it nor speak against it from above"
)

FALLEN = 0.25
"""Share of the loss up to whose loss the predicted curve is compared with the runs."""

SIGMAS = 2.0
"""Standard errors from zero at which the sign of a mean change is known."""


@dataclass(frozen=True)
class ReplicaOutcomes:
    """What became of the replicas.

    Args:
        diverged_at: The step at which each diverged, or rose above twice the loss for good, or ``None``.
        stable: How many ended no higher than they started.
        changes: ``(R,)`` change of the loss over the run; infinite for those that left.
    """

    diverged_at: tuple[float | None, ...]
    stable: int
    changes: NDArray[np.float64]

    @property
    def diverged(self) -> int:
        """How many diverged."""
        return sum(step is not None for step in self.diverged_at)

    @property
    def left_at(self) -> float | None:
        """Median step at which those that diverged did."""
        steps = [step for step in self.diverged_at if step is not None]
        return float(np.median(steps)) if steps else None


def outcomes_of(trajectory: Trajectory, *, loss: float, scale: float) -> ReplicaOutcomes:
    """Sort the replicas: diverged, risen to twice the loss at the end, or no higher than at the start."""
    tail = max(1, len(trajectory.steps) // 10)
    with np.errstate(invalid="ignore"):
        ends = trajectory.losses[-tail:].mean(axis=0)
    diverged_at: list[float | None] = []
    stable = 0
    for replica, left in enumerate(trajectory.left):
        if left is not None:
            diverged_at.append(float(left))
        elif not ends[replica] <= loss + scale:
            inside = np.flatnonzero(trajectory.losses[:, replica] <= loss + scale)
            diverged_at.append(float(trajectory.steps[min(inside[-1] + 1, len(trajectory.steps) - 1)]))
        else:
            diverged_at.append(None)
            stable += bool(ends[replica] <= loss + STILL * scale)
    return ReplicaOutcomes(tuple(diverged_at), stable, ends - loss)


def growth_verdict(found: ReplicaOutcomes, trajectory: Trajectory, *, noisy: bool = False) -> RunVerdict:
    """Diverged or stable, where three quarters of the replicas agree.

    With ``noisy`` gradients, as of mini-batches, a loss that rises and does not diverge is stable: they hold it up.
    """
    count = len(trajectory.left)
    if found.diverged >= MAJORITY * count:
        return "diverged"
    if trajectory.capped:
        return "inconclusive"
    stable = count - found.diverged if noisy else found.stable
    return "stable" if stable >= MAJORITY * count else "inconclusive"


def descent_verdict(found: ReplicaOutcomes, trajectory: Trajectory) -> RunVerdict:
    """The sign of the mean change of the loss, where it is known."""
    if found.diverged >= MAJORITY * len(trajectory.left):
        return "rises"
    if trajectory.capped or not np.isfinite(found.changes).all():
        return "inconclusive"
    mean, count = float(found.changes.mean()), len(found.changes)
    error = float(found.changes.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    if abs(mean) < SIGMAS * error:
        return "inconclusive"
    return "falls" if mean < 0 else "rises"


def judge_run(
    verdict: RunVerdict, *, above: bool, growth: float | None, wanted: float, capped: bool, few_modes: bool
) -> tuple[bool | None, str]:
    """Whether a verdict is what the threshold says (``None``: it does not count), and why."""
    if verdict in ("falls", "rises"):
        return (verdict == "rises") == above, f"the mean loss {verdict}"
    if verdict == "sharpened":
        return None, "stable at first; the landscape sharpened past this step size on the way"
    if verdict == "diverged":
        return above, "diverged" if above else "diverged although the curvature did not rise past it"
    if verdict == "inconclusive":
        why = "the time or step cap came first" if capped else "the replicas disagree, or the run is too short to tell"
        return None, why
    if not above:
        return True, "converged"
    if few_modes:
        return None, FEW_MODES_REMARK
    if growth is None:
        return None, "did not diverge, which does not count: how fast the noise of mini-batches grows is not known"
    if growth < wanted:
        why = f"the predicted growth of only {growth:.3g} might not show yet; --steps gives more"
        return None, f"did not diverge, but {why}"
    return False, f"did not diverge although the mean square should have grown by {growth:.3g}"


def outcome(runs: Sequence[ProbeRun], *, few_modes: bool) -> tuple[Outcome, str]:
    """The verdict on the threshold from all runs that count."""
    counted = [run for run in runs if run.as_predicted is not None]
    against = [run for run in counted if run.as_predicted is False]
    if against:
        worst = against[0]
        return "refuted", f"the run at {worst.ratio:.3g} of the threshold {worst.reason}"
    if few_modes:
        return "inconclusive", FEW_MODES_REMARK
    if not counted:
        return "inconclusive", "no run counts"
    below = any(run.side == "below" for run in counted)
    above = any(run.side == "above" for run in counted)
    if not (below and above):
        missing = "above" if below else "below"
        why = next((f": at {run.ratio:.3g} × {run.reason}" for run in runs if run.side == missing), "")
        return "inconclusive", f"no run {missing} the threshold tells{why}"
    return "confirmed", "runs below the threshold did as predicted, and so did runs above"


def prediction_error(
    trajectory: Trajectory, predicted: NDArray[np.float64] | None, *, quadratic: NDArray[np.float64] | None
) -> PredictionError | None:
    """The predicted curve against the mean of the replicas, up to where the loss has fallen by a quarter."""
    if predicted is None or quadratic is None or len(trajectory.steps) < 2:
        return None
    count = len(trajectory.left)
    inside = np.isfinite(trajectory.losses).all(axis=1) & np.isfinite(predicted[trajectory.steps])
    last = len(inside) if inside.all() else int(np.argmin(inside))
    if last < 2:
        return None
    start = trajectory.losses[0, 0]
    means = trajectory.losses[:last].mean(axis=1)
    fallen = np.flatnonzero(means <= start - FALLEN * abs(start))
    index = int(fallen[0]) if fallen.size else last - 1
    step = int(trajectory.steps[index])
    changes = trajectory.losses[index] - trajectory.losses[0]
    return PredictionError(
        step=step,
        predicted_change=float(predicted[step] - predicted[0]),
        quadratic_change=float(quadratic[step] - quadratic[0]),
        measured_change=float(changes.mean()),
        stderr=float(changes.std(ddof=1)) / math.sqrt(count) if count > 1 else None,
    )


def curves(trajectory: Trajectory, predicted: NDArray[np.float64] | None) -> Curves:
    """The recorded points as plain numbers."""
    steps = tuple(int(step) for step in trajectory.steps)
    return Curves(
        steps=steps,
        losses=tuple(tuple(map(_finite, row)) for row in trajectory.losses),
        distances=tuple(tuple(map(_finite, row)) for row in trajectory.distances),
        predicted=tuple(None if predicted is None else _finite(predicted[step]) for step in steps),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


MOVED = 0.97
"""A threshold below this share of what it was has moved: the re-measurement is good to a few percent."""


def end_state(
    runner: ProbeRunner, forecast: Prediction, trajectory: Trajectory, *, lr: float, adaptive: bool
) -> tuple[EndState | None, bool]:
    """The curvature where the first replica that diverged was before it did, else where the first one ended.

    Returns:
        The state, and whether the threshold came down past ``lr`` on the way: into or below the band there.
    """
    if runner.request.linearized or not forecast.model.rule.is_linear:
        return None, False
    left = [(step, index) for index, step in enumerate(trajectory.left) if step is not None]
    replica = min(left)[1] if left else 0
    if adaptive and trajectory.last_steps[replica] == 0:
        return None, False  # Adam's P does not exist before the first step
    diagonal = _current_preconditioner(runner, trajectory, replica) if adaptive else runner.diagonal
    curvature = runner.measure_at(trajectory.last[replica], diagonal)
    if curvature is None:
        return None, False
    threshold, lowest = (_of_batches(forecast) * value for value in _thresholds(runner, forecast, curvature))
    # Sharpened: the step size was stable where the run began, and it is the threshold that moved.
    sharpened = lr < forecast.limit and lr >= lowest and threshold < MOVED * forecast.limit
    scale = 2.0 * (1.0 - forecast.model.rule.momentum) / forecast.model.rule.lr_scale
    state = EndState(
        step=trajectory.last_steps[replica],
        threshold=threshold,
        trace=curvature.trace.value,
        lambda_max=curvature.lambda_max.value,
        term=scale / lr,
        preconditioner_mean=None if diagonal is None else float(diagonal.double().mean()),
    )
    return state, sharpened


def _thresholds(runner: ProbeRunner, forecast: Prediction, curvature: Curvature) -> tuple[float, float]:
    """The infinite-time threshold, and the lower end of the band that counts as reached."""
    rule, moments = forecast.model.rule, forecast.model.moments
    if runner.request.first_order:
        limit = fo_threshold(curvature.lambda_max.value, rule=rule)
        return limit, limit
    exact = StabilityCondition(rule, moments).threshold(curvature.spectrum.fine)
    band = MomentBounds(rule, moments).paper(curvature.trace_positive.value, curvature.lambda_max.value)
    return exact, min(band.lower, exact)


def _of_batches(forecast: Prediction) -> float:
    """The threshold of mini-batches at the start, in units of that of all examples: taken to be the same elsewhere."""
    if forecast.row.minibatch is None or forecast.row.exact is None:
        return 1.0
    return forecast.limit / forecast.row.exact.value


def _current_preconditioner(runner: ProbeRunner, trajectory: Trajectory, replica: int) -> Tensor | None:
    """Adam's P of a replica."""
    if trajectory.second_moment is None:
        return runner.diagonal
    v, step, request = trajectory.second_moment[replica], max(trajectory.last_steps[replica], 1), runner.request.measure
    return current_diagonal(v, step, betas=request.betas, eps=request.eps).to(v.dtype)


OnStep = Callable[[int], None]


def probe_run(
    runner: ProbeRunner, forecast: Prediction, lr: float, *, adaptive: bool, runs_left: float, on_step: OnStep | None
) -> ProbeRun:
    """All replicas at one step size, judged.

    Args:
        runner: Where to run.
        forecast: What is expected.
        lr: Step size.
        adaptive: Whether Adam adapts P; such a run is shown and does not count.
        runs_left: This run and those after it share the time that is left.
        on_step: Called with the number of replica steps just done.
    """
    trajectory = runner.walk(lr, forecast=forecast, runs_left=runs_left, adaptive=adaptive, on_step=on_step)
    found = outcomes_of(trajectory, loss=forecast.model.loss, scale=forecast.scale)
    above = lr > forecast.threshold.value
    if forecast.threshold.name == "descent" or not forecast.model.rule.is_linear:
        verdict = descent_verdict(found, trajectory)
    else:
        verdict = growth_verdict(found, trajectory, noisy=forecast.row.minibatch is not None)
    end, sharpened = end_state(runner, forecast, trajectory, lr=lr, adaptive=adaptive)
    if sharpened and not above and verdict == "diverged" and not adaptive:
        verdict = "sharpened"
    growth = forecast.growth(lr, trajectory.done) if forecast.grows else None
    as_predicted, reason = judge_run(
        verdict,
        above=above,
        growth=growth,
        wanted=runner.request.growth,
        capped=trajectory.capped,
        few_modes=forecast.few_modes,
    )
    if verdict == "sharpened" and end is not None:
        reason = (
            f"stable at first, but the landscape sharpened: at step {end.step} the threshold had come down to "
            f"{end.threshold:.3g}; this does not count"
        )
    quadratic = None if adaptive else forecast.curve(lr, trajectory.length)
    predicted = quadratic
    if runner.flow is not None and not adaptive:
        predicted = forecast.curve(lr, trajectory.length, flow=runner.flow)
    stayed = [float(change) for change, left in zip(found.changes, trajectory.left, strict=True) if left is None]
    variant = _variant(runner, adaptive=adaptive)
    return ProbeRun(
        lr=lr,
        ratio=lr / forecast.threshold.value,
        side="above" if above else "below",
        variant=variant,
        rate_predicted=None if growth is None else forecast.rate(lr),
        growth_predicted=growth,
        steps=trajectory.length,
        steps_done=trajectory.done,
        replicas=len(trajectory.left),
        diverged=found.diverged,
        left_at=found.left_at,
        loss_start=forecast.model.loss,
        loss_end=forecast.model.loss + sum(stayed) / len(stayed) if stayed and math.isfinite(sum(stayed)) else None,
        verdict=verdict,
        as_predicted=None if adaptive else as_predicted,
        reason=f"P adapts, which the theorem does not cover: {reason}" if adaptive else reason,
        prediction=prediction_error(trajectory, predicted, quadratic=quadratic),
        end=end,
        curves=curves(trajectory, predicted),
        seconds=trajectory.seconds,
    )


def _variant(runner: ProbeRunner, *, adaptive: bool) -> Variant:
    if adaptive:
        return "adaptive"
    if runner.request.rule.preconditioned:
        return "frozen"
    return "first-order" if runner.request.first_order else "zeroth-order"


FIRST_BRACKET = 1.25
"""After the prediction itself, the next step size is larger or smaller by this."""

AGREES = 0.15
"""How far the edge may lie from the prediction: its own spread over seeds is several percent."""

WIDEST = 64.0
"""The bracket is widened up to this factor on each side."""


def edge_forecast(forecast: Prediction, runner: ProbeRunner) -> Prediction:
    """The forecast with steps that show an edge to within the tolerance, for gradients to within half of it.

    The square root of the growth asked for is enough: it has to carry a replica out of the valley, no further. A longer
    run sees another edge: the landscape sharpens on the way, and from some time on escape along negative curvature
    alone brings the threshold below that of infinite time, which leaves escape out.
    """
    request = runner.request
    if request.steps is not None or forecast.row.minibatch is not None:
        return forecast
    model, growth = forecast.model, math.sqrt(request.growth)
    if request.first_order:
        lr = (1.0 + 0.5 * request.edge_rtol) * forecast.true_value
        needed, _ = steps_needed(model, lr, request, growth=growth, left=forecast.left)
    else:
        grown = model.positive.steps_to_grow((1.0 + request.edge_rtol) * forecast.limit, growth)
        # Just below the threshold: on it, rounding decides when the sum over a long time passes 1.
        escaped = model.time_to_blow_up(0.999 * forecast.limit, "full")
        needed = math.ceil(min(grown, escaped, request.max_steps))
    return replace(forecast, steps=max(min(needed, request.max_steps), forecast.steps))


def typical_edge(forecast: Prediction, *, seed: int, rtol: float) -> float | None:
    """The step size at which half of the quadratic model's own runs diverge: what the replicas should see.

    It lies above the threshold of the mean square, which rare runs carry, the more so the shorter the run.
    """
    model = forecast.model.positive
    if model.moments.b == 0 or model.gradient is None or forecast.row.minibatch is not None:
        return None

    def leaves(lr: float) -> bool:
        times = model.exit_times(lr, forecast.steps, rise=forecast.left - model.loss, share=0.5, seed=seed)
        return 2 * int(np.isfinite(times).sum()) >= times.size

    low, high = _bisected(forecast.limit, leaves, rtol=rtol)
    return None if low is None or high is None else math.sqrt(low * high)


def find_edge(
    runner: ProbeRunner,
    forecast: Prediction,
    *,
    keep: Callable[[EdgePoint], None],
    on_step: Callable[[int], None] | None,
) -> Edge:
    """Bisect for the edge, from the prediction outwards and then inwards.

    Args:
        runner: Where to run.
        forecast: What is expected, with the steps of every run.
        keep: Receives every point as it is known, in case the rest is interrupted.
        on_step: Called with the number of replica steps just done.
    """
    points: dict[float, EdgePoint] = {}
    leaving: dict[float, Trajectory] = {}  # at the smallest step size at which half of the replicas leave
    rtol = runner.request.edge_rtol

    def diverges(lr: float) -> bool:
        if lr not in points:
            trajectory = runner.walk(lr, forecast=forecast, runs_left=1, on_step=on_step)
            point = _point(forecast, lr, trajectory)
            if trajectory.capped and not point.lost:
                raise _OutOfTimeError
            points[lr] = point
            keep(point)
            if point.lost and all(lr < larger for larger in leaving):
                leaving.clear()
                leaving[lr] = trajectory
        return points[lr].lost

    closed: tuple[float | None, float | None] = None, None
    with suppress(_OutOfTimeError):
        closed = _bisected(forecast.true_value, diverges, rtol=rtol)
    predicted = typical_edge(forecast, seed=runner.request.measure.seed, rtol=0.5 * rtol)
    edge = summarise(tuple(points.values()), forecast, closed=closed, predicted=predicted)
    for lr, trajectory in leaving.items():
        end, sharpened = end_state(runner, forecast, trajectory, lr=lr, adaptive=False)
        edge = replace(edge, end=end, sharpened=sharpened)
    return edge


class _OutOfTimeError(Exception):
    """A run was cut short before half of its replicas had diverged: it says nothing."""


def summarise(
    points: tuple[EdgePoint, ...],
    forecast: Prediction,
    *,
    closed: tuple[float | None, float | None],
    predicted: float | None = None,
) -> Edge:
    """The edge that a set of points shows."""
    ordered = tuple(sorted(points, key=lambda point: point.lr))
    ends = (ordered[0].lr, ordered[-1].lr) if ordered else (forecast.true_value, forecast.true_value)
    low, high = closed
    found = low is not None and high is not None
    calm = [p.lr for p in ordered if p.diverged == 0]
    lost = [p.lr for p in ordered if p.diverged == p.replicas]
    lo = max((lr for lr in calm if high is None or lr < high), default=low or ends[0])
    hi = min((lr for lr in lost if low is None or lr > low), default=high or ends[1])
    value = math.sqrt(low * high) if low is not None and high is not None else math.sqrt(lo * hi)
    reference = _reference(forecast)
    return Edge(
        lo=lo,
        hi=hi,
        value=value,
        steps=forecast.steps,
        ratio_to_exact=value / reference if reference else None,
        ratio_to_horizon=_horizon_ratios(forecast, value),
        predicted=predicted,
        found=found,
        points=ordered,
    )


def edge_outcome(edge: Edge, forecast: Prediction) -> tuple[Outcome, str]:
    """The verdict on the threshold when nothing but the edge was looked for."""
    if not edge.found:
        return "inconclusive", "no edge was found within the time and the step sizes tried"
    if forecast.few_modes:
        return "inconclusive", FEW_MODES_REMARK
    low = high = forecast.threshold.value
    if edge.ratio_to_horizon is not None and forecast.threshold.name != "assumed":
        full, positive = (edge.value / ratio for ratio in edge.ratio_to_horizon)
        low, high = min(full, forecast.threshold.exact or full), max(positive, edge.predicted or positive)
    if forecast.threshold.name == "horizon" and forecast.threshold.horizon_ci95 is not None:
        sure = forecast.threshold.horizon_ci95
        low, high = min(low, sure[0]), max(high, sure[1])
    below, above = 1 - edge.value / low, edge.value / high - 1
    apart = max(below, above)
    where = "in" if apart <= 0 else f"{100 * apart:.2g} % {'below' if below > 0 else 'above'}"
    interval = f"the predicted interval, {low:.3g} to {high:.3g}"
    if apart <= AGREES:
        counts = f"; up to {100 * AGREES:g} % counts as agreement" if apart > 0 else ""
        return "confirmed", f"the edge {edge.value:.3g} lies {where} {interval}{counts}"
    if below > 0 and edge.sharpened and edge.end is not None:
        return "inconclusive", (
            f"the edge {edge.value:.3g} lies {where} {interval}, but the landscape sharpened: at step {edge.end.step}, "
            f"before the first run diverged, the threshold had come down to {edge.end.threshold:.3g}"
        )
    counts = f"more than {100 * AGREES:g} % counts as a difference"
    return "refuted", f"the edge {edge.value:.3g} lies {where} {interval}; {counts}"


def _reference(forecast: Prediction) -> float | None:
    if forecast.model.moments.b == 0:
        return forecast.true_value
    return forecast.threshold.exact


def _horizon_ratios(forecast: Prediction, value: float) -> tuple[float, float] | None:
    if forecast.model.moments.b == 0:
        return None
    if forecast.row.minibatch is not None:
        point = forecast.row.minibatch.model.at(forecast.steps)
        return value / point.lower.value, value / point.upper.value
    full, positive = (
        StabilityCondition(forecast.model.rule, forecast.model.moments, forecast.steps, version).threshold(
            forecast.model.spectrum
        )
        for version in ("full", "positive")
    )
    return value / full, value / positive


def _bisected(guess: float, diverges: Callable[[float], bool], *, rtol: float) -> tuple[float | None, float | None]:
    """A step size that stays and one that does not, as near to each other; ``None`` where none was found."""
    low, high = _bracket(guess, diverges)
    while low is not None and high is not None and high / low > 1.0 + rtol:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(middle) else (middle, high)
    return low, high


def _bracket(guess: float, diverges: Callable[[float], bool]) -> tuple[float | None, float | None]:
    """The same, from the guess outwards, some factor apart."""
    up = not diverges(guess)
    inner, factor = guess, FIRST_BRACKET
    while factor <= WIDEST:
        outer = guess * factor if up else guess / factor
        if diverges(outer) == up:
            return (inner, outer) if up else (outer, inner)
        inner, factor = outer, 2.0 * factor
    return (inner, None) if up else (None, inner)


def _point(forecast: Prediction, lr: float, trajectory: Trajectory) -> EdgePoint:
    found = outcomes_of(trajectory, loss=forecast.model.loss, scale=forecast.scale)
    count = len(trajectory.left)
    return EdgePoint(
        lr=lr,
        diverged=found.diverged,
        replicas=count,
        left_at=found.left_at if 2 * found.diverged >= count else None,
        blow_up=_blow_up(forecast, lr),
    )


def _blow_up(forecast: Prediction, lr: float) -> tuple[float, float]:
    """Steps after which noise feeds itself: all eigenvalues, and the positive ones."""
    minibatch = forecast.row.minibatch

    def steps(version: Version) -> float:
        if forecast.model.moments.b == 0:
            return math.inf
        if minibatch is not None:
            return minibatch.model.blow_up(lr, version=version)
        return forecast.model.time_to_blow_up(lr, version)

    return steps("full"), steps("positive")
