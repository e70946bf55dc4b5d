"""Lanczos tridiagonalisation: one chain with its basis kept, or many short chains advanced together."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.basis import SharedBasis, inner, lengths, new_basis
from zoscope.curvature.operators import LinearOperator
from zoscope.errors import NumericalError

Array = NDArray[np.float64]
Rows = Tensor | SharedBasis
"""Vectors ``(q, d)``, in this process or in slices on all ranks."""

OnProducts = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Jacobi:
    """A symmetric tridiagonal matrix, the compression of an operator to a Krylov space.

    Args:
        alphas: ``(k,)`` diagonal, loss/param².
        betas: ``(k,)`` off-diagonals; the last couples to the vector after the k-th, 0 for an invariant space.
    """

    alphas: Array
    betas: Array

    @property
    def size(self) -> int:
        """Number of Lanczos steps k."""
        return len(self.alphas)

    def eigh(self) -> tuple[Array, Array]:
        """Ritz values ``(k,)``, ascending, and the eigenvectors ``(k, k)`` as columns."""
        values, vectors = np.linalg.eigh(
            np.diag(self.alphas) + np.diag(self.betas[:-1], 1) + np.diag(self.betas[:-1], -1)
        )
        return values, vectors

    def head(self, steps: int) -> "Jacobi":
        """The first ``steps`` steps."""
        return Jacobi(self.alphas[:steps], self.betas[:steps])


class Chain:
    """One Lanczos recurrence with full reorthogonalisation; its basis is kept and can be extended.

    Args:
        operator: Symmetric operator of dimension d.
        start: ``(d,)`` non-zero starting vector.
        capacity: Most steps that the buffer holds.
    """

    def __init__(self, operator: LinearOperator, start: Tensor, *, capacity: int) -> None:
        self._operator = operator
        self._basis = new_basis(operator, start, capacity=capacity + 1)
        self._dtype = start.dtype
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self.exhausted = False

    @property
    def jacobi(self) -> Jacobi:
        """The tridiagonal matrix so far."""
        return Jacobi(np.array(self._alphas), np.array(self._betas))

    def extend(self, steps: int) -> None:
        """Take up to ``steps`` more steps; stops early when the Krylov space is invariant.

        Raises:
            NumericalError: If a product is not finite.
        """
        for _ in range(steps):
            k = len(self._alphas)
            if self.exhausted or k + 1 >= len(self._basis):
                return
            w = self._operator.matmat(self._basis.row(k)[None])[0]
            alpha, beta = self._basis.orthogonalise(w, k + 1)
            require_finite(alpha, beta)
            scale = max(map(abs, [*self._alphas, *self._betas, alpha]))
            self._alphas.append(alpha)
            self.exhausted = k + 1 == self._operator.dim or beta <= breakdown(self._dtype, scale)
            self._betas.append(0.0 if self.exhausted else beta)
            if not self.exhausted:
                self._basis.append(k + 1, beta)

    def residual(self) -> Tensor:
        """``(d,)`` r of ``M Q = Q T + r e_kᵀ``, orthogonal to the basis Q; zero for an invariant space."""
        if not self._betas[-1]:
            return torch.zeros_like(self._basis.row(0))
        return self._betas[-1] * self._basis.row(len(self._betas))

    def project_out(self, vectors: Tensor, coefficients: Array) -> Tensor:
        """``vectors`` ``(b, d)`` less their components along ``combine(coefficients)``; the chain can still go on."""
        return self._basis.project_out(vectors, self._mix(coefficients))

    def beyond(self, vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """``P V`` and ``P M P V`` for vectors ``(b, d)`` and their products; P projects on what is beyond the basis."""
        everything = np.eye(len(self._alphas))
        last = inner(vectors, self._basis.row(len(self._alphas) - 1)[None])[:, 0].to(vectors)
        inside = torch.outer(last, self.residual())  # P M Q = r e_kᵀ
        return self.project_out(vectors, everything), self.project_out(products, everything) - inside

    def combine(self, coefficients: Array) -> Rows:
        """Orthonormal combinations of the basis, ``(n, d)``, in its place; the chain cannot be extended afterwards.

        Args:
            coefficients: ``(k, n)`` orthonormal columns, n ≤ k.
        """
        self.exhausted = True
        return self._basis.combine(self._mix(coefficients))

    def _mix(self, coefficients: Array) -> Tensor:
        return torch.as_tensor(coefficients.T, dtype=self._dtype, device=self._operator.device)


class Recurrences:
    """Lanczos on ``(I - VVᵀ) M (I - VVᵀ)`` from several vectors at once, one block product per step.

    Without reorthogonalisation within a recurrence: what escapes the deflation converges slowly, and a quadrature rule
    survives the loss of orthogonality (Greenbaum 1989).

    Args:
        operator: Symmetric operator M of dimension d.
        starts: ``(b, d)`` vectors orthogonal to the rows of ``deflated``.
        deflated: ``(q, d)`` orthonormal rows V.
        on_first: Called with the unit starting vectors and their products, each ``(b, d)``.
    """

    def __init__(
        self, operator: LinearOperator, starts: Tensor, *, deflated: Rows, on_first: OnProducts | None = None
    ) -> None:
        self._operator, self._deflated, self._on_first = operator, deflated, on_first
        self._vectors = starts / lengths(starts)
        self._previous = torch.zeros_like(self._vectors)
        self._beta = torch.zeros(len(starts), 1, dtype=starts.dtype, device=starts.device)
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []

    def extend(self, steps: int) -> "Recurrences":
        """Take more steps.

        Raises:
            NumericalError: If a product is not finite.
        """
        for _ in range(steps):
            w = project_out(self._operator.matmat(self._vectors), self._deflated)
            if not self._alphas and self._on_first is not None:
                self._on_first(self._vectors, w)
            alpha = (self._vectors * w).sum(dim=1, keepdim=True, dtype=torch.float64)
            w -= alpha.to(w) * self._vectors + self._beta * self._previous
            beta = torch.linalg.vector_norm(w, dim=1, keepdim=True, dtype=torch.float64)
            self._alphas.append(alpha)
            self._betas.append(beta)
            self._beta = beta.to(w)
            self._previous, self._vectors = self._vectors, w / self._beta.clamp_min(torch.finfo(w.dtype).tiny)
        return self

    def jacobis(self) -> list[Jacobi]:
        """One tridiagonal matrix per vector, shorter where a Krylov space was exhausted."""
        a = torch.cat(self._alphas, dim=1).cpu().numpy()
        b = torch.cat(self._betas, dim=1).cpu().numpy()
        require_finite(*a.ravel(), *b.ravel())
        dtype = self._vectors.dtype
        return [_cut(Jacobi(row_a, row_b), dtype) for row_a, row_b in zip(a, b, strict=True)]


def project_out(vectors: Tensor, basis: Rows) -> Tensor:
    """``vectors`` ``(b, d)`` less their components along the orthonormal rows of ``basis`` ``(q, d)``."""
    if isinstance(basis, SharedBasis):
        return basis.project_out(vectors) if len(basis) else vectors
    return torch.addmm(vectors, inner(vectors, basis).to(basis), basis, alpha=-1) if len(basis) else vectors


def rounding(dtype: torch.dtype, scale: float) -> float:
    """Error of a computed eigenvalue of a matrix of norm about ``scale`` by rounding alone, loss/param²."""
    return 10 * torch.finfo(dtype).eps * scale


def breakdown(dtype: torch.dtype, scale: float) -> float:
    """Size of an off-diagonal that is rounding noise for a matrix of norm about ``scale``, loss/param²."""
    return 10 * rounding(dtype, scale)


def _cut(jacobi: Jacobi, dtype: torch.dtype) -> Jacobi:
    """Drop what follows the first off-diagonal that is rounding noise, and the noise: the Krylov space is invariant."""
    scale = max(np.abs(jacobi.alphas).max(), jacobi.betas.max())
    noise = np.flatnonzero(jacobi.betas <= breakdown(dtype, float(scale)))
    if not noise.size:
        return jacobi
    cut = jacobi.head(int(noise[0]) + 1)
    return Jacobi(cut.alphas, np.append(cut.betas[:-1], 0.0))


def require_finite(*numbers: float) -> None:
    """See that numbers made of products are finite.

    Raises:
        NumericalError: If one is not.
    """
    if not np.isfinite(numbers).all():
        raise NumericalError(
            "A Hessian-vector product is not finite although the loss is. Expected finite second derivatives at the "
            "point where curvature is measured. Look for sqrt or a norm at 0, a division by a vanishing variance, or "
            "numbers that are too large or too small for the dtype (try --dtype float64)."
        )
