"""Second moment of one eigenmode: its transition matrix, its response to noise, and sums of that response over time.

With ``z = ηλ`` the state ``s = (E x², η E xm, η² E m²)`` of a mode obeys ``s ← A(z) s + η² n (1, -1, 1)``, where ``n``
is the variance of the gradient noise in that mode, and everything depends on η and λ through z alone.
``k(τ) = [A^τ (1, -1, 1)]₁`` is what one unit of noise leaves in ``E x²`` after τ further steps.
"""

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.moments import EstimatorMoments

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Steps = int | Counts

NOISE = np.array([1.0, -1.0, 1.0])
"""How gradient noise enters the state of a mode."""

_IDENTITY = np.eye(3)[:, :, None]


def transition(z: Array, *, momentum: float, a: float) -> Array:
    """``A(z)`` for every z: ``(3, 3, n)`` from ``(n,)``.

    Rows: ``m'² = a z² x² + 2βz xm + β² m²`` (with ``E ĝ² = a λ² E x²``), ``xm' = z x² + β xm - m'²``,
    ``x'² = x² - 2(z x² + β xm) + m'²``.
    """
    matrices: Array = _IDENTITY + _change(z, momentum=momentum, a=a)
    return matrices


def _change(z: Array, *, momentum: float, a: float) -> Array:
    """``A(z) - I``, without the cancellation that subtracting would bring to slow modes."""
    beta, one, zero = momentum, np.ones_like(z), np.zeros_like(z)
    mm = np.array([a * z**2, 2 * beta * z, beta**2 * one])
    xm = np.array([z, beta * one, zero])
    change: Array = np.array([mm - 2 * xm, xm - mm, mm]) - _IDENTITY * np.array([0.0, 1.0, 1.0])[:, None, None]
    return change


def infinite_feedback(z: Array, *, momentum: float, moments: EstimatorMoments) -> Array:
    """``φ = b z² Σ_{τ≥0} k(τ) = b(1+β) z / (2(1-β²) - c z)``, ``(n,)``, for ``z ≥ 0``; ``inf`` from the pole on."""
    result = np.full_like(z, np.inf)
    gap = _gap(z, momentum=momentum, a=moments.a)
    np.divide(moments.b * (1 + momentum) * z, gap, out=result, where=gap > 0)
    return result


def infinite_response(z: Array, *, momentum: float, a: float) -> Array:
    """``Σ_{τ≥0} k(τ) = (1+β) / (z (2(1-β²) - c z))``, ``(n,)``, for ``z ≥ 0``; ``inf`` at 0 and from the pole on."""
    result = np.full_like(z, np.inf)
    gap = z * _gap(z, momentum=momentum, a=a)
    np.divide(1 + momentum, gap, out=result, where=gap > 0)
    return result


def _gap(z: Array, *, momentum: float, a: float) -> Array:
    own = (1 - momentum) + (1 + momentum) * (a - 1)
    gap: Array = 2 * (1 - momentum**2) - own * z
    return gap


def horizon_feedback(z: Array, steps: Steps, *, momentum: float, moments: EstimatorMoments) -> Array:
    """``φ = b z² Σ_{τ<T} k(τ)`` for any real z; ``inf`` where it overflows. Shape of z; ``steps`` may differ by row."""
    # An unstable mode overflows on a long horizon: that is infinite feedback, and so is the inf - inf that may follow.
    with np.errstate(over="ignore", invalid="ignore"):
        feedback = moments.b * z**2 * _horizon_sum(z, steps, momentum=momentum, a=moments.a)
    return np.where(np.isnan(feedback), np.inf, feedback)


def horizon_response(z: Array, steps: Steps, *, momentum: float, a: float) -> Array:
    """``Σ_{τ<T} k(τ)`` for any real z; ``inf`` where it overflows. Shape of z; ``steps`` may differ by row."""
    with np.errstate(over="ignore", invalid="ignore"):
        response = _horizon_sum(z, steps, momentum=momentum, a=a)
    return np.where(np.isnan(response), np.inf, response)


def _horizon_sum(z: Array, steps: Steps, *, momentum: float, a: float) -> Array:
    if momentum == 0:
        return geometric_sum(z * (a * z - 2), steps)
    flat = _response_sum(_change(z.ravel(), momentum=momentum, a=a), np.broadcast_to(steps, z.shape).ravel())
    return flat.reshape(z.shape)


def geometric_sum(excess: Array, steps: Steps) -> Array:
    """``Σ_{τ<T} r^τ`` for ``r = 1 + excess``, to full precision as r → 1. Shape of ``excess``."""
    near, count = np.abs(excess) < 0.5, np.asarray(steps, dtype=np.float64)
    grown = np.expm1(count * np.log1p(excess, out=np.zeros_like(excess), where=near))
    grown = np.where(near, grown, np.power(1 + excess, count) - 1)
    return np.divide(grown, excess, out=np.broadcast_to(count, excess.shape).copy(), where=excess != 0)


def _response_sum(change: Array, steps: Counts) -> Array:
    """``Σ_{τ<T} [A^τ (1, -1, 1)]₁`` by repeated squaring, ``(n,)`` from ``A - I``, ``(3, 3, n)``, and T, ``(n,)``.

    Carries ``E = A^m - I`` instead of ``A^m``: a slow mode is a small column of E, which keeps its relative precision
    however long the horizon.
    """
    result, places = np.empty(steps.size), np.arange(steps.size)
    partial = np.broadcast_to(NOISE[:, None], change.shape[1:])  # Σ_{τ<m} A^τ w at m = 1, 2, 4, …
    total = np.zeros_like(partial)
    while steps.size:
        odd = steps & 1 == 1
        if odd.any():
            longer = partial + total + _apply(change, total)
            total = longer if odd.all() else np.where(odd, longer, total)
        steps = steps >> 1
        ended = steps == 0
        if ended.any():
            result[places[ended]] = total[0, ended]
            going = ~ended
            places, steps, total, partial = places[going], steps[going], total[:, going], partial[:, going]
            change = change[:, :, going]
        if steps.size:
            doubler = change + 2 * _IDENTITY  # A^2m - I = E(2I + E), and I + A^m = 2I + E
            partial, change = _apply(doubler, partial), _multiply(change, doubler)
    return result


def _apply(matrices: Array, vectors: Array) -> Array:
    result: Array = matrices[:, 0] * vectors[0] + matrices[:, 1] * vectors[1] + matrices[:, 2] * vectors[2]
    return result


def _multiply(left: Array, right: Array) -> Array:
    return left[:, 0, None] * right[None, 0] + left[:, 1, None] * right[None, 1] + left[:, 2, None] * right[None, 2]
