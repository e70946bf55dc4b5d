"""The predicted loss after many steps at once: the recursion of ``predicted_loss`` solved by its z-transform.

With ``û(ρ) = Σ_t u_t ρ^(-t-1)`` every sequence of that recursion is a rational function of ρ. Noise of variance n in a
mode leaves ``η² k̂ n̂`` in ``E x²``, ``k̂ = ρ(ρ+β)/χ(ρ)`` (see ``growth_rate``); the squared mean gradient along a node
starts at its weight and follows ``γ̂²``; so with ``F = Σ w b z² k̂``, ``Ĝ = Σ c γ̂²``, ``R̂ = Σ (a-1) c z² k̂ γ̂²``

    Ĝ + Ŝ = (Ĝ + R̂) / (1 - F),      2 × noise loss = η² [ b Σ w θ k̂ · (Ĝ + Ŝ) + Σ (a-1) c θ k̂ γ̂² ].

Its value at step N is a contour integral, for which some twenty points on Talbot's contour suffice whatever N is.
"""

import math

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.growth import excess_rate
from zoscope.theory.moments import EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.spectrum import Spectrum

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

POINTS = 24
"""Points on the contour; its error is about 3.9^-24 = 1e-14, and half of them follow from symmetry."""

NEAR = 1e-3
"""How near to the fastest growth the contour is put, in units of 1/N: far less than its own distance from there."""

SHORTEST = 200
"""Steps from which the contour, whose height is 20/N, keeps clear of the branch at ±π."""


def is_long(steps: int, *, momentum: float) -> bool:
    """Whether a run is long enough: oscillations that momentum causes, which the contour leaves out, have died out."""
    return steps >= SHORTEST and (momentum == 0 or -steps * math.log(momentum) > 30)


def noise_loss(
    spectrum: Spectrum, theta: Array, c: Array, *, eta: float, beta: float, steps: int, moments: EstimatorMoments
) -> float:
    """Expected loss above that of the mean path after ``steps`` steps.

    Args:
        spectrum: All of M; nodes ``(n,)``.
        theta: ``(k,)`` nodes of the gradient measure.
        c: ``(k,)`` its weights.
        eta: Step along the momentum, param²/loss.
        beta: Momentum.
        steps: Number of steps, for which ``is_long`` holds.
        moments: Constants of the estimator.

    Returns:
        The part of the loss that noise causes, to about 1e-8 relative; ``inf`` when it overflows.

    Source: contour from Weideman, Optimizing Talbot's contours, SIAM J. Numer. Anal. 44 (2006).
    """
    fastest = _fastest_growth(spectrum, theta, eta=eta, beta=beta, moments=moments, xtol=NEAR / steps)
    if fastest * steps > 600:
        return math.inf
    s, ds = _contour(steps + 1, shift=fastest)
    values = _transform(np.expm1(s), spectrum, theta, c, eta, beta, moments)
    return float(2 / POINTS * (values * np.exp(s * (steps + 1)) * ds).imag.sum())


def mean_path(z: Array, *, beta: float, steps: int) -> Array:
    """``y/η`` after ``steps`` steps of ``m ← βm + 1 + zy/η; y ← y - ηm`` from rest. Shape ``(k,)``."""
    one, zero = np.ones_like(z), np.zeros_like(z)
    momentum = np.array([z, beta * one, one])
    step = np.array([np.array([one, zero, zero]) - momentum, momentum, np.array([zero, zero, one])])
    with np.errstate(over="ignore", invalid="ignore"):  # escape along negative curvature overflows on a long run
        return np.asarray(np.linalg.matrix_power(np.moveaxis(step, 2, 0), steps)[:, 0, 2])


def _transform(
    e: Complex, spectrum: Spectrum, theta: Array, c: Array, eta: float, beta: float, moments: EstimatorMoments
) -> Complex:
    """The transform of the noise loss at ``ρ = 1 + e``, ``(p,)`` from ``(p,)``."""
    extra = (moments.a - 1) * c
    k, _ = _mode(e[:, None], eta * spectrum.nodes, beta, moments)
    k_path, square = _mode(e[:, None], eta * theta, beta, moments)
    feedback = k @ (moments.b * spectrum.weights * (eta * spectrum.nodes) ** 2)
    variance = (square @ c + (k_path * square) @ (extra * (eta * theta) ** 2)) / (1 - feedback)
    return (
        0.5
        * eta**2
        * (moments.b * variance * (k @ (spectrum.weights * spectrum.nodes)) + (k_path * square) @ (extra * theta))
    )


def _mode(e: Complex, z: Array, beta: float, moments: EstimatorMoments) -> tuple[Complex, Complex]:
    """``k̂`` and ``γ̂²`` at ``ρ = 1 + e``, each ``(p, n)`` from ``(p, 1)`` and ``(n,)``."""
    rho, drift = 1 + e, z * (2 * (1 + beta) - z)
    silent = (1 - beta + e) * (drift + (drift + 1 - beta**2) * e + e**2)  # χ without the noise of the mode itself
    k = rho * (rho + beta) / (silent - (moments.a - 1) * z**2 * rho * (rho + beta))
    square = ((1 - beta) ** 2 * (1 + beta) + 2 * beta * z * rho + (2 - beta - beta**2) * e + e**2) / silent
    return k, square


def _contour(time: float, *, shift: float) -> tuple[Complex, Complex]:
    """Upper half of Talbot's contour around ``s ≤ shift`` for ``exp(s·time)``: points and derivative, each ``(p,)``."""
    angle = (2 * np.arange(POINTS // 2) + 1) * np.pi / POINTS
    cot = 1 / np.tan(0.6407 * angle)
    scale = POINTS / time
    points = np.asarray(shift + scale * (0.5017 * angle * cot - 0.6122 + 0.2645j * angle), dtype=np.complex128)
    slopes = np.asarray(scale * (0.5017 * (cot - 0.6407 * angle * (1 + cot**2)) + 0.2645j), dtype=np.complex128)
    return points, slopes


def _fastest_growth(
    spectrum: Spectrum, theta: Array, *, eta: float, beta: float, moments: EstimatorMoments, xtol: float
) -> float:
    """Logarithm of the largest rate in the recursion, at least 0; the path's nodes count by their own growth alone."""
    nodes = np.concatenate([spectrum.nodes, theta])
    weights = np.concatenate([spectrum.weights, np.full_like(theta, np.finfo(np.float64).tiny)])
    whole, rule = Spectrum(nodes, weights), UpdateRule("", beta)
    return math.log1p(excess_rate(whole, eta, rule=rule, moments=moments, least=0.0, xtol=xtol))
