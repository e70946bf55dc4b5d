"""Second moment of a zeroth-order gradient estimate on a quadratic, as two constants."""

from dataclasses import dataclass
from typing import Literal

from zoscope.theory.validate import require_count, require_non_negative, require_positive

Directions = Literal["gaussian", "sphere"]


@dataclass(frozen=True)
class EstimatorMoments:
    """Constants of ``E[ĝ ĝᵀ] = a·HΣH + b·Tr(HΣH)·I`` for ``f(x) = ½ xᵀHx`` and ``Σ = x xᵀ``.

    Args:
        a: Weight of the signal; dimensionless, > 0.
        b: Weight of the isotropic noise that every mode receives from all others; dimensionless, ≥ 0.

    Raises:
        ValueError: If ``a`` is not positive or ``b`` is negative.

    Source: derived in the README's theory section.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        require_positive("a", self.a)
        require_non_negative("b", self.b)


GAUSSIAN = EstimatorMoments(2.0, 1.0)
"""One two-point query along ``u ~ N(0, I)``."""


def estimator_moments(
    directions: Directions = "gaussian", *, queries: int = 1, dimension: int | None = None
) -> EstimatorMoments:
    """Constants (a, b) of the average of ``queries`` independent two-point estimates.

    One query gives ``E[u uᵀ G u uᵀ] = κ (2G + Tr(G) I)`` with κ = 1 for Gaussian directions and κ = d/(d+2) for the
    sphere of radius √d; averaging q of them keeps ``(1 - 1/q) G`` from the pairs of different queries.

    Args:
        directions: Law of the perturbation ``u``.
        queries: Number q of independent queries averaged per step.
        dimension: Number of parameters d; needed for ``"sphere"``, ignored for ``"gaussian"``.

    Returns:
        ``(1 + 1/q, 1/q)`` for Gaussian directions, ``(1 + (2κ-1)/q, κ/q)`` for the sphere.

    Raises:
        ValueError: If the law is unknown, or ``queries`` or ``dimension`` is not a positive integer.

    Source: derived in the README's theory section.
    """
    require_count("queries", queries)
    if directions == "gaussian":
        kappa = 1.0
    elif directions == "sphere":
        if dimension is None:
            raise ValueError("sphere directions need the dimension d: pass dimension=d")
        require_count("dimension", dimension)
        kappa = dimension / (dimension + 2)
    else:
        raise ValueError(f"directions must be 'gaussian' or 'sphere', got {directions!r}")
    return EstimatorMoments(a=1 + (2 * kappa - 1) / queries, b=kappa / queries)
