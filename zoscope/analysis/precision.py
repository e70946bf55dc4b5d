"""How well the wanted thresholds are known: what a measurement is steered by and what a warning is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zoscope.theory.mean_square import StabilityCondition, Version, estimates, thresholds

if TYPE_CHECKING:
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Estimate, SampledSpectrum

Precision = Callable[["SampledSpectrum"], float]

NEARLY_BINDING = 0.8
"""Infinite time counts from here on: above this share of η*(N) the run is long enough to feel its threshold."""


def relative_half_width(estimate: Estimate) -> float:
    """95 % half-width over the value; 0 for a threshold that is known to be infinite."""
    if not math.isfinite(estimate.value):
        return 0.0 if estimate.half_width == 0 else math.inf
    return estimate.half_width / estimate.value if estimate.value > 0 else math.inf


def wanted_precision(
    rules: Sequence[UpdateRule], *, steps: int, moments: EstimatorMoments, always_exact: bool = False
) -> Precision:
    """The error that a measurement should bring down.

    It is the largest relative 95 % half-width among η*(N), full and positive, of the rules that share an operator. The
    infinite-time threshold joins them where it was asked for or where it is at least ``NEARLY_BINDING`` of η*(N).
    Elsewhere it would cost most of the products without changing what binds: its kink at zero curvature, where networks
    keep most eigenvalues, makes quadrature slow.

    Args:
        rules: Update rules on the same operator.
        steps: Planned number of steps N.
        moments: Constants of the estimator.
        always_exact: Whether the infinite-time threshold was asked for.

    Returns:
        A function from a sampled spectrum to the largest relative half-width.
    """
    near: dict[StabilityCondition, float] = {}  # those of the spectrum before: a measurement asks of similar ones

    def worst(sampled: SampledSpectrum) -> float:
        if sampled.is_exact:
            return 0.0
        return max((_of_rule(rule, sampled) for rule in rules), default=0.0)

    def _of_rule(rule: UpdateRule, sampled: SampledSpectrum) -> float:
        versions: tuple[Version, ...] = ("full", "positive")
        planned = [StabilityCondition(rule, moments, steps, version) for version in versions]
        forever = StabilityCondition(rule, moments)
        found = estimates(planned, sampled, near=near)
        near.update(zip(planned, (estimate.value for estimate in found), strict=True))
        (late,) = thresholds([forever], sampled.fine, near=near)
        near[forever] = late
        if always_exact or late >= NEARLY_BINDING * found[1].value:
            found += estimates([forever], sampled)
        return max(map(relative_half_width, found))

    return worst
