"""Growth rate of the second moment at a step size, and how long a blow-up takes to show."""

import math

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.scalar import root
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.validate import require_positive

Array = NDArray[np.float64]


def growth_rate(spectrum: Spectrum, lr: float, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN) -> float:
    """Spectral radius ρ of the second-moment operator: ``E‖x_t‖²`` grows like ``ρ^t``.

    The largest ρ with ``Σ_i λ_i² [(ρI - A_i)⁻¹ w]₁ = 1``, and at least the radius of every mode by itself. In closed
    form, with ``z = ηλ`` and ``D = z(2(1+β) - z)``,

        η² b⁻¹ [(ρI - A)⁻¹ w]₁ = ρ(ρ+β) / χ(ρ),
        χ(1+e) = (1-β+e)(D + (D+1-β²)e + e²) - (a-1) z² (1+e)(1+e+β).

    Args:
        spectrum: Nodes ``(n,)`` in loss/param², of any sign, weights ``(n,)``.
        lr: Step size in param²/loss.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        ρ per step, dimensionless, to about 1e-12; 1 for a zero spectrum; ``inf`` where ``ηλ`` passes 1e50.

    Raises:
        ValueError: If ``lr`` is not positive.

    Source: derived in the README's theory section.
    """
    return 1.0 + excess_rate(spectrum, lr, rule=rule, moments=moments)


def steps_to_grow(
    spectrum: Spectrum, lr: float, factor: float, *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> float:
    """Steps in which ``E‖x‖²`` grows by ``factor``: ``ln F / ln ρ``.

    Args:
        spectrum: Nodes ``(n,)`` in loss/param², of any sign, weights ``(n,)``.
        lr: Step size in param²/loss.
        factor: Growth factor F > 1.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Number of steps, not rounded; ``inf`` when ``ρ ≤ 1``.

    Raises:
        ValueError: If ``lr`` is not positive or ``factor`` is not above 1.

    Source: derived in the README's theory section.
    """
    if not (math.isfinite(factor) and factor > 1):
        raise ValueError(f"factor must be finite and > 1, got {factor!r}")
    excess = excess_rate(spectrum, lr, rule=rule, moments=moments, least=0.0)
    return math.log(factor) / math.log1p(excess) if excess > 0 else math.inf


def excess_rate(
    spectrum: Spectrum,
    lr: float,
    *,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    least: float = -1.0,
    xtol: float = 0.0,
) -> float:
    """``ρ - 1``, to relative precision when positive.

    Args:
        spectrum: As in ``growth_rate``.
        lr: Step size in param²/loss.
        rule: Update rule.
        moments: Constants of the estimator.
        least: Value for everything below it: that a run does not grow is known long before how fast it decays.
        xtol: Absolute error allowed.

    Raises:
        ValueError: If ``lr`` is not positive.
    """
    require_positive("lr", lr)
    counted = spectrum.weights != 0
    nodes, weights = spectrum.nodes[counted], spectrum.weights[counted]
    moving = nodes != 0
    flat = -1.0 if moving.any() and moving.all() else 0.0  # a flat direction neither grows nor decays: its ρ is 1
    if not moving.any():
        return flat
    z, weights = rule.lr_scale * lr * nodes[moving], weights[moving]
    if np.abs(z).max() > 1e50:
        return math.inf

    def margin(excess: float) -> float:
        """Inverse feedback at ρ less 1: negative below the growth rate, positive above."""
        return _inverse_feedback(excess, z, weights, rule.momentum, moments) - 1

    if margin(0.0) > 0:
        return max(flat, least, root(margin, -1.0, 0.0, xtol=max(xtol, 1e-15)) if least < 0 else least)
    low, high = 0.0, 1e-3  # most growth is slow
    while margin(high) <= 0:
        low, high = high, 8 * high
    return max(flat, least, root(margin, low, high, xtol=max(xtol, 1e-300)))


def _inverse_feedback(excess: float, z: Array, weights: Array, beta: float, moments: EstimatorMoments) -> float:
    """``1 / Σ_i w_i b z_i² ρ(ρ+β)/χ_i(ρ)``, at most 2; 0 when ρ does not exceed the radius of every single mode.

    A mode's largest root is real, because its response to noise is never negative; ρ lies above it exactly when χ
    and its derivatives are positive at ρ.
    """
    rho, noise = 1 + excess, (moments.a - 1) * z**2
    linear, drift = 1 - beta + excess, z * (2 * (1 + beta) - z)
    quadratic = drift + (drift + 1 - beta**2) * excess + excess**2
    quadratic_slope = drift + 1 - beta**2 + 2 * excess
    chi = linear * quadratic - noise * rho * (rho + beta)
    slope = quadratic + linear * quadratic_slope - noise * (2 * rho + beta)
    bend = 2 * quadratic_slope + 2 * linear - 2 * noise
    if chi.min() <= 0 or slope.min() <= 0 or bend.min() <= 0:
        return 0.0
    feedback = float(weights @ (moments.b * z**2 * rho * (rho + beta) / chi))
    return min(1 / feedback, 2.0) if feedback > 0 else 2.0
