"""Whether two estimates of trace and norm that share no probe vector agree."""

from __future__ import annotations

import math
from dataclasses import replace

from zoscope.curvature.lanczos import Jacobi
from zoscope.theory.spectrum import Estimate

RARE = math.log(1e4)
"""One in so many right measurements, at most, is called into question; as a logarithm."""


def compared(
    trace: Estimate, norm: Estimate, jacobi: Jacobi, *, dim: int
) -> tuple[Estimate, Estimate, tuple[str, ...]]:
    """Hold ``Tr M`` and ``‖M‖_F²`` against what the start of a chain alone says, before any deflation.

    The start v, a random unit vector, has ``d vᵀMv`` and ``d ‖Mv‖²``, unbiased and independent of the other probe
    vectors. They scatter much; by how much is bounded by an inequality for weighted sums of squares that needs no
    normal law: ``P(|Σ w (z² - 1)| ≥ 2 √x ‖w‖ + 2 x max|w|) ≤ 2 e^-x``. Only what it excludes is a disagreement.

    Args:
        trace: With its error.
        norm: With its error.
        jacobi: Of the chain.
        dim: Dimension d.

    Returns:
        The estimates, widened to contain the others where these disagree, and what a user should know of it.

    Source: B. Laurent and P. Massart, Adaptive estimation of a quadratic functional by model selection, Annals of
    Statistics 28 (2000), Lemma 1.
    """
    first = float(jacobi.alphas[0])
    other = dim * first, dim * float(first**2 + jacobi.betas[0] ** 2)
    size, radius = math.sqrt(max(norm.value, 0.0)), float(abs(jacobi.eigh()[0]).max())
    found, notes = [], []
    for name, estimate, value, scale in (("trace", trace, other[0], 1.0), ("‖·‖²", norm, other[1], radius)):
        excess = abs(value - estimate.value) - estimate.half_width
        if excess > scale * (2 * math.sqrt(RARE) * size + 2 * RARE * radius):
            estimate = replace(estimate, quadrature=estimate.quadrature + excess)
            notes.append(
                f"Two estimates of the {name} that share no random vector disagree: {estimate.value:.4g} and "
                f"{value:.4g}. Its interval contains both. Measure again with another --seed, or with --dtype float64; "
                "if they still disagree, products with the matrix are wrong."
            )
        found.append(estimate)
    return found[0], found[1], tuple(notes)
