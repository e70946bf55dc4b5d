"""Trace and norm beyond a Krylov space, from probe vectors of one product each.

With a basis Q of k Lanczos vectors and ``M Q = Q T + r e_kᵀ``, and P projecting on the rest,

    Tr M = Tr T + Tr PMP,    ‖M‖_F² = ‖T‖_F² + 2‖r‖² + ‖PMP‖_F²,

whether the Ritz pairs have converged or not: only the last term of each is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.basis import lengths
from zoscope.curvature.lanczos import Jacobi, require_finite
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import NORMAL, widening

KEPT = 10
"""Products kept for what they have in common, which tells the fourth moment."""

LARGEST_EXPONENT = 100.0
"""Of an error that is as good as infinite."""


def exact_part(jacobi: Jacobi) -> tuple[float, float]:
    """``Tr T`` and ``‖T‖_F² + 2‖r‖²``."""
    return float(jacobi.alphas.sum()), float(np.square(jacobi.alphas).sum() + 2 * np.square(jacobi.betas).sum())


def first_moments(vectors: Tensor, products: Tensor) -> tuple[list[float], list[float]]:
    """``zᵀMz`` and ``‖Mz‖²`` of the unit vectors along ``vectors`` ``(b, d)`` from their products ``(b, d)``."""
    norms, sizes = (torch.linalg.vector_norm(v, dim=1, dtype=torch.float64) for v in (vectors, products))
    along = (vectors * products).sum(dim=1, dtype=torch.float64) / norms.square()
    return along.tolist(), (sizes / norms).square().tolist()


@dataclass
class Beyond:
    """What probe vectors tell of ``PMP``.

    Args:
        exact: Trace and squared norm of the rest of M.
        dimension: D, dimension of the space that is sampled.
        traces: ``D zᵀMz`` of unit vectors z.
        squares: ``D ‖PMz‖²``.
        kept: Some of the products ``PMz``, as unit vectors, and their squared lengths.
        common: ``(PMz · PMz')²`` of their pairs.
    """

    exact: tuple[float, float]
    dimension: int
    traces: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    kept: list[tuple[Tensor, float]] = field(default_factory=list)
    common: list[float] = field(default_factory=list)

    def add(self, vectors: Tensor, products: Tensor) -> None:
        """Count vectors ``(b, d)`` of the space, of any length, and their products ``PMz``.

        Raises:
            NumericalError: If a product is not finite.
        """
        along, squares = first_moments(vectors, products)
        require_finite(*along, *squares)
        self.traces += [self.dimension * value for value in along]
        self.squares += [self.dimension * value for value in squares]
        for product, square in zip(products, squares, strict=True):
            if len(self.kept) < KEPT:
                unit = product / lengths(product[None])[0].clamp_min(torch.finfo(product.dtype).tiny)
                self.common += [square * other * float(unit.dot(theirs)) ** 2 for theirs, other in self.kept]
                self.kept.append((unit, square))

    @property
    def count(self) -> int:
        """Probe vectors."""
        return len(self.traces)

    @property
    def variance(self) -> float:
        """Of the trace by one probe vector: ``2 (D ‖PMP‖² - (Tr PMP)²) / (D + 2)``."""
        return self._spread(float(np.mean(self.squares)), float(np.mean(self.traces)))

    def trace(self, count: int | None = None) -> Estimate:
        """``Tr M``, as if from ``count`` probe vectors.

        Its variance is known from D directions at once; the error is widened as in ``SampledSpectrum.stderr_of``.
        """
        count = count or self.count
        square = float(np.mean(self.squares))
        tail = self._fourth / square**2 if square > 0 else 0.0
        stderr = math.sqrt(self.variance / count) * (widening(max(1.0, count / tail)) if tail > 0 else 1.0)
        return Estimate(self.exact[0] + float(np.mean(self.traces)), stderr)

    def norm(self, count: int | None = None) -> Estimate:
        """``‖M‖_F²``, as if from ``count`` probe vectors.

        The error is that of its logarithm: a sum of squares is skewed, and a small one looks precise.
        """
        count, part = count or self.count, float(np.mean(self.squares))
        if part == 0:
            return Estimate(self.exact[1], 0.0)
        variance = max(self._spread(self._fourth, part), float(np.var(self.squares, ddof=1)))
        relative = widening(max(1, count - 1)) * math.sqrt(variance / count) / part
        stderr = part * math.expm1(min(NORMAL * relative, LARGEST_EXPONENT)) / NORMAL
        return Estimate(self.exact[1] + part, stderr)

    @property
    def _fourth(self) -> float:
        """``‖(PMP)²‖_F²``: the mean of ``D² (PMz · PMz')²`` over pairs of vectors."""
        return self.dimension**2 * float(np.mean(self.common))

    def _spread(self, square: float, first: float) -> float:
        return 2.0 * max(self.dimension * square - first**2, 0.0) / (self.dimension + 2)
