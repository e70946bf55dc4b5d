"""What a given step size would do: how it stands to its limit, when its noise feeds itself, when the loss doubles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from zoscope.analysis.optimizer_bounds import Outlook, Pair, Verdict
from zoscope.analysis.recommend import stand
from zoscope.theory.curve import GradientMeasure, predicted_loss
from zoscope.theory.horizons import time_to_blow_up
from zoscope.theory.mean_square import Version
from zoscope.theory.typical import typical_doubling_time

if TYPE_CHECKING:
    from zoscope.analysis.minibatch_results import MiniBatchBounds
    from zoscope.analysis.recommend import Limit
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Spectrum

VERSIONS: tuple[Version, ...] = ("full", "positive")


def judge(
    lr: float,
    *,
    steps: int,
    spectrum: Spectrum,
    rule: UpdateRule,
    moments: EstimatorMoments,
    limit: Limit | None,
    descent: float | None,
    doubling: tuple[float, float] | None = None,
) -> Verdict:
    """What a step size does within the planned steps.

    Args:
        lr: Step size asked about, param²/loss.
        steps: Planned number of steps N.
        spectrum: All of the operator's spectrum.
        rule: Update rule.
        moments: Constants of the estimator.
        limit: What to compare with; ``None`` where no threshold is known.
        descent: Descent threshold.
        doubling: What ``doubling_steps`` says.
    """
    ends = [time_to_blow_up(spectrum, lr, rule=rule, moments=moments, version=version) for version in VERSIONS]
    blow_up = min(ends), max(ends)
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=None if limit is None else limit.ratio(lr),
        outlook=_outlook(lr, limit, blow_up, steps),
        blow_up=blow_up,
        doubling=doubling,
        descends=None if descent is None or rule.momentum > 0 else lr < descent,  # with momentum not about one step
    )


def _outlook(lr: float, limit: Limit | None, blow_up: Pair, steps: int) -> Outlook:
    if limit is not None:
        return stand(lr, limit)
    first, last = blow_up
    return "unstable" if last <= steps else "uncertain" if first <= steps else "stable"


def judge_batches(lr: float, minibatch: MiniBatchBounds, *, limit: Limit | None, descent: float | None) -> Verdict:
    """What a step size does within the planned steps when every step sees a mini-batch.

    Args:
        lr: Step size asked about, param²/loss.
        minibatch: Thresholds with mini-batches.
        limit: What to compare with; ``None`` where no threshold is known.
        descent: Descent threshold.
    """
    model, steps = minibatch.model, minibatch.horizon.steps
    ends = [model.blow_up(lr, version=version) for version in VERSIONS]
    blow_up = min(ends), max(ends)
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=None if limit is None else limit.ratio(lr),
        outlook=_outlook(lr, limit, blow_up, steps),
        blow_up=blow_up,
        doubling=None,
        descends=None if descent is None or model.rule.momentum > 0 else lr < descent,
    )


def doubling_steps(
    lr: float,
    *,
    steps: int,
    spectrum: Spectrum,
    gradient: GradientMeasure,
    loss: float,
    rule: UpdateRule,
    moments: EstimatorMoments,
) -> tuple[float, float]:
    """When the loss has risen by its own value: in the mean over runs, and in a typical run.

    This is when a blow-up shows. Feedback passes 1 long before where the gradient, which starts the noise, is small.
    The mean counts all eigenvalues and is led by the unluckiest runs; the typical run counts the positive ones only.

    Args:
        lr: Step size, param²/loss.
        steps: Steps to look ahead.
        spectrum: All of the operator's spectrum.
        gradient: Spectral measure of the gradient.
        loss: Loss at the start, not 0.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        The earlier and the later one; ``inf`` for not within ``steps``.
    """
    curve = predicted_loss(spectrum, gradient, loss=loss, lr=lr, steps=steps, rule=rule, moments=moments)
    risen = np.flatnonzero(curve - loss >= abs(loss))
    mean = float(risen[0]) if risen.size else math.inf
    typical = typical_doubling_time(
        spectrum.positive, gradient, loss=loss, lr=lr, steps=steps, rule=rule, moments=moments
    )
    return min(mean, typical), max(mean, typical)
