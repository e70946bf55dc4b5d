"""One step size: run it, judge it, measure the curvature again where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoscope.analysis.probing import verdict as judging
from zoscope.analysis.probing.results import EndState, ProbeRun, Variant
from zoscope.theory.mean_square import StabilityCondition
from zoscope.theory.thresholds import fo_threshold, paper_bounds

if TYPE_CHECKING:
    from zoscope.analysis.probing.forecast import Forecast
    from zoscope.analysis.probing.ground import Ground
    from zoscope.curvature.results import Curvature
    from zoscope.optim.trajectory import Trajectory

OnStep = Callable[[int], None]

MOVED = 0.97
"""A threshold below this share of what it was has moved: the re-measurement is good to a few percent."""


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
    verdict = (judging.descent_verdict if descent else judging.growth_verdict)(found, trajectory)
    end, sharpened = _end(ground, forecast, trajectory, lr=lr, adaptive=adaptive)
    if sharpened and not above and verdict == "diverged" and not adaptive:
        verdict = "sharpened"
    as_predicted, reason = judging.judge_run(
        verdict,
        above=above,
        growth=forecast.growth(lr, trajectory.done),
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
        rate_predicted=forecast.rate(lr),
        growth_predicted=forecast.growth(lr, trajectory.done),
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


def _end(
    ground: Ground, forecast: Forecast, trajectory: Trajectory, *, lr: float, adaptive: bool
) -> tuple[EndState | None, bool]:
    """The curvature where the first replica that left was last in the valley, else where the first one ended.

    Returns:
        The state, and whether the threshold came down past ``lr`` on the way: into or below the band there.
    """
    if ground.request.linearized:
        return None, False
    left = [(step, index) for index, step in enumerate(trajectory.left) if step is not None]
    replica = min(left)[1] if left else 0
    if adaptive and trajectory.last_steps[replica] == 0:
        return None, False  # Adam's P does not exist before the first step
    diagonal = _current_preconditioner(ground, trajectory, replica) if adaptive else ground.diagonal
    curvature = ground.measure_at(trajectory.last[replica], diagonal)
    if curvature is None:
        return None, False
    threshold, lowest = _thresholds(ground, forecast, curvature)
    # Sharpened: the step size was stable where the run began, and it is the threshold that moved.
    sharpened = lr < forecast.limit and lr >= lowest and threshold < MOVED * forecast.limit
    scale = 2.0 * (1.0 - forecast.rule.momentum) / forecast.rule.lr_scale
    state = EndState(
        step=trajectory.last_steps[replica],
        threshold=threshold,
        trace=curvature.trace.value,
        lambda_max=curvature.lambda_max.value,
        term=scale / lr,
        preconditioner_mean=None if diagonal is None else float(diagonal.double().mean()),
    )
    return state, sharpened


def _thresholds(ground: Ground, forecast: Forecast, curvature: Curvature) -> tuple[float, float]:
    """The infinite-time threshold, and the lower end of the band that counts as reached."""
    rule, moments = forecast.rule, forecast.moments
    if ground.request.first_order:
        limit = fo_threshold(curvature.lambda_max.value, rule=rule)
        return limit, limit
    exact = StabilityCondition(rule, moments).threshold(curvature.spectrum.fine)
    band = paper_bounds(curvature.trace_positive.value, curvature.lambda_max.value, rule=rule, moments=moments)
    return exact, min(band.lower, exact)


def _current_preconditioner(ground: Ground, trajectory: Trajectory, replica: int) -> Tensor | None:
    """``P_t = (1−β₁ᵗ)·(√(v/(1−β₂ᵗ)) + ε)`` of a replica."""
    if trajectory.second_moment is None:
        return ground.diagonal
    beta1, beta2 = ground.request.measure.betas
    step = max(trajectory.last_steps[replica], 1)
    v = trajectory.second_moment[replica].double() / (1.0 - beta2**step)
    diagonal = (1.0 - beta1**step) * (torch.sqrt(v) + ground.request.measure.eps)
    return diagonal.to(trajectory.second_moment.dtype)
