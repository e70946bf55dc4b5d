"""From a measured operator to the row of an optimizer: every threshold, what binds, what is recommended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoscope.analysis.advisor import Advisor
from zoscope.analysis.optimizer_bounds import Horizon, OptimizerBounds, Pair, Verdict, ci95
from zoscope.analysis.verdicts import doubling_steps, judge, judge_batches
from zoscope.theory.curve import GradientMeasure, best_lr
from zoscope.theory.horizons import horizon_curve
from zoscope.theory.intervals import OfMoments, interval_ci95
from zoscope.theory.mean_square import StabilityCondition
from zoscope.theory.thresholds import fo_threshold, paper_bounds, tight_bounds

if TYPE_CHECKING:
    from zoscope.analysis.minibatch import BatchSpread
    from zoscope.analysis.minibatch_results import MiniBatchBounds
    from zoscope.analysis.recommend import Limit, Threshold
    from zoscope.curvature.results import Curvature
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Estimate

HORIZONS = (30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""Numbers of steps of the printed curve η*(T)."""

LONGEST_LOOK = 5_000
"""Steps up to which the loss at a step size asked about is followed."""


@dataclass(frozen=True)
class Measured:
    """One operator, measured, and the gradient seen through it.

    Args:
        operator: Its key in the result.
        curvature: What the measurement found.
        gradient: Spectral measure of the gradient in the operator's coordinates; ``None`` for a zero gradient.
        commutator: Of a preconditioner with the Hessian.
        batches: How mini-batches spread around it, where a batch size was asked for.
    """

    operator: str
    curvature: Curvature
    gradient: GradientMeasure | None
    commutator: Estimate | None = None
    batches: BatchSpread | None = None


@dataclass(frozen=True)
class Question:
    """What the user wants to know of every optimizer.

    Args:
        steps: Planned number of steps N.
        threshold: Which threshold counts.
        lr: Step size to judge.
        loss: Loss where the curvature was measured.
        moments: Constants of the estimator.
        doubts: Codes of what speaks against the point, whatever the optimizer: ``kinks``, ``little-curvature``.
    """

    steps: int
    threshold: Threshold
    lr: float | None
    loss: float
    moments: EstimatorMoments
    doubts: tuple[str, ...] = ()


def optimizer_row(
    measured: Measured, question: Question, *, rule: UpdateRule, settings: Mapping[str, Any], descent: Estimate | None
) -> OptimizerBounds:
    """All bounds of one update rule.

    Args:
        measured: The operator that the rule acts through.
        question: What is asked.
        rule: Update rule.
        settings: What identifies the rule in the result.
        descent: Its descent threshold; ``None`` for a zero gradient.
    """
    curvature, moments = measured.curvature, question.moments
    largest, positive = curvature.lambda_max.value, curvature.spectrum.fine.positive
    paper = paper_bounds(curvature.trace.value, largest, rule=rule, moments=moments)
    tight = tight_bounds(positive.trace, positive.frobenius_sq, max(largest, 0.0), rule=rule, moments=moments)
    falling = None if descent is None else descent.value
    exact = StabilityCondition(rule, moments).estimate(curvature.spectrum)
    horizon = _horizon(curvature, question, rule=rule)
    minibatch = None
    if measured.batches is not None:
        minibatch = measured.batches.bounds(curvature.spectrum, steps=question.steps, rule=rule, moments=moments)
    advisor = Advisor(
        rule=rule,
        moments=moments,
        spectrum=curvature.spectrum,
        gradient=measured.gradient,
        loss=question.loss,
        # Training meets the thresholds of mini-batches where it uses them.
        descent=descent if minibatch is None else minibatch.descent,
        exact=exact if minibatch is None else minibatch.exact,
        batches=None if minibatch is None else minibatch.model,
        doubts=question.doubts,
        points=horizon.curve if minibatch is None else (minibatch.horizon,),
    )
    advice = advisor.at(question.steps, question.threshold)
    return OptimizerBounds(
        name=rule.name,
        rule=rule,
        operator=measured.operator,
        settings=settings,
        fo=fo_threshold(largest, rule=rule),
        zo_lower=paper.lower,
        zo_upper=paper.upper,
        lower_tight=tight.lower,
        upper_tight=tight.upper,
        exact=exact,
        horizon=horizon,
        descent=falling,
        binding=advice.binding,
        recommended=advice.recommended,
        recommended_reason=advice.reason,
        predicted_lr=None if advice.doubts else _predicted_lr(measured, question, rule=rule, upper=horizon.upper),
        commutator=measured.commutator,
        verdict=_verdict(measured, question, advisor, limit=advice.limit, minibatch=minibatch),
        minibatch=minibatch,
        zo_ci95=_interval_ci95(curvature, lambda p1, _, top: paper_bounds(p1, top, rule=rule, moments=moments)),
        tight_ci95=_interval_ci95(
            curvature, lambda p1, p2, top: tight_bounds(p1, p2, top, rule=rule, moments=moments), positive=True
        ),
        descent_ci95=None if descent is None else ci95(descent),
        limit=advice.limit,
        doubts=advice.doubts,
        advisor=advisor,
    )


