"""Traces of diagonal blocks, from products that a measurement computes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import Array
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import widening

if TYPE_CHECKING:
    from zoscope.curvature.slq import Deflation
    from zoscope.theory.spectrum import SampledSpectrum


class BlockTraces:
    """``sum_{i in G} M_ii`` for groups G of neighbouring coordinates, collected during a measurement.

    With P onto the deflated Ritz vectors and Q = I - P, ``diag M = diag PMP + 2 diag PMQ + diag QMQ``. The chain knows
    the first two exactly. The last is ``D E z_i (QMz)_i`` for z uniform on the unit sphere of the complement, of
    dimension D: every probe vector begins with such a product.

    Args:
        sizes: Lengths of the groups, which follow one another and add up to d.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._cuts = [0, *np.cumsum(sizes).tolist()]
        self._exact = np.zeros(len(sizes))
        self._sampled: list[Array] = []
        self._squares: list[Array] = []

    def deflate(self, deflation: Deflation) -> None:
        """Count the deflated Ritz pairs exactly, and what couples them to their complement."""
        self._exact += 2 * self._sums(deflation.coupled * deflation.residual)
        for value, vector in zip(deflation.values, deflation.vectors, strict=True):
            self._exact += value * self._sums(vector.square())

    def add(self, vectors: Tensor, products: Tensor) -> None:
        """Sample with unit vectors of the complement ``(b, d)`` and their products ``QMz`` ``(b, d)``."""
        for vector, product in zip(vectors, products, strict=True):
            self._sampled.append(self._sums(vector * product))
            self._squares.append(self._sums(product.square()))

    def estimates(self, spectrum: SampledSpectrum) -> tuple[Estimate, ...]:
        """One trace per group.

        The variance of one sample is at most ``2 D ‖(QMQ)_G‖_F²``, of the rows in G; it is half of that where M couples
        G to other groups only. The squares of the products average to the norm. Its own scatter is allowed for as
        in ``SampledSpectrum.stderr_of``.

        Quadrature nodes are kept inside the spectrum, which moves the trace of ``spectrum`` by a little. The groups
        follow in proportion to their variances, so that they add up to it.
        """
        if not self._sampled:
            return tuple(Estimate(float(value)) for value in self._exact)
        count, dimension = len(self._sampled), spectrum.dimension
        values = self._exact + dimension * np.mean(self._sampled, axis=0)
        variances = 2 * dimension * np.mean(self._squares, axis=0) / count
        if variances.sum() > 0:
            values = values + (spectrum.fine.trace - values.sum()) * variances / variances.sum()
        errors = np.sqrt(variances) * _widening(spectrum)
        return tuple(Estimate(float(v), stderr=float(e)) for v, e in zip(values, errors, strict=True))

    def exact(self, diagonal: Tensor) -> tuple[Estimate, ...]:
        """The same from the diagonal ``(d,)`` itself."""
        return tuple(Estimate(float(value)) for value in self._sums(diagonal))

    def _sums(self, vector: Tensor) -> Array:
        sums = [vector[begin:end].sum(dtype=torch.float64) for begin, end in pairwise(self._cuts)]
        return torch.stack(sums).cpu().numpy()


def _widening(spectrum: SampledSpectrum) -> float:
    """Student's factor over the normal one, at ``n (Tr A²)²/Tr A⁴`` degrees of freedom."""
    second, fourth = (spectrum.sampled.trace_of(lambda x, p=power: x**p) for power in (2, 4))  # type: ignore[misc]
    freedom = max(spectrum.num_probes, spectrum.num_moments) * second**2 / fourth if fourth > 0 else np.inf
    return widening(max(freedom, 1.0))
