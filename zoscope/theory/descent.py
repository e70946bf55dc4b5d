"""Descent thresholds: step sizes at which the expected loss goes down, away from a minimum."""

import math

from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule, update_rule
from zoscope.theory.validate import require_finite, require_non_negative

PLAIN = update_rule("gd")


def descent_threshold(
    trace: float, rayleigh: float, *, moments: EstimatorMoments = GAUSSIAN, rule: UpdateRule = PLAIN
) -> float:
    """Step size below which the expected loss falls: ``2 / (b Tr H + a r_g)`` without momentum.

    That is exact for one step of the quadratic model, whatever the sign of H:
    ``E f(x⁺) - f = -η‖g‖² + ½η²(a gᵀHg + b Tr(H) ‖g‖²)``. Momentum makes it a statement about the steps after the
    average has filled: modes slow against ``1/(1-β)`` steps move, and diffuse, as if by ``η̃ = η s/(1-β)`` (s = 1, or
    1-β for an average with unit gain), while the deterministic part is stable up to ``η̃ r_g = 2(1+β)/(1-β)``:
    ``η̃ = 2 / (b Tr H + (a - 1 + (1-β)/(1+β)) r_g)``. It joins the first-order threshold, ``a = 1`` and ``b = 0``,
    to that of noise in slow modes.

    Args:
        trace: ``Tr H``, signed, loss/param².
        rayleigh: ``r_g = gᵀHg/‖g‖²``, signed, loss/param².
        moments: Constants of the estimator.
        rule: Update rule; its preconditioner, if any, is taken as done.

    Returns:
        Threshold in param²/loss; ``inf`` when the denominator is not positive.

    Raises:
        ValueError: If an argument is not finite.

    Source: derived in the README's theory section.
    """
    require_finite("trace", trace)
    require_finite("rayleigh", rayleigh)
    denominator = moments.b * trace + along_gradient(moments, rule) * rayleigh
    return 2 * (1 - rule.momentum) / (rule.lr_scale * denominator) if denominator > 0 else math.inf


def along_gradient(moments: EstimatorMoments, rule: UpdateRule) -> float:
    """Weight of the curvature along the gradient: noise, and the deterministic path under momentum."""
    return moments.a - 1 + (1 - rule.momentum) / (1 + rule.momentum)


def descent_threshold_adam(
    *,
    gPg: float,
    gPHPg: float,
    trace_php: float,
    grad_sq: float,
    noise_curvature: float = 0.0,
    noise_sq: float = 0.0,
    moments: EstimatorMoments = GAUSSIAN,
    rule: UpdateRule = PLAIN,
) -> float:
    """Adam's descent threshold with frozen P: ``2 gᵀP⁻¹g / (a gᵀP⁻¹HP⁻¹g + b Tr(P⁻¹HP⁻¹) ‖g‖²)``.

    Exact for one step without momentum, which changes it as in :func:`descent_threshold`. With mini-batches the
    gradient is ``g_B``: ``E g_BᵀP⁻¹HP⁻¹g_B`` and ``E‖g_B‖²`` take the place of what they are for g. ``P = I`` is
    gradient descent.

    Args:
        gPg: ``gᵀP⁻¹g``.
        gPHPg: ``gᵀP⁻¹HP⁻¹g``.
        trace_php: ``Tr P⁻¹HP⁻¹``.
        grad_sq: ``‖g‖²``.
        noise_curvature: ``E (g_B-g)ᵀP⁻¹HP⁻¹(g_B-g)`` of mini-batches.
        noise_sq: ``E‖g_B-g‖²`` of mini-batches.
        moments: Constants of the estimator.
        rule: Adam's update rule.

    Returns:
        Threshold on Adam's learning rate (parameter units, P having the unit of a gradient); ``inf`` when the
        denominator is not positive, 0 when the gradient is zero and the denominator is not.

    Raises:
        ValueError: If an argument is not finite, or ``gPg`` or ``grad_sq`` is negative.

    Source: derived in the README's theory section.
    """
    require_non_negative("gPg", gPg)
    require_finite("gPHPg", gPHPg)
    require_finite("trace_php", trace_php)
    require_non_negative("grad_sq", grad_sq)
    require_finite("noise_curvature", noise_curvature)
    require_non_negative("noise_sq", noise_sq)
    denominator = along_gradient(moments, rule) * gPHPg + moments.b * trace_php * (grad_sq + noise_sq)
    denominator += moments.a * noise_curvature
    return 2 * gPg * (1 - rule.momentum) / (rule.lr_scale * denominator) if denominator > 0 else math.inf
