"""The curvature where a run ended: whether the landscape sharpened past its step size on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoscope.analysis.probing.results import EndState
from zoscope.theory.mean_square import StabilityCondition
from zoscope.theory.thresholds import fo_threshold, paper_bounds

if TYPE_CHECKING:
    from zoscope.analysis.probing.forecast import Forecast
    from zoscope.analysis.probing.ground import Ground
    from zoscope.curvature.results import Curvature
    from zoscope.optim.trajectory import Trajectory

MOVED = 0.97
"""A threshold below this share of what it was has moved: the re-measurement is good to a few percent."""


def end_state(
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
    threshold, lowest = (_of_batches(forecast) * value for value in _thresholds(ground, forecast, curvature))
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


def _of_batches(forecast: Forecast) -> float:
    """The threshold of mini-batches at the start, in units of that of all examples: taken to be the same elsewhere."""
    if forecast.row.minibatch is None or forecast.row.exact is None:
        return 1.0
    return forecast.limit / forecast.row.exact.value


def _current_preconditioner(ground: Ground, trajectory: Trajectory, replica: int) -> Tensor | None:
    """``P_t = (1−β₁ᵗ)·(√(v/(1−β₂ᵗ)) + ε)`` of a replica."""
    if trajectory.second_moment is None:
        return ground.diagonal
    beta1, beta2 = ground.request.measure.betas
    step = max(trajectory.last_steps[replica], 1)
    v = trajectory.second_moment[replica].double() / (1.0 - beta2**step)
    diagonal = (1.0 - beta1**step) * (torch.sqrt(v) + ground.request.measure.eps)
    return diagonal.to(trajectory.second_moment.dtype)
