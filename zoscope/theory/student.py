"""Student's factor, by which an error bar from few samples is widened."""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

NORMAL = 1.959963984540054
"""Half-width of the 95 % interval of a normal law, in standard deviations."""


def widening(freedom: float) -> float:
    """How much wider the 95 % interval of a t law is than that of a normal law, over its scale.

    The t law is ``tan θ √ν`` with a density of ``θ`` proportional to ``cos^(ν-1) θ``, which Gauss's rule integrates to
    rounding; Newton's method from below finds the quantile, as the distribution function is concave there.
    (``scipy.special`` has it too, and takes longer to import than the measurement of a small problem.)

    Args:
        freedom: Degrees of freedom ν ≥ 1, not necessarily whole; ``inf`` for a normal law.

    Returns:
        The 97.5 % quantile of Student's t law over that of the normal law; 1 for ``ν = inf``.

    Raises:
        ValueError: If ``freedom`` is below 1 or NaN.
    """
    if not freedom >= 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    if freedom > 1e6:
        return 1.0
    nodes, weights = _gauss_rule()
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    theta = math.atan(NORMAL / math.sqrt(freedom))
    for _ in range(50):
        inside = 0.5 * theta * float(weights @ np.cos(0.5 * theta * (nodes + 1)) ** (freedom - 1))
        step = (0.475 - scale * inside) / (scale * math.cos(theta) ** (freedom - 1))
        theta += step
        if abs(step) < 1e-14:
            break
    return math.sqrt(freedom) * math.tan(theta) / NORMAL


@cache
def _gauss_rule() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss's rule on [-1, 1]; computing it takes far longer than using it."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    return nodes, weights
