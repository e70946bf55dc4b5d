"""Second moments of eigenmodes that feed one another: their response to noise, and its sum over time.

As in ``modes``, with the signal ``a z² E x²`` of a mode replaced by ``a Σ_j G_ij E x_j²``: what a random Hessian
carries from mode to mode. Every mode receives one unit of noise.
"""

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.modes import NOISE, geometric_sum

Array = NDArray[np.float64]


def coupled_response(z: Array, gains: Array, steps: int | None, *, momentum: float, a: float) -> Array:
    """``Σ_{τ<T} [A^τ w]`` in ``E x²``, ``(q,)``, where w is one unit of noise in every mode.

    Args:
        z: ``(q,)`` ``ηλ`` of the modes.
        gains: ``(q, q)`` symmetric ``G = η² M``, non-negative; ``diag(z²)`` leaves the modes alone.
        steps: T; ``None`` for infinite time.
        momentum: Heavy-ball β.
        a: Weight of the signal in the estimate.

    Returns:
        Dimensionless; ``inf`` where the modes are unstable by themselves (infinite time) or the sum overflows.
    """
    if not z.size:
        return np.empty(0)
    with np.errstate(over="ignore", invalid="ignore"):  # an unstable mode overflows on a long horizon
        if momentum == 0:
            total = _plain(z, gains, steps, a=a)
        else:
            change = _change(z, gains, momentum=momentum, a=a)
            noise = np.repeat(NOISE, z.size)
            total = (_resolvent(change, noise) if steps is None else _summed(change, noise, steps))[: z.size]
    return np.where(np.isfinite(total), total, np.inf)


def _plain(z: Array, gains: Array, steps: int | None, *, a: float) -> Array:
    """Without momentum ``A = I - 2 diag z + aG`` is symmetric."""
    matrix = a * gains - 2 * np.diag(z)
    if not np.isfinite(matrix).all():
        return np.full(z.size, np.inf)
    excess, vectors = np.linalg.eigh(matrix)
    if steps is not None:
        sums = geometric_sum(excess, steps)
    elif excess[-1] >= 0 or excess[0] <= -2:
        return np.full(z.size, np.inf)
    else:
        sums = -1 / excess
    total: Array = vectors @ (sums * vectors.sum(axis=0))
    return total


def _change(z: Array, gains: Array, *, momentum: float, a: float) -> Array:
    """``A - I`` of all modes, ``(3q, 3q)``, in blocks ``E x², η E xm, η² E m²``."""
    eye, zero, path = np.eye(z.size), np.zeros((z.size, z.size)), np.diag(z)
    mm = np.hstack([a * gains, 2 * momentum * path, momentum**2 * eye])
    xm = np.hstack([path, momentum * eye, zero])
    change: Array = np.vstack([mm - 2 * xm, xm - mm, mm])
    change[z.size :, z.size :] -= np.eye(2 * z.size)
    return change


def _resolvent(change: Array, noise: Array) -> Array:
    if not np.isfinite(change).all() or np.abs(1 + np.linalg.eigvals(change)).max() >= 1:
        return np.full_like(noise, np.inf)
    return np.asarray(np.linalg.solve(-change, noise), dtype=np.float64)


def _summed(change: Array, noise: Array, steps: int) -> Array:
    """``Σ_{τ<T} A^τ w`` by repeated squaring of ``A - I``, which keeps slow modes to their relative precision."""
    partial, total = noise, np.zeros_like(noise)
    while True:
        if steps & 1:
            total = partial + total + change @ total
        steps >>= 1
        if not steps or not np.isfinite(change).all():
            return total if not steps else np.full_like(noise, np.inf)
        partial = 2 * partial + change @ partial
        change = 2 * change + change @ change
