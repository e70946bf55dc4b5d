"""Deflated stochastic Lanczos quadrature in two levels.

One long Lanczos chain from a random vector plays three parts. Its converged Ritz pairs are the outliers that carry most
of a trace: they are counted exactly and deflated. What is left of its starting vector is a first random probe of the
complement, resolved finely. Short chains from more probe vectors then average the sampling noise away, at a few
products each. A short rule is biased where a function has a kink (the positive part of an indefinite Hessian at 0), but
nearly equally so for every probe: the difference of fine and short rule on the long chain corrects it (a multilevel
estimate in the sense of Giles 2008).

Rules are averages of Gauss and anti-Gauss rules (Laurie 1996), which lie on opposite sides of most integrals.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import Array, Chain, Jacobi, OnProducts, Rows, project_out, short_chains
from zoscope.curvature.operators import LinearOperator
from zoscope.theory.spectrum import Spectrum

DEFLATION_TOLERANCES = (0.05, 0.02, 0.01, 1e-3, 1e-6, 0.0)
"""Largest residual of a deflated Ritz pair, in units of its value: it enters traces by its square. The first that
leaves the start a random vector is taken; stricter ones are for spectra without outliers, whose Ritz vectors mix."""

RANDOM_REST = 0.9
"""Share of the start that deflation must leave, in units of the share that it leaves of a random vector."""

LARGEST_SHARE = 15.0
"""Most of a random unit vector that one eigenvector holds, in units of 1/d: exceeded once in 10,000 times."""


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


def reshaped(rule: Spectrum, mean: float, square: float) -> Spectrum:
    """A rule with its weights tilted by a parabola to a mean and a mean square; both keep the mass 1.

    What is not known, such as the fourth moment that the error of the second takes, keeps the shape of the rule.
    """
    scale = float(np.abs(rule.nodes).max(initial=0.0))
    if rule.nodes.size < 3 or scale == 0:
        spread = float(np.sqrt(max(square - mean**2, 0.0)))
        return Spectrum(mean + spread * np.array([-1.0, 1.0]), np.array([0.5, 0.5]))
    powers = np.vander(rule.nodes / scale, 3, increasing=True)
    wanted = np.array([1.0, mean / scale, square / scale**2])
    tilt = np.linalg.lstsq(powers.T @ (rule.weights[:, None] * powers), wanted, rcond=None)[0]
    return Spectrum(rule.nodes, rule.weights * (powers @ tilt))


def gauss_rule(jacobi: Jacobi) -> Spectrum:
    """The k-node Gauss rule of the measure behind a tridiagonal matrix; unit mass."""
    nodes, vectors = jacobi.eigh()
    return Spectrum(nodes, vectors[0] ** 2)


def jacobi_of(rule: Spectrum) -> Jacobi:
    """Tridiagonal matrix of a discrete measure: Lanczos on ``diag(nodes)`` from the root of its weights."""
    keep = rule.weights > 0
    nodes, start = rule.nodes[keep], np.sqrt(rule.weights[keep])
    basis = [start / np.linalg.norm(start)]
    alphas, betas = [], []
    for _ in range(len(nodes)):
        w = nodes * basis[-1]
        alphas.append(float(basis[-1] @ w))
        known = np.array(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        betas.append(float(np.linalg.norm(w)))
        if len(basis) == len(nodes) or betas[-1] <= 1e-13 * np.abs(nodes).max():
            break
        basis.append(w / betas[-1])
    return Jacobi(np.array(alphas), np.array(betas))


@dataclass(frozen=True)
class Split:
    """A chain taken apart.

    Args:
        ends: Smallest and largest Ritz value of the chain.
        values: ``(q,)`` Ritz values to deflate.
        vectors: ``(k, q)`` their coordinates in the Krylov basis.
        residuals: ``(q,)`` their residuals.
        rest: Tridiagonal matrix of the starting vector's measure on their complement; ``None`` when nothing is left.
    """

    ends: tuple[float, float]
    values: Array
    vectors: Array
    residuals: Array
    rest: Jacobi | None


def split(jacobi: Jacobi, *, dim: int) -> Split:
    """Separate the converged Ritz pairs of a chain from the rest of its measure.

    A Ritz vector that holds much more of a random start than one eigenvector can is a mixture of many: it belongs to
    the bulk, however small its residual, and deflating it would leave a start that is no random vector any more.

    Args:
        jacobi: Tridiagonal matrix of the chain.
        dim: Dimension d of the operator.
    """
    values, vectors = jacobi.eigh()
    residuals = jacobi.betas[-1] * np.abs(vectors[-1])
    single = vectors[0] ** 2 <= LARGEST_SHARE / dim
    for tolerance in DEFLATION_TOLERANCES:
        converged = single & (residuals <= tolerance * np.abs(values))
        if 1 - (vectors[0, converged] ** 2).sum() >= RANDOM_REST * (1 - converged.sum() / dim):
            break
    rest = Spectrum(values[~converged], vectors[0, ~converged] ** 2)
    return Split(
        ends=(float(values[0]), float(values[-1])),
        values=values[converged],
        vectors=vectors[:, converged],
        residuals=residuals[converged],
        rest=jacobi_of(rest) if rest.weights.sum() > 1e-12 else None,
    )


def joined(terms: list[tuple[float, Spectrum]]) -> Spectrum:
    """A weighted sum of rules."""
    return Spectrum(
        np.concatenate([rule.nodes for _, rule in terms]),
        np.concatenate([factor * rule.weights for factor, rule in terms]),
    )


def probe_block(
    operator: LinearOperator,
    deflated: Rows,
    *,
    probes: int,
    length: int,
    generator: torch.Generator,
    on_first: OnProducts | None = None,
) -> list[Spectrum]:
    """Rules of ``probes`` new random vectors on the complement, at ``probes * length`` products.

    ``on_first`` sees the vectors and their first products, see ``short_chains``.
    """
    starts = torch.randn(probes, operator.dim, generator=generator, dtype=deflated.dtype, device=deflated.device)
    for _ in range(2):  # the second pass removes what rounding left of the first
        starts = project_out(starts, deflated)
    chains = short_chains(operator, starts, steps=length, deflated=deflated, on_first=on_first)
    return [averaged_rule(jacobi) for jacobi in chains]


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