def _interval_ci95(curvature: Curvature, bounds: OfMoments, *, positive: bool = False) -> Pair:
    largest = curvature.lambda_max
    top = max(largest.value, 0.0) if positive else largest.value
    return interval_ci95(bounds, curvature.spectrum, largest=top, residual=largest.residual, positive=positive)


def _verdict(
    measured: Measured, question: Question, advisor: Advisor, *, limit: Limit | None, minibatch: MiniBatchBounds | None
) -> Verdict | None:
    if question.lr is None:
        return None
    spectrum, rule, doubling = measured.curvature.spectrum.fine, advisor.rule, None
    descent = None if advisor.descent is None else advisor.descent.value
    if minibatch is not None:
        return judge_batches(question.lr, minibatch, limit=limit, descent=descent)
    if measured.gradient is not None and question.loss != 0:
        doubling = doubling_steps(
            question.lr,
            steps=min(question.steps, LONGEST_LOOK),
            spectrum=spectrum,
            gradient=measured.gradient,
            loss=question.loss,
            rule=rule,
            moments=question.moments,
        )
        if question.steps > LONGEST_LOOK and math.isinf(doubling[1]):
            doubling = None  # it may still come
    return judge(
        question.lr,
        steps=question.steps,
        spectrum=spectrum,
        rule=rule,
        moments=question.moments,
        limit=limit,
        descent=descent,
        doubling=doubling,
    )


def _horizon(curvature: Curvature, question: Question, *, rule: UpdateRule) -> Horizon:
    steps = sorted({*HORIZONS, question.steps})
    curve = horizon_curve(curvature.spectrum, steps, rule=rule, moments=question.moments)
    planned = next(point for point in curve if point.steps == question.steps)
    return Horizon(
        steps=question.steps,
        lower=planned.lower.value,
        upper=planned.upper.value,
        ci95=(ci95(planned.lower)[0], ci95(planned.upper)[1]),
        curve=curve,
    )


def _predicted_lr(measured: Measured, question: Question, *, rule: UpdateRule, upper: float) -> float | None:
    """Step size with the lowest predicted loss after N steps, on the positive part.

    Negative curvature is left out: over a whole run the quadratic model would promise a loss without lower bound.
    ``None`` where the loss still falls at the largest step size that is stable: then there is no lowest point to name.
    """
    if measured.gradient is None or not math.isfinite(upper) or measured.batches is not None:
        return None  # the noise of mini-batches is not in the predicted loss
    best = best_lr(
        measured.curvature.spectrum.fine.positive,
        measured.gradient,
        loss=question.loss,
        steps=question.steps,
        rule=rule,
        moments=question.moments,
        upper=upper,
    )
    return None if best is None or best >= 0.99 * upper else best
