"""What a sample says about the mean and the variance behind it, when its law is a weighted sum of chi-squares.

``X = uᵀHu`` with Gaussian u is ``Σ λ_i z_i²``: mean ``Tr H``, variance ``2‖H‖_F²``, excess kurtosis at most 12, and
skewed where few eigenvalues carry the sum. Error bars of normal samples would be too short.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import widening

MOST_KURTOSIS = 12.0
"""Of a single squared Gaussian, the most skewed member of the family."""

NORMAL_95 = 1.96


def mean_of(values: ArrayLike) -> Estimate:
    """Mean of a sample ``(n,)``, its standard error widened so that 1.96 of them make a 95 % interval.

    Student's quantile takes as many degrees of freedom as the sample variance really has.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.inf)
    stderr = float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(float(x.mean()), stderr * _student(_freedom(x)))


def variance_of(values: ArrayLike) -> Estimate:
    """Unbiased variance of a sample ``(n,)``; its standard error covers the longer, upper arm of the interval."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(0.0, math.inf)
    variance, freedom = float(x.var(ddof=1)), _freedom(x)
    from scipy.special import chdtri  # slow to import, and needed for forward passes alone

    arm = freedom / float(chdtri(freedom, 0.975)) - 1
    return Estimate(variance, variance * arm / NORMAL_95)


def ratio_of(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Ratio of the means of two samples ``(n,)`` taken together; its standard error covers the longer arm.

    Few samples of a skewed law mostly miss its tail, and show too little scatter then. Johnson's correction for that
    (J. Am. Stat. Assoc. 73, 536, 1978) moves the interval by ``γ(1 + 2t²)s/6n``, towards the tail.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if len(a) < 2 or b.mean() <= 0:
        return Estimate(0.0, math.inf)
    ratio = float(a.mean() / b.mean())
    rest = a - ratio * b
    stderr = float(rest.std(ddof=1)) / (math.sqrt(len(a)) * float(b.mean()))
    t = NORMAL_95 * _student(len(a) - 1)
    arm = t + _skewness(rest) * (1 + 2 * t**2) / (6 * math.sqrt(len(a)))
    return Estimate(ratio, stderr * arm / NORMAL_95)


def _skewness(x: NDArray[np.float64]) -> float:
    """Size of the skewness, corrected for the smallness of the sample."""
    n, z = len(x), x - x.mean()
    second = float(np.mean(z**2))
    if n < 3 or second <= 0:
        return 0.0
    return abs(float(np.mean(z**3))) / math.pow(second, 1.5) * math.sqrt(n * (n - 1)) / (n - 2)


def _freedom(x: NDArray[np.float64]) -> float:
    """Degrees of freedom of a chi-square as uncertain as the sample variance: ``2 / (Var s² / σ⁴)``.

    ``Var s²/σ⁴ = 2/(n-1) + κ/n``. The sample kurtosis of skewed laws is too small; ``κ ≥ 1.5 skewness²`` holds in the
    family (Cauchy-Schwarz on ``Tr H³``), and skewness is better known.
    """
    n = len(x)
    excess = MOST_KURTOSIS
    z = x - x.mean()
    second = float(np.mean(z**2))
    if n >= 4 and second > 0:
        g2 = float(np.mean(z**4)) / second**2 - 3
        sampled = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * g2 + 6)
        excess = min(max(sampled, 1.5 * _skewness(x) ** 2, 0.0), MOST_KURTOSIS)
    return 2 / (2 / (n - 1) + excess / n)


def _student(freedom: float) -> float:
    return widening(max(freedom, 1.0))
