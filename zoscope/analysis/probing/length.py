"""How long a run has to be, and where the valley ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from zoscope.theory.curve import GradientMeasure, predicted_loss
from zoscope.theory.growth import steps_to_grow
from zoscope.theory.typical import exit_times

if TYPE_CHECKING:
    from zoscope.analysis.probing.request import ProbeRequest
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Spectrum

LEFT = 4.0
"""A replica has left the valley when its loss is this many times that at the start."""

LEFT_FIRST_ORDER = 2.0
"""The same without noise, where a loss below the threshold does not rise at all."""

TYPICAL_SHARE = 0.85
"""Share of the model's replicas that should have left by the end of a run above."""

SURVIVAL = 0.75
"""Share of them that has to leave for a surviving run to mean anything."""

CREST = 200
"""Steps in which an overshoot shows."""

LONGEST_CURVE = 20_000
"""Steps up to which a loss curve is predicted."""


def steps_needed(
    spectrum: Spectrum,
    gradient: GradientMeasure | None,
    lr: float,
    request: ProbeRequest,
    *,
    growth: float,
    left: float,
    rule: UpdateRule,
    moments: EstimatorMoments,
    loss: float,
) -> tuple[int, bool]:
    """Steps for the growth asked for, and for it to show in a typical run; and whether typical runs survive.

    Growth starts from the noise of the gradient, not from the loss, and a typical run grows more slowly than the mean.
    """
    positive = spectrum.positive
    grown = steps_to_grow(positive, lr, growth, rule=rule, moments=moments)
    if not math.isfinite(grown):
        return request.max_steps, False
    steps = math.ceil(grown)
    longest = min(20 * steps, request.max_steps, LONGEST_CURVE)
    if gradient is None or longest <= steps:
        return steps, False
    if moments.b == 0:
        curve = predicted_loss(positive, gradient, loss=loss, lr=lr, steps=longest, rule=rule, moments=moments)
        exits = np.append(np.flatnonzero(curve > left), math.inf)[:1]
    else:
        exits = exit_times(
            positive,
            gradient,
            rise=left - loss,
            lr=lr,
            steps=longest,
            rule=rule,
            moments=moments,
            seed=request.measure.seed,
        )
    shows = float(np.quantile(exits, TYPICAL_SHARE, method="higher"))
    survives = bool(np.isfinite(exits).mean() < SURVIVAL)
    return max(steps, math.ceil(1.25 * min(shows, longest))), survives


def left_above(
    spectrum: Spectrum,
    gradient: GradientMeasure | None,
    lr: float,
    *,
    rule: UpdateRule,
    moments: EstimatorMoments,
    loss: float,
) -> float:
    """Loss above which a replica has left the valley.

    A multiple of the loss at the start, or twice the crest of the predicted curve at a stable ``lr`` if that is higher:
    far from a minimum momentum overshoots before it settles.
    """
    limit = loss + ((LEFT_FIRST_ORDER if moments.b == 0 else LEFT) - 1.0) * (abs(loss) or 1.0)
    if gradient is None:
        return limit
    curve = predicted_loss(spectrum.positive, gradient, loss=loss, lr=lr, steps=CREST, rule=rule, moments=moments)
    crest = float(curve[np.isfinite(curve)].max())
    return max(limit, loss + 2.0 * (crest - loss))


def descent_steps(request: ProbeRequest) -> int:
    """Steps after which the mean change of the loss stands out of its noise by about four standard errors.

    In one step it is ``-η‖g‖²(1 - ratio)`` with a spread of about ``√2 η‖g‖²``, doubled here for the second-order part.
    """
    gap = min((abs(1.0 - ratio) for ratio in request.ratios if ratio != 1.0), default=0.2)
    return math.ceil((4.0 * 2.0 * math.sqrt(2.0) / gap) ** 2 / request.replicas)
