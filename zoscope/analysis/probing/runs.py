"""One step size: run it, judge it, measure the curvature again where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from zoscope.analysis.probing import verdict as judging
from zoscope.analysis.probing.ends import end_state
from zoscope.analysis.probing.results import ProbeRun, Variant

if TYPE_CHECKING:
    from zoscope.analysis.probing.forecast import Forecast
    from zoscope.analysis.probing.ground import Ground

OnStep = Callable[[int], None]


def probe_run(
    ground: Ground, forecast: Forecast, lr: float, *, adaptive: bool, runs_left: float, on_step: OnStep | None
) -> ProbeRun:
    """All replicas at one step size, judged.

    Args:
        ground: Where to run.
        forecast: What is expected.
        lr: Step size.
        adaptive: Whether Adam adapts P; such a run is shown and does not count.
        runs_left: This run and those after it share the time that is left.
        on_step: Called with the number of replica steps just done.
    """
    trajectory = ground.walk(lr, forecast=forecast, runs_left=runs_left, adaptive=adaptive, on_step=on_step)
    found = judging.fates(trajectory, loss=forecast.loss, scale=forecast.scale)
    above = lr > forecast.threshold.value
    descent = forecast.threshold.name == "descent"
    if descent:
        verdict = judging.descent_verdict(found, trajectory)
    else:
        verdict = judging.growth_verdict(found, trajectory, noisy=forecast.row.minibatch is not None)
    end, sharpened = end_state(ground, forecast, trajectory, lr=lr, adaptive=adaptive)
    if sharpened and not above and verdict == "diverged" and not adaptive:
        verdict = "sharpened"
    growth = None if forecast.row.minibatch is not None else forecast.growth(lr, trajectory.done)
    as_predicted, reason = judging.judge_run(
        verdict,
        above=above,
        growth=growth,
        wanted=ground.request.growth,
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
    if ground.flow is not None and not adaptive:
        predicted = forecast.curve(lr, trajectory.length, flow=ground.flow)
    stayed = [float(change) for change, left in zip(found.changes, trajectory.left, strict=True) if left is None]
    variant = _variant(ground, adaptive=adaptive)
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
        loss_start=forecast.loss,
        loss_end=forecast.loss + sum(stayed) / len(stayed) if stayed and math.isfinite(sum(stayed)) else None,
        verdict=verdict,
        as_predicted=None if adaptive else as_predicted,
        reason=f"P adapts, which the theorem does not cover: {reason}" if adaptive else reason,
        prediction=judging.prediction_error(trajectory, predicted, quadratic=quadratic),
        end=end,
        curves=judging.curves(trajectory, predicted),
        seconds=trajectory.seconds,
    )


def _variant(ground: Ground, *, adaptive: bool) -> Variant:
    if adaptive:
        return "adaptive"
    if ground.request.family == "adam":
        return "frozen"
    return "first-order" if ground.request.first_order else "zeroth-order"
