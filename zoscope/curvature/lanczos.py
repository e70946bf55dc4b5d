"""The Lanczos recurrence, and where its vectors are: in this process, or in slices on all ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.operators import Array, LinearOperator
from zoscope.errors import NumericalError
from zoscope.runtime import Ranks, available_memory, collective, is_limited

WIDTH = 2**22
"""Entries that are combined at a time, so that no second copy of a basis is needed."""

ENOUGH = 0.7
"""Share of a vector's length that a pass of orthogonalisation must leave for one to do (Daniel et al. 1976)."""

FEWEST_VECTORS = 24
"""Vectors that a sampled measurement holds at least."""

CHUNK = 2**14
"""Entries whose products are added up in the vectors' own type; the sums of chunks are added in float64."""


def vectors_that_fit(share: float, row: int, *, free: float) -> int:
    """How many vectors of ``row`` bytes fit into a share of the free memory.

    Raises:
        NumericalError: If a memory limit leaves no room for the fewest.
    """
    if is_limited() and free < FEWEST_VECTORS * row:
        raise NumericalError(
            f"--max-memory leaves {free / 2**20:,.0f} MiB for vectors of {row / 2**20:,.0f} MiB each: expected room "
            f"for {FEWEST_VECTORS} of them. Raise it, select fewer parameters (--params), or use --curvature forward."
        )
    return int(share * free / row)


def memory_for_vectors(ranks: Ranks, device: torch.device) -> int:
    """Bytes for vectors that are kept: of rank 0, or of all ranks, each as much as the one with the least has."""
    return int(ranks.size * _least(ranks, device.type)) if ranks.shard_basis else available_memory(device)


@collective
def _least(ranks: Ranks, device: str) -> float:
    return ranks.smallest(available_memory(device) / (ranks.local_size if device == "cpu" else 1))


def inner(rows: Tensor, others: Tensor) -> Tensor:
    """Inner products ``(m, n)`` of ``rows`` ``(m, d)`` with ``others`` ``(n, d)``, in float64.

    A float32 sum over millions of entries loses four of its seven digits; over a chunk it loses hardly one.
    """
    if rows.dtype == torch.float64 or rows.shape[1] <= CHUNK:
        return (rows @ others.T).double()
    cuts = range(0, rows.shape[1], CHUNK)
    products = [rows[:, begin : begin + CHUNK] @ others[:, begin : begin + CHUNK].T for begin in cuts]
    return torch.stack(products).sum(dim=0, dtype=torch.float64)


