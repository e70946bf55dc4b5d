"""Trace, norm and largest eigenvalue alone, in the fewest products.

One Krylov space, with basis Q of k vectors, holds what dominates: ``QᵀMQ = T`` is tridiagonal and known from the
recurrence, and M takes Q out of itself along one vector only, with coefficient β. Hence, with ``P = I - QQᵀ``,

    Tr M = Tr T + Tr PMP,        ‖M‖_F² = ‖T‖_F² + 2β² + ‖PMP‖_F²

exactly, for any k, whether or not Ritz pairs have converged. A probe vector z gives both rests from one product, as
``zᵀPMPz`` and ``‖PMPz‖²``, without bias. The space may grow after the probes were drawn: what M does to its new
vectors is known, so that their projections follow without a product.

Source: Hutch++ (Meyer et al., arXiv:2010.09649) with a Krylov space for the sketch, whose image costs no product.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.linear import LinearOperator
from zoscope.curvature.results import Eigenvalue
from zoscope.errors import NumericalError
from zoscope.runtime import spawn_generators
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import widening

Array = NDArray[np.float64]

FIRST_STEPS, MORE_STEPS, MOST_STEPS = 12, 4, 80
"""Length of the recurrence: at first, by how much it grows, and at most."""

PILOT, BLOCK = 6, 4
"""Probe vectors drawn before the length of the recurrence is settled, and at a time after that."""


@dataclass(frozen=True)
class Moments:
    """What was found.

    Args:
        trace: ``Tr M``.
        frobenius_sq: ``‖M‖_F²``.
        lambda_max: Largest eigenvalue.
        num_hvps: Products spent.
        seconds: Wall clock.
    """

    trace: Estimate
    frobenius_sq: Estimate
    lambda_max: Eigenvalue
    num_hvps: int
    seconds: float


def measure_moments(
    operator: LinearOperator,
    *,
    trace_rtol: float = 0.01,
    frobenius_rtol: float = 0.03,
    lambda_rtol: float = 0.01,
    max_hvps: int = 600,
    seed: int = 0,
) -> Moments:
    """Trace, squared Frobenius norm and largest eigenvalue of a symmetric operator.

    Args:
        operator: Symmetric operator of dimension d.
        trace_rtol: 95 % half-width wanted of the trace, relative to it.
        frobenius_rtol: The same for the squared norm.
        lambda_rtol: Residual of the largest eigenvalue wanted, relative to it.
        max_hvps: Products allowed; at least 20.
        seed: Of start and probe vectors.

    Returns:
        Estimates with standard errors; whether the precision was reached is for the caller to see.

    Raises:
        ValueError: If a tolerance is not positive or the budget below 20.
        NumericalError: If a product is not finite.
    """
    if not min(trace_rtol, frobenius_rtol, lambda_rtol) > 0:
        raise ValueError("tolerances must be > 0")
    if max_hvps < 20:
        raise ValueError(f"max_hvps must be at least 20, got {max_hvps}")
    started, spent = time.perf_counter(), operator.num_hvps
    search = _Search(operator, seed=seed, most=min(MOST_STEPS, max_hvps // 2))

    def needed() -> float:
        """Probe vectors needed in all, as far as known."""
        excess = max(_excess(search.trace, trace_rtol), _excess(search.frobenius_sq, frobenius_rtol))
        return search.probes * excess**2

    search.extend(FIRST_STEPS)
    search.draw(PILOT)
    after = needed()
    while not search.exhausted:
        before = after
        search.extend(MORE_STEPS)
        after = needed()
        if search.lambda_max(lambda_rtol).converged and not before - after >= MORE_STEPS:
            break
    while needed() > search.probes and (left := max_hvps - (operator.num_hvps - spent)) > 0:
        wanted = needed() - search.probes
        search.draw(min(left, BLOCK if wanted > BLOCK else math.ceil(wanted)))
    return Moments(
        search.trace,
        search.frobenius_sq,
        search.lambda_max(lambda_rtol),
        operator.num_hvps - spent,
        time.perf_counter() - started,
    )


class _Search:
    """A Krylov space and probe vectors projected off it."""

    def __init__(self, operator: LinearOperator, *, seed: int, most: int) -> None:
        self._operator = operator
        self._own, self._others = spawn_generators(seed, 2, operator.device)
        most = min(most, operator.dim)
        self._basis = torch.empty(most + 1, operator.dim, dtype=operator.dtype, device=operator.device)
        start = self._random(1, self._own)[0]
        self._basis[0] = start / torch.linalg.vector_norm(start)
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._free = self._basis.new_empty(0, operator.dim)  # Pz
        self._images = self._basis.new_empty(0, operator.dim)  # PMPz

    @property
    def steps(self) -> int:
        """Dimension of the space."""
        return len(self._alphas)

    @property
    def probes(self) -> int:
        """Number of probe vectors."""
        return len(self._free)

    @property
    def exhausted(self) -> bool:
        """Whether the space cannot grow: invariant, or as large as allowed."""
        return self.steps == len(self._basis) - 1 or (self.steps > 0 and self._betas[-1] == 0)

    def extend(self, steps: int) -> None:
        """Take more steps of the recurrence; the probes follow."""
        for _ in range(steps):
            if self.exhausted:
                return
            k = self.steps
            q = self._basis[k]
            image = self._product(q[None])[0]
            scale = torch.linalg.vector_norm(image)
            self._alphas.append(float(q @ image))
            known = self._basis[: k + 1]
            for _ in range(2):
                image = image - known.T @ (known @ image)
            beta = float(torch.linalg.vector_norm(image))
            if beta <= 10 * torch.finfo(image.dtype).eps * float(scale) or k + 1 == self._operator.dim:
                beta = 0.0
            self._betas.append(beta)
            self._basis[k + 1] = image / beta if beta > 0 else 0.0
            self._follow(k, beta)

    def draw(self, count: int) -> None:
        """New probe vectors, one product each."""
        known = self._basis[: self.steps]
        free = _off(self._random(count, self._others), known)
        self._free = torch.cat([self._free, free])
        self._images = torch.cat([self._images, _off(self._product(free), known)])

    def _follow(self, k: int, beta: float) -> None:
        """Project the probes off vector k too: ``P'MP'z = (I - qqᵀ) PMPz - β q₊ qᵀz``."""
        if not self.probes:
            return
        q, after = self._basis[k], self._basis[k + 1]
        along = self._free @ q
        self._free -= along[:, None] * q
        self._images -= (self._images @ q)[:, None] * q + beta * along[:, None] * after

    @property
    def trace(self) -> Estimate:
        """``Tr T`` and the mean of ``zᵀPMPz``, whose variance is twice the squared norm of the rest."""
        values, squares = self._rest()
        freedom = _freedom(squares)
        stderr = math.sqrt(2 * squares.mean() / len(squares)) * widening(freedom)
        return Estimate(sum(self._alphas) + float(values.mean()), stderr if self._betas[-1] > 0 else 0.0)

    @property
    def frobenius_sq(self) -> Estimate:
        """``‖T‖_F² + 2β²`` and the mean of ``‖PMPz‖²``."""
        _, squares = self._rest()
        inside = sum(a * a for a in self._alphas) + 2 * sum(b * b for b in self._betas)
        stderr = float(squares.std(ddof=1)) / math.sqrt(len(squares)) * widening(len(squares) - 1)
        return Estimate(inside + float(squares.mean()), stderr)

    def lambda_max(self, rtol: float) -> Eigenvalue:
        """The largest Ritz value."""
        off = self._betas[:-1]
        values, vectors = np.linalg.eigh(np.diag(self._alphas) + np.diag(off, 1) + np.diag(off, -1))
        residual = self._betas[-1] * abs(float(vectors[-1, -1]))
        return Eigenvalue(float(values[-1]), residual, converged=residual <= rtol * abs(float(values[-1])))

    def _rest(self) -> tuple[Array, Array]:
        values = (self._free * self._images).sum(dim=1, dtype=torch.float64)
        squares = self._images.square().sum(dim=1, dtype=torch.float64)
        return values.cpu().numpy(), squares.cpu().numpy()

    def _random(self, count: int, generator: torch.Generator) -> Tensor:
        op = self._operator
        return torch.randn(count, op.dim, generator=generator, dtype=op.dtype, device=op.device)

    def _product(self, vectors: Tensor) -> Tensor:
        images = self._operator.matmat(vectors)
        if not bool(torch.isfinite(images).all()):
            raise NumericalError(
                "A Hessian-vector product is not finite: expected finite second derivatives. Look for an overflow, "
                "0/0 or log(0) in the loss, or measure in --dtype float64."
            )
        return images


def _excess(estimate: Estimate, rtol: float) -> float:
    """Half-width in units of the one wanted."""
    if estimate.half_width == 0:
        return 0.0
    return estimate.half_width / abs(estimate.value) / rtol if estimate.value != 0 else math.inf


def _off(vectors: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):  # the second pass removes what rounding left of the first
        vectors = vectors - (vectors @ basis.T) @ basis
    return vectors


def _freedom(squares: Array) -> float:
    """Degrees of freedom of a chi-square that is as uncertain as the mean of the squares."""
    relative = float(squares.var(ddof=1)) / len(squares) / float(squares.mean()) ** 2 if squares.mean() > 0 else 0.0
    return max(1.0, 2 / relative) if relative > 0 else math.inf
