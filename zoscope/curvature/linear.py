"""Symmetric matrices known by their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zoscope.problem.together import Crew

DENSE_BLOCK = 64
"""Unit vectors multiplied at once when a whole matrix is formed."""


class LinearOperator(ABC):
    """A symmetric matrix known by its products.

    Attributes:
        dim: Dimension d.
        device: Where vectors live.
        dtype: Their type.
    """

    dim: int
    device: torch.device
    dtype: torch.dtype
    _matrix: Tensor | None = None

    @property
    def crew(self) -> Crew | None:
        """The ranks that compute products together; None for this process alone."""
        return None

    @property
    def hvp(self) -> str | None:
        """How products with a Hessian are computed; None before the first, and where there is but one way."""
        return None

    @property
    @abstractmethod
    def num_hvps(self) -> int:
        """Products with a Hessian computed so far."""

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with several vectors.

        Args:
            vectors: ``(k, d)`` rows.

        Returns:
            ``(k, d)`` rows ``M v``.
        """

    def dense(self) -> Tensor:
        """The whole matrix, ``(d, d)``, from d products; computed once."""
        if self._matrix is None:
            matrix = torch.empty(self.dim, self.dim, dtype=self.dtype, device=self.device)
            for begin in range(0, self.dim, DENSE_BLOCK):
                count = min(DENSE_BLOCK, self.dim - begin)
                units = torch.zeros(count, self.dim, dtype=self.dtype, device=self.device)
                units[torch.arange(count), torch.arange(begin, begin + count)] = 1
                matrix[begin : begin + count] = self.matmat(units)
            self._matrix = matrix
        return self._matrix

    def known(self) -> LinearOperator:
        """The matrix itself once it has been formed, whose products cost nothing; this operator before."""
        return self if self._matrix is None else DenseOperator(self._matrix)


class DenseOperator(LinearOperator):
    """A matrix held in memory.

    Args:
        matrix: ``(d, d)``, symmetric.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self._count = 0
        self.dim = len(matrix)
        self.device, self.dtype = matrix.device, matrix.dtype

    @property
    def num_hvps(self) -> int:
        """Products computed so far."""
        return self._count

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``."""
        assert self._matrix is not None
        self._count += len(vectors)
        return vectors @ self._matrix


class Preconditioned(LinearOperator):
    """``P^-½ M P^-½`` for a positive diagonal P: similar to ``P⁻¹M``, and symmetric.

    Args:
        operator: M.
        diagonal: ``(d,)`` diagonal of P, positive.
    """

    def __init__(self, operator: LinearOperator, diagonal: Tensor) -> None:
        self._operator = operator
        self._scale = diagonal.double().rsqrt().to(operator.dtype)
        self.dim, self.device, self.dtype = operator.dim, operator.device, operator.dtype

    @property
    def crew(self) -> Crew | None:
        """That of M."""
        return self._operator.crew

    @property
    def hvp(self) -> str | None:
        """That of M."""
        return self._operator.hvp

    @property
    def num_hvps(self) -> int:
        """Products with M computed so far."""
        return self._operator.num_hvps

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``."""
        return self._operator.matmat(vectors * self._scale) * self._scale

    def dense(self) -> Tensor:
        """The whole matrix; reuses that of M."""
        return self._scale[:, None] * self._operator.dense() * self._scale