def lengths(vectors: Tensor) -> Tensor:
    """Norms ``(b, 1)`` of vectors ``(b, d)``, accumulated in float64, in their own type."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=torch.float64)
    return norms.to(vectors.dtype)


def new_basis(operator: LinearOperator, start: Tensor, *, capacity: int) -> LocalBasis | SharedBasis:
    """Room for ``capacity`` vectors like ``start``, which is the first one, normalised."""
    unit = start / lengths(start[None])[0]
    if operator.ranks.shard_basis:
        return shared_basis(operator.ranks, capacity, len(unit), unit.dtype, unit.device.type, first=unit)
    return LocalBasis(unit, capacity=capacity)


class LocalBasis:
    """Vectors in this process.

    Args:
        first: ``(d,)``, the first one.
        capacity: How many there will be at most.
    """

    def __init__(self, first: Tensor, *, capacity: int) -> None:
        self._rows = torch.empty(capacity, len(first), dtype=first.dtype, device=first.device)
        self._rows[0] = first
        self._next = first

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Tensor:
        """One vector ``(d,)``."""
        return self._rows[index]

    def orthogonalise(self, count: int, *, vector: Tensor) -> tuple[float, float]:
        """Take the first ``count`` vectors out of another one, in place.

        Returns:
            Its coefficient along the last of them, and the length of what is left.
        """
        known = self._rows[:count]
        along = inner(known[-1:], vector[None])[0, 0]
        for row in known[-2:].flip(0):  # Lanczos' own recurrence, which leaves little for the costly pass over all
            vector.sub_(inner(row[None], vector[None])[0].to(row) * row)
        before = torch.linalg.vector_norm(vector, dtype=torch.float64)  # float32 squares may overflow
        vector.sub_(inner(vector[None], known)[0].to(known) @ known)
        self._next = vector
        left = torch.linalg.vector_norm(vector, dtype=torch.float64)
        first, whole, rest = torch.stack([along, before, left]).tolist()  # a device is waited for once
        if rest < ENOUGH * whole:  # much of it was rounding: twice is enough (Kahan; Parlett 1980, §6.9)
            vector.sub_(inner(vector[None], known)[0].to(known) @ known)
            rest = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
        return first, rest

    def append(self, index: int, length: float) -> None:
        """Put what was left, of a known length, at ``index`` as a unit vector."""
        torch.div(self._next, length, out=self._rows[index])

    def project_out(self, vectors: Tensor, count: int) -> Tensor:
        """``vectors`` ``(b, d)`` less their components along the first ``count``."""
        return project_out(vectors, self._rows[:count])

    def combine(self, mix: Tensor) -> Tensor:
        """Put the combinations ``mix`` ``(n, k)`` of the first k vectors in their place; ``(n, d)``."""
        return _combined(self._rows, mix)


def _combined(rows: Tensor, mix: Tensor) -> Tensor:
    n, k = mix.shape
    width = max(1, WIDTH // max(k, 1))
    for begin in range(0, rows.shape[1], width):
        rows[:n, begin : begin + width] = mix @ rows[:k, begin : begin + width]
    return rows[:n]


class SharedBasis:
    """Vectors of which each rank holds a slice of the coordinates: memory per rank falls as ranks are added.

    Sums over coordinates are exchanged, a few numbers each; whole vectors only where a product takes one. Rank 0 alone
    has those, as keyword arguments and in what is returned.

    Args:
        ranks: The job.
        capacity: How many vectors there will be at most.
        dim: Their length d.
        dtype: Their type.
        device: Where they are.
    """

    def __init__(self, ranks: Ranks, capacity: int, dim: int, dtype: torch.dtype, device: str) -> None:
        self.ranks, self.dtype, self.device = ranks, dtype, torch.device(device)
        self._dim, self._width = dim, -(-dim // ranks.size)  # the last slice ends in zeros
        self._rows = torch.zeros(capacity, self._width, dtype=dtype, device=device)
        self._next = torch.zeros(self._width, dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.row(index) for index in range(len(self)))

    def put(self, whole: Tensor | None) -> None:
        """The first vector, ``(d,)``."""
        self._rows[0] = self._dealt(1, None if whole is None else whole[None])[0]

    @collective
    def row(self, index: int) -> Tensor:
        """See `LocalBasis.row`."""
        return self._joined(self._rows[index : index + 1])[0]

    @collective
    def orthogonalise(self, count: int, *, vector: Tensor | None = None) -> tuple[float, float]:
        """See `LocalBasis.orthogonalise`; the vector itself is left as it is."""
        known = self._rows[:count]
        self._next = rest = self._dealt(1, None if vector is None else vector[None])[0]
        along = 0.0
        for turn in range(2):
            products = self.ranks.total(inner(known, rest[None])[:, 0].cpu())
            along = float(products[-1]) if turn == 0 else along
            rest -= products.to(rest) @ known
        square = self.ranks.total(rest.double().square().sum().cpu())
        return along, float(square.sqrt())

    @collective
    def append(self, index: int, length: float) -> None:
        """See `LocalBasis.append`."""
        torch.div(self._next, length, out=self._rows[index])

    @collective
    def combine(self, mix: Tensor) -> SharedBasis:
        """See `LocalBasis.combine`."""
        self._rows = _combined(self._rows, mix)
        return self

    def project_out(self, vectors: Tensor, count: int | None = None) -> Tensor:
        """``vectors`` ``(b, d)`` less their components along the first ``count``, or all of them."""
        return self._project_out(len(vectors), len(self) if count is None else count, vectors=vectors)

    @collective
    def _project_out(self, number: int, count: int, *, vectors: Tensor | None = None) -> Tensor:
        basis, mine = self._rows[:count], self._dealt(number, vectors)
        products = self.ranks.total(inner(mine, basis).cpu())
        return self._joined(torch.addmm(mine, products.to(mine), basis, alpha=-1))

    def whole(self) -> Tensor:
        """All of it on rank 0, ``(q, d)``, for a caller that cannot do with less."""
        return torch.stack(list(self))

    def _dealt(self, number: int, whole: Tensor | None) -> Tensor:
        mine = torch.empty(number, self._width, dtype=self.dtype, device=self.device)
        if whole is not None:
            whole = torch.nn.functional.pad(whole, (0, self._width * self.ranks.size - whole.shape[1]))
        return self.ranks.scatter(whole, mine)

    def _joined(self, mine: Tensor) -> Tensor:
        whole = self.ranks.join(mine)
        return mine if whole is None else whole[:, : self._dim]


@collective
def shared_basis(
    ranks: Ranks, capacity: int, dim: int, dtype: torch.dtype, device: str, *, first: Tensor | None = None
) -> SharedBasis:
    """Room on all ranks for vectors of which ``first``, ``(d,)``, is the first; see `SharedBasis`."""
    basis = ranks.keep(ranks.attempt(lambda: SharedBasis(ranks, capacity, dim, dtype, device)))
    basis.put(first)
    return basis


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

    def head(self, steps: int) -> Jacobi:
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
            alpha, beta = self._basis.orthogonalise(k + 1, vector=w)
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

    def project_out(self, vectors: Tensor) -> Tensor:
        """``vectors`` ``(b, d)`` less their components in the Krylov space."""
        return self._basis.project_out(vectors, len(self._alphas))

    def beyond(self, vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """``P V`` and ``P M P V`` for vectors ``(b, d)`` and their products; P projects on what is beyond the basis."""
        last = inner(vectors, self._basis.row(len(self._alphas) - 1)[None])[:, 0].to(vectors)
        inside = torch.outer(last, self.residual())  # P M Q = r e_kᵀ
        return self.project_out(vectors), self.project_out(products) - inside

    def combine(self, coefficients: Array) -> Rows:
        """Orthonormal combinations of the basis, ``(n, d)``, in its place; the chain cannot be extended afterwards.

        Args:
            coefficients: ``(k, n)`` orthonormal columns, n ≤ k.
        """
        self.exhausted = True
        return self._basis.combine(torch.as_tensor(coefficients.T, dtype=self._dtype, device=self._operator.device))


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

    def extend(self, steps: int) -> Recurrences:
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


def project_out(vectors: Tensor, basis: Rows, *, passes: int = 1) -> Tensor:
    """``vectors`` ``(b, d)`` less their components along the orthonormal rows of ``basis`` ``(q, d)``.

    A second pass removes what rounding left of the first.
    """
    for _ in range(passes if len(basis) else 0):
        if isinstance(basis, SharedBasis):
            vectors = basis.project_out(vectors)
        else:
            vectors = torch.addmm(vectors, inner(vectors, basis).to(basis), basis, alpha=-1)
    return vectors


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
