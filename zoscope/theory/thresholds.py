"""Closed-form step-size thresholds from one to three moments of the spectrum."""

import math
from dataclasses import dataclass

from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.validate import require_count, require_finite, require_non_negative


@dataclass(frozen=True)
class Interval:
    """A closed interval of step sizes, param²/loss; an end may be ``inf``."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Gains:
    """The three numbers of ``Σ_i noise·ηλ_i / (damping - own·ηλ_i) = 1``, the equation of the exact threshold.

    Args:
        noise: ``b(1+β)``.
        own: ``c = (1-β) + (1+β)(a-1)``; negative only for sphere directions in one dimension.
        damping: ``2(1-β²)/lr_scale``, so that η is the user's learning rate.
    """

    noise: float
    own: float
    damping: float

    @classmethod
    def of(cls, rule: UpdateRule, moments: EstimatorMoments) -> "Gains":
        """Gains of an update rule under an estimator."""
        beta = rule.momentum
        return cls(
            noise=moments.b * (1 + beta),
            own=(1 - beta) + (1 + beta) * (moments.a - 1),
            damping=2 * (1 - beta**2) / rule.lr_scale,
        )


def fo_threshold(lambda_max: float, *, rule: UpdateRule) -> float:
    """Largest step size at which the first-order method is stable: ``2(1+β) / (lr_scale·λ_max)``.

    Args:
        lambda_max: Largest eigenvalue of M, loss/param² for a Hessian.
        rule: Update rule.

    Returns:
        Threshold in param²/loss; ``inf`` when ``lambda_max <= 0``.

    Raises:
        ValueError: If ``lambda_max`` is not finite.

    Source: arXiv:2103.00065; for Adam arXiv:2207.14484.
    """
    require_finite("lambda_max", lambda_max)
    return _ratio(2 * (1 + rule.momentum) / rule.lr_scale, lambda_max)


def paper_bounds(
    trace: float, lambda_max: float, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> Interval:
    """The paper's interval ``A/(Tr M + c' λ_max) ≤ η* ≤ A/Tr M``, for any (a, b).

    ``A = 2(1-β)/b`` and ``c' = c/(b(1+β))``. With Gaussian directions and one query these are the paper's
    ``c₂/(Tr M + a λ_max)`` and ``c₂/Tr M``. It assumes ``M ⪰ 0``.

    Args:
        trace: ``Tr M``.
        lambda_max: Largest eigenvalue of M.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Interval in param²/loss; an end is ``inf`` where its denominator is not positive.

    Raises:
        ValueError: If an argument is not finite.

    Source: arXiv:2604.14669; other (a, b) derived in the README's theory section.
    """
    require_finite("trace", trace)
    require_finite("lambda_max", lambda_max)
    g = Gains.of(rule, moments)
    ends = _ratio(g.damping, g.noise * trace + g.own * lambda_max), _ratio(g.damping, g.noise * trace)
    return Interval(min(ends), max(ends))  # their order turns around when own < 0


def tight_bounds(
    trace: float, frobenius_sq: float, lambda_max: float, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> Interval:
    """Bounds on η* from ``p₁ = Tr M``, ``p₂ = ‖M‖_F²`` and ``λ_max`` of ``M ⪰ 0``; inside the paper's interval.

    The trace-weighted mean of the convex ``x ↦ 1/(A - c'ηx)`` lies above its value at the mean eigenvalue ``p₂/p₁``
    (Jensen), which gives ``η* ≤ A/(p₁ + c' p₂/p₁)``, and below its chord on ``[0, λ_max]``, which gives as lower bound
    the smaller root of ``c'(p₁λ_max - p₂) y² - (p₁ + c'λ_max) y + 1 = 0``, ``y = η/A``.

    Args:
        trace: ``p₁``, of the positive part when M is indefinite.
        frobenius_sq: ``p₂``, of the positive part when M is indefinite.
        lambda_max: Largest eigenvalue of M, or anything above it.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Interval in param²/loss; ``inf`` at both ends when ``trace <= 0``.

    Raises:
        ValueError: If an argument is not finite or ``frobenius_sq`` is negative.

    Source: derived in the README's theory section.
    """
    require_finite("trace", trace)
    require_non_negative("frobenius_sq", frobenius_sq)
    require_finite("lambda_max", lambda_max)
    if trace <= 0:
        return Interval(math.inf, math.inf)
    g = Gains.of(rule, moments)
    noise, own = g.noise * trace, g.own * lambda_max
    root = math.sqrt(max((noise - own) ** 2 + 4 * g.own * g.noise * frobenius_sq, 0.0))
    return Interval(
        lower=_ratio(2 * g.damping, noise + own + root),
        upper=_ratio(g.damping, noise + g.own * frobenius_sq / trace),
    )


def forward_only_bounds(
    trace: float, frobenius_sq: float, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> Interval:
    """Bounds on η* from two numbers that forward passes can estimate, ``Tr M`` and ``‖M‖_F²``.

    Lower end: the chord bound of ``tight_bounds`` with ``λ_max ≤ ‖M‖_F``; it needs ``M ⪰ 0``. Upper end:
    ``A / (p₁ + min(c' p₂/p₁, min(c', 1) √p₂))``, which bounds the threshold of the positive part of *any* symmetric M:
    negative eigenvalues of sum ``-n`` leave ``p₁ + n`` and at least ``p₂ - n²`` to the positive part, and the
    two-moment bound of that part is largest at one of the two ends ``n = 0`` and ``n = √p₂``.

    Args:
        trace: ``p₁``, signed.
        frobenius_sq: ``p₂``.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Interval in param²/loss; ``inf`` at both ends when ``trace <= 0``.

    Raises:
        ValueError: If an argument is not finite or ``frobenius_sq`` is negative.

    Source: derived in the README's theory section.
    """
    require_non_negative("frobenius_sq", frobenius_sq)
    norm = math.sqrt(frobenius_sq)
    lower = tight_bounds(trace, frobenius_sq, norm, rule=rule, moments=moments).lower
    if trace <= 0:
        return Interval(math.inf, math.inf)
    g = Gains.of(rule, moments)
    extra = min(g.own * frobenius_sq / trace, min(g.own, g.noise) * norm)
    return Interval(lower, _ratio(g.damping, g.noise * trace + extra))


def forward_only_batches(
    trace: float, frobenius_sq: float, spread_sq: float, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> float:
    """Upper bound on the infinite-time threshold with mini-batches: ``A/(p₁ + s₂/√p₂)``, or that of all examples.

    Noise feeds itself through ``Tr(C H⁻¹)/2`` at least, ``C = E H_B² = H² + E(H_B - H)²``, and
    ``Tr(E(H_B - H)² H⁻¹) ≥ s₂/λ_max`` on the range of H; beyond it noise adds up for ever. ``λ_max ≤ √p₂``.

    Args:
        trace: ``p₁ = Tr H``, signed.
        frobenius_sq: ``p₂ = ‖H‖_F²``.
        spread_sq: ``s₂ = E‖H_B - H‖_F²``.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Threshold in param²/loss; ``inf`` when ``trace <= 0``.

    Raises:
        ValueError: If an argument is not finite, or ``frobenius_sq`` or ``spread_sq`` is negative.

    Source: derived in the README's theory section.
    """
    require_non_negative("spread_sq", spread_sq)
    whole = forward_only_bounds(trace, frobenius_sq, rule=rule, moments=moments).upper
    if trace <= 0 or frobenius_sq == 0:
        return whole
    g = Gains.of(rule, moments)
    return min(whole, _ratio(g.damping, g.noise * (trace + spread_sq / math.sqrt(frobenius_sq))))


def forward_only_horizon(
    squares: float, steps: int, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> float:
    """Lower bound on η*(N), positive ones, with mini-batches: ``(1-β)/√(b N E‖H_B‖_F²)``.

    Noise that is fed in at one step is there for N steps at most, and moves no mode further than a flat one, by
    ``η/(1-β)``. The feedback of N steps is then ``b N Tr(C) η²/(1-β)²`` at most, ``Tr C = E‖H_B‖_F²``. No spectrum is
    needed; modes near ``η λ = 1``, whose own noise makes them grow, are left out.

    Args:
        squares: ``E‖H_B‖_F²``.
        steps: N.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Threshold in param²/loss; ``inf`` without curvature.

    Raises:
        ValueError: If ``squares`` is not finite or negative, or ``steps`` no positive integer.

    Source: derived in the README's theory section.
    """
    require_non_negative("squares", squares)
    require_count("steps", steps)
    return _ratio((1 - rule.momentum) / rule.lr_scale, math.sqrt(moments.b * steps * squares))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf
