"""The empirical edge: bisection on whether half of the replicas diverge within the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from zoscope.analysis.probing import verdict as judging
from zoscope.analysis.probing.ends import end_state
from zoscope.analysis.probing.length import steps_needed
from zoscope.analysis.probing.results import Edge, EdgePoint, Outcome
from zoscope.theory.growth import steps_to_grow
from zoscope.theory.horizons import time_to_blow_up
from zoscope.theory.mean_square import StabilityCondition, Version
from zoscope.theory.typical import exit_times

if TYPE_CHECKING:
    from zoscope.analysis.probing.forecast import Forecast
    from zoscope.analysis.probing.ground import Ground
    from zoscope.optim.trajectory import Trajectory

FIRST_BRACKET = 1.25
"""After the prediction itself, the next step size is larger or smaller by this."""

AGREES = 0.15
"""How far the edge may lie from the prediction: its own spread over seeds is several percent."""

WIDEST = 64.0
"""The bracket is widened up to this factor on each side."""


def edge_forecast(forecast: Forecast, ground: Ground) -> Forecast:
    """The forecast with steps that show an edge to within the tolerance, for gradients to within half of it.

    The square root of the growth asked for is enough: it has to carry a replica out of the valley, no further. A longer
    run sees another edge: the landscape sharpens on the way, and from some time on escape along negative curvature
    alone brings the threshold below that of infinite time, which leaves escape out.
    """
    request = ground.request
    if request.steps is not None or forecast.row.minibatch is not None:
        return forecast
    spectrum, rule, moments = forecast.spectrum, forecast.rule, forecast.moments
    growth = math.sqrt(request.growth)
    if request.first_order:
        needed, _ = steps_needed(
            spectrum,
            forecast.gradient,
            (1.0 + 0.5 * request.edge_rtol) * forecast.true_value,
            request,
            growth=growth,
            left=forecast.left,
            rule=rule,
            moments=moments,
            loss=forecast.loss,
        )
    else:
        lr = (1.0 + request.edge_rtol) * forecast.limit
        grown = steps_to_grow(spectrum.positive, lr, growth, rule=rule, moments=moments)
        # Just below the threshold: on it, rounding decides when the sum over a long time passes 1.
        escaped = time_to_blow_up(spectrum, 0.999 * forecast.limit, rule=rule, moments=moments, version="full")
        needed = math.ceil(min(grown, escaped, request.max_steps))
    return replace(forecast, steps=max(min(needed, request.max_steps), forecast.steps))


def typical_edge(forecast: Forecast, *, seed: int, rtol: float) -> float | None:
    """The step size at which half of the quadratic model's own runs leave the valley: what the replicas should see.

    It lies above the threshold of the mean square, which rare runs carry, the more so the shorter the run.
    """
    gradient = forecast.gradient
    if forecast.moments.b == 0 or gradient is None or forecast.row.minibatch is not None:
        return None

    def leaves(lr: float) -> bool:
        times = exit_times(
            forecast.spectrum.positive,
            gradient,
            rise=forecast.left - forecast.loss,
            lr=lr,
            steps=forecast.steps,
            rule=forecast.rule,
            moments=forecast.moments,
            share=0.5,
            seed=seed,
        )
        return 2 * int(np.isfinite(times).sum()) >= times.size

    low, high = _bracket(forecast.limit, leaves)
    while low is not None and high is not None and high / low > 1.0 + rtol:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if leaves(middle) else (middle, high)
    return None if low is None or high is None else math.sqrt(low * high)


def find_edge(
    ground: Ground, forecast: Forecast, *, keep: Callable[[EdgePoint], None], on_step: Callable[[int], None] | None
) -> Edge:
    """Bisect for the edge, from the prediction outwards and then inwards.

    Args:
        ground: Where to run.
        forecast: What is expected, with the steps of every run.
        keep: Receives every point as it is known, in case the rest is interrupted.
        on_step: Called with the number of replica steps just done.
    """
    points: dict[float, EdgePoint] = {}
    leaving: dict[float, Trajectory] = {}  # at the smallest step size at which half of the replicas leave
    rtol = ground.request.edge_rtol

    def diverges(lr: float) -> bool:
        if lr not in points:
            trajectory = ground.walk(lr, forecast=forecast, runs_left=1, on_step=on_step)
            point = _point(forecast, lr, trajectory)
            if trajectory.capped and not point.lost:
                raise _OutOfTimeError
            points[lr] = point
            keep(point)
            if point.lost and all(lr < larger for larger in leaving):
                leaving.clear()
                leaving[lr] = trajectory
        return points[lr].lost

    low: float | None
    high: float | None
    try:
        low, high = _bracket(forecast.true_value, diverges)
        while low is not None and high is not None and high / low > 1.0 + rtol:
            middle = math.sqrt(low * high)
            if diverges(middle):
                high = middle
            else:
                low = middle
    except _OutOfTimeError:
        low = high = None
    predicted = typical_edge(forecast, seed=ground.request.measure.seed, rtol=0.5 * rtol)
    edge = summarise(tuple(points.values()), forecast, closed=(low, high), predicted=predicted)
    for lr, trajectory in leaving.items():
        end, sharpened = end_state(ground, forecast, trajectory, lr=lr, adaptive=False)
        edge = replace(edge, end=end, sharpened=sharpened)
    return edge


class _OutOfTimeError(Exception):
    """A run was cut short before half of its replicas had diverged: it says nothing."""


def summarise(
    points: tuple[EdgePoint, ...],
    forecast: Forecast,
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


def edge_outcome(edge: Edge, forecast: Forecast) -> tuple[Outcome, str]:
    """The verdict on the threshold when nothing but the edge was looked for."""
    if not edge.found:
        return "inconclusive", "no edge was found within the time and the step sizes tried"
    if forecast.few_modes:
        return "inconclusive", judging.FEW_MODES_REMARK
    low = high = forecast.threshold.value
    if edge.ratio_to_horizon is not None and forecast.threshold.name != "assumed":
        full, positive = (edge.value / ratio for ratio in edge.ratio_to_horizon)
        low, high = min(full, forecast.threshold.exact or full), max(positive, edge.predicted or positive)
    if forecast.threshold.name == "horizon" and forecast.threshold.horizon_ci95 is not None:
        sure = forecast.threshold.horizon_ci95
        low, high = min(low, sure[0]), max(high, sure[1])
    below, above = 1 - edge.value / low, edge.value / high - 1
    if max(below, above) <= AGREES:
        return "confirmed", f"the edge lies within {AGREES:.0%} of the predicted interval"
    where = f"{below:.0%} below" if below > 0 else f"{above:.0%} above"
    if below > 0 and edge.sharpened and edge.end is not None:
        return "inconclusive", (
            f"the edge lies {where} the predicted interval, but the landscape sharpened: where the first run was last "
            f"in the valley, at step {edge.end.step}, the threshold had come down to {edge.end.threshold:.3g}"
        )
    return "refuted", f"the edge lies {where} the predicted interval, more than {AGREES:.0%}"


def _reference(forecast: Forecast) -> float | None:
    if forecast.moments.b == 0:
        return forecast.true_value
    return forecast.threshold.exact


def _horizon_ratios(forecast: Forecast, value: float) -> tuple[float, float] | None:
    if forecast.moments.b == 0:
        return None
    if forecast.row.minibatch is not None:
        point = forecast.row.minibatch.model.at(forecast.steps)
        return value / point.lower.value, value / point.upper.value
    full, positive = (
        StabilityCondition(forecast.rule, forecast.moments, forecast.steps, version).threshold(forecast.spectrum)
        for version in ("full", "positive")
    )
    return value / full, value / positive


def _bracket(guess: float, diverges: Callable[[float], bool]) -> tuple[float | None, float | None]:
    """A step size that stays and one that does not, from the guess outwards; ``None`` where none was found."""
    up = not diverges(guess)
    inner, factor = guess, FIRST_BRACKET
    while factor <= WIDEST:
        outer = guess * factor if up else guess / factor
        if diverges(outer) == up:
            return (inner, outer) if up else (outer, inner)
        inner, factor = outer, 2.0 * factor
    return (inner, None) if up else (None, inner)


def _point(forecast: Forecast, lr: float, trajectory: Trajectory) -> EdgePoint:
    found = judging.fates(trajectory, loss=forecast.loss, scale=forecast.scale)
    count = len(trajectory.left)
    return EdgePoint(
        lr=lr,
        diverged=found.diverged,
        replicas=count,
        left_at=found.left_at if 2 * found.diverged >= count else None,
        blow_up=_blow_up(forecast, lr),
    )


def _blow_up(forecast: Forecast, lr: float) -> tuple[float, float]:
    """Steps after which noise feeds itself: all eigenvalues, and the positive ones."""
    minibatch = forecast.row.minibatch

    def steps(version: Version) -> float:
        if forecast.moments.b == 0:
            return math.inf
        if minibatch is not None:
            return minibatch.model.blow_up(lr, version=version)
        return time_to_blow_up(forecast.spectrum, lr, rule=forecast.rule, moments=forecast.moments, version=version)

    return steps("full"), steps("positive")
