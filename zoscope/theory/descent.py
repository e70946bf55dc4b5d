"""Descent thresholds: step sizes at which the expected loss goes down, away from a minimum."""

import math

from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.validate import require_finite, require_non_negative


def descent_threshold(
    trace: float, rayleigh: float, *, moments: EstimatorMoments = GAUSSIAN, momentum: float = 0.0
) -> float:
    """Step size below which the expected loss falls: ``2(1-β) / (b Tr H + a r_g)``.

    Without momentum this is exact for one step of the quadratic model, whatever the sign of H:
    ``E f(x⁺) - f = -η‖g‖² + ½η²(a gᵀHg + b Tr(H) ‖g‖²)``. With momentum, modes slow against the ``1/(1-β)`` steps of
    the average move as if by steps of ``η/(1-β)``, and the threshold shrinks by that factor.

    Args:
        trace: ``Tr H``, signed, loss/param².
        rayleigh: ``r_g = gᵀHg/‖g‖²``, signed, loss/param².
        moments: Constants of the estimator.
        momentum: Heavy-ball β in ``[0, 1)``.

    Returns:
        Threshold in param²/loss; ``inf`` when the denominator is not positive.

    Raises:
        ValueError: If an argument is not finite or β is outside ``[0, 1)``.

    Source: derived in the README's theory section.
    """
    require_finite("trace", trace)
    require_finite("rayleigh", rayleigh)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    denominator = moments.b * trace + moments.a * rayleigh
    return 2 * (1 - momentum) / denominator if denominator > 0 else math.inf


def descent_threshold_adam(
    *, gPg: float, gPHPg: float, trace_php: float, grad_sq: float, moments: EstimatorMoments = GAUSSIAN
) -> float:
    """Adam's descent threshold with frozen P: ``2 gᵀP⁻¹g / (a gᵀP⁻¹HP⁻¹g + b Tr(P⁻¹HP⁻¹) ‖g‖²)``.

    Exact for one step without momentum. Adam's ``m ← β₁m + (1-β₁)g`` averages with unit gain, so that β₁ does not
    change the threshold of slow modes.

    Args:
        gPg: ``gᵀP⁻¹g``.
        gPHPg: ``gᵀP⁻¹HP⁻¹g``.
        trace_php: ``Tr P⁻¹HP⁻¹``.
        grad_sq: ``‖g‖²``.
        moments: Constants of the estimator.

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
    denominator = moments.a * gPHPg + moments.b * trace_php * grad_sq
    return 2 * gPg / denominator if denominator > 0 else math.inf
