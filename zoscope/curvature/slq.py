"""Deflated stochastic Lanczos quadrature: converged Ritz pairs of a chain, and the rules of probe vectors.

Converged Ritz pairs carry most of a trace: they are counted exactly and deflated. Probe vectors of their complement
tell the rest. They are drawn for it, and the chain's own start is not one of them: what deflation leaves of it is no
random vector where Ritz vectors mix eigenvectors, as they do in multiple eigenvalues and in flat groups.

Rules are averages of Gauss and anti-Gauss rules (Laurie 1996), which lie on opposite sides of most integrals.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.basis import inner
from zoscope.curvature.beyond import first_moments
from zoscope.curvature.lanczos import Array, Chain, Jacobi, project_out
from zoscope.curvature.operators import LinearOperator
from zoscope.theory.spectrum import Spectrum

DEFLATION_TOLERANCE = 0.05
"""Largest residual of a deflated Ritz pair, in units of its value: it enters traces by its square."""


LARGEST_TILT = 4.0
"""Most by which a weight grows, in units of itself, when a rule is tilted to moments that are better known."""


def averaged_rule(jacobi: Jacobi) -> Spectrum:
    """Average of the (k-1)-node Gauss and the k-node anti-Gauss rule; unit mass.

    Args:
        jacobi: Tridiagonal matrix of k ≥ 1 steps.

    Returns:
        ``2k - 1`` nodes; the k-node Gauss rule, which is exact, where the Krylov space is invariant.

    Source: Laurie, Anti-Gaussian quadrature formulas, Math. Comp. 65 (1996).
    """
    k = jacobi.size
    if k == 1 or jacobi.betas[-1] == 0:
        return gauss_rule(jacobi)
    stretched = jacobi.betas.copy()
    stretched[k - 2] *= np.sqrt(2)
    parts = gauss_rule(jacobi.head(k - 1)), gauss_rule(Jacobi(jacobi.alphas, stretched))
    return joined([(0.5, part) for part in parts])


def tilted(rule: Spectrum, mean: float, square: float, *, end: float) -> tuple[Spectrum, Spectrum]:
    """A rule of unit mass with its weights multiplied by 1 plus a parabola, to a mean and a mean square.

    The factor stays between 0 and 5, so that a positive rule stays positive and no weight becomes much larger.

    Args:
        rule: Positive weights.
        mean: Wanted first moment.
        square: Wanted second moment.
        end: Largest size of an eigenvalue, where a mean is put that too few nodes cannot have.

    Returns:
        The rule, and what is missing of the change that was wanted, a signed rule of mass 0.
    """
    scale = float(np.abs(rule.nodes).max(initial=0.0)) or 1.0
    known = min(3, rule.nodes.size)  # one node has no mean but its own
    powers = np.vander(rule.nodes / scale, known, increasing=True)
    change = np.array([1.0, mean / scale, square / scale**2])[:known] - rule.weights @ powers
    gram = powers.T @ (rule.weights[:, None] * powers)
    tilt = powers @ np.linalg.lstsq(gram, change, rcond=1e-12)[0]
    share = min(1.0, 1.0 / max(-float(tilt.min()), float(tilt.max()) / LARGEST_TILT, 1.0))
    unmatched = mean - float((rule.weights * (1.0 + tilt)) @ rule.nodes)
    weight = unmatched / end if end > 0 else 0.0
    missing = Spectrum(
        np.append(rule.nodes, [end, 0.0]), np.append(rule.weights * tilt * (1.0 - share), [weight, -weight])
    )
    return Spectrum(rule.nodes, rule.weights * (1.0 + share * tilt)), missing


def gauss_rule(jacobi: Jacobi) -> Spectrum:
    """The k-node Gauss rule of the measure behind a tridiagonal matrix; unit mass."""
    nodes, vectors = jacobi.eigh()
    return Spectrum(nodes, vectors[0] ** 2)


@dataclass(frozen=True)
class Deflated:
    """Converged Ritz pairs of a chain.

    Args:
        ends: Smallest and largest Ritz value of the chain.
        values: ``(q,)`` Ritz values to deflate.
        coordinates: ``(k, q)`` their vectors in the Krylov basis.
        residuals: ``(q,)`` their residuals.
        rest: The others, weighted by what the start has of them.
    """

    ends: tuple[float, float]
    values: Array
    coordinates: Array
    residuals: Array
    rest: Spectrum

    @classmethod
    def of(cls, jacobi: Jacobi) -> "Deflated":
        """Those of a chain whose residual is small beside the value."""
        values, vectors = jacobi.eigh()
        residuals = jacobi.betas[-1] * np.abs(vectors[-1])
        converged = residuals <= DEFLATION_TOLERANCE * np.abs(values)
        return cls(
            (float(values[0]), float(values[-1])),
            values[converged],
            vectors[:, converged],
            residuals[converged],
            Spectrum(values[~converged], vectors[0, ~converged] ** 2),
        )


class Deflation:
    """The deflated vectors V, with what couples them to their complement: ``M V = V diag(θ) + r cᵀ``.

    Args:
        chain: Where they come from; it cannot be extended afterwards.
        deflated: What is deflated of it.
    """

    def __init__(self, chain: Chain, deflated: Deflated) -> None:
        self.values = deflated.values
        self.residual = chain.residual()
        self.vectors = chain.combine(deflated.coordinates)
        self.coupled = torch.zeros_like(self.residual)
        for weight, vector in zip(deflated.coordinates[-1].tolist(), self.vectors, strict=True):
            self.coupled.add_(vector, alpha=weight)

    def project(self, vectors: Tensor) -> Tensor:
        """``P Z`` for vectors ``(b, d)``; the second pass removes what rounding left of the first."""
        return project_out(project_out(vectors, self.vectors), self.vectors)

    def beyond(self, vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """``P Z`` and ``P M P Z`` for vectors ``(b, d)`` and their products with M."""
        inside = inner(vectors, self.coupled[None]).to(vectors) * self.residual
        return self.project(vectors), project_out(products, self.vectors) - inside


def first_steps(vectors: Tensor, products: Tensor) -> list[Jacobi]:
    """Recurrences of one step from vectors ``(b, d)`` of a space and their products ``(b, d)`` in it."""
    moments = zip(*first_moments(vectors, products), strict=True)
    return [Jacobi(np.array([mean]), np.array([np.sqrt(max(square - mean**2, 0.0))])) for mean, square in moments]


def joined(terms: list[tuple[float, Spectrum]]) -> Spectrum:
    """A weighted sum of rules."""
    return Spectrum(
        np.concatenate([rule.nodes for _, rule in terms]),
        np.concatenate([factor * rule.weights for factor, rule in terms]),
    )


def measure_of(operator: LinearOperator, vector: Tensor | None, *, steps: int) -> Spectrum | None:
    """Gauss rule of a vector's spectral measure; its first moment, ``vᵀMv``, is exact from one step on."""
    if vector is None:
        return None
    squared = float(vector.double().square().sum())
    if squared == 0:
        return Spectrum.of([])
    chain = Chain(operator, vector, capacity=steps)
    chain.extend(steps)
    rule = gauss_rule(chain.jacobi)
    return Spectrum(rule.nodes, squared * rule.weights)
