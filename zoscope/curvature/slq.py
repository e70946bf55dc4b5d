"""Deflated stochastic Lanczos quadrature in two levels.

One long Lanczos chain from a random vector plays three parts. Its converged Ritz pairs are the outliers that carry most
of a trace: they are counted exactly and deflated. What is left of its starting vector is a first random probe of the
complement, resolved finely. Short chains from more probe vectors then average the sampling noise away, at a few
products each. A short rule is biased where a function has a kink (the positive part of an indefinite Hessian at 0), but
nearly equally so for every probe: the difference of fine and short rule on the long chain corrects it (a multilevel
estimate in the sense of Giles 2008).

Rules are averages of Gauss and anti-Gauss rules (Laurie 1996), which lie on opposite sides of most integrals.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from zoscope.curvature.lanczos import Array, Jacobi, OnProducts, Rows, project_out, short_chains
from zoscope.curvature.operators import LinearOperator
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

DEFLATION_TOLERANCES = (0.05, 0.02, 0.01, 1e-3, 1e-6, 0.0)
"""Largest residual of a deflated Ritz pair, in units of its value: it enters traces by its square. The first that
leaves the start a random vector is taken; stricter ones are for spectra without outliers, whose Ritz vectors mix."""

RANDOM_REST = 0.9
"""Share of the start that deflation must leave, in units of the share that it leaves of a random vector."""

LARGEST_SHARE = 15.0
"""Most of a random unit vector that one eigenvector holds, in units of 1/d: exceeded once in 10,000 times."""

SHORT_LENGTHS = (5, 8, 12, 20)
"""Lengths of the short chains to choose from."""

FINE_RULE_ERROR = 0.6
"""Error of an averaged rule relative to its largest change over the second half of its steps; 0.2-1 measured."""

SHORT_RULE_SPREAD = 0.3
"""Scatter (two standard deviations) of a short rule's error over probe vectors, relative to the error itself.

Measured 0.25-0.75 of the error at the same length, 0.3 of the largest error over lengths from half of it upwards.
"""

Precision = Callable[[SampledSpectrum], float]


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
    return _joined([(0.5, part) for part in parts])


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
        rest: Tridiagonal matrix of the starting vector's measure on their complement; ``None`` when nothing is left.
    """

    ends: tuple[float, float]
    values: Array
    vectors: Array
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
        rest=jacobi_of(rest) if rest.weights.sum() > 1e-12 else None,
    )


@dataclass
class Deflated:
    """The complement of the deflated eigenpairs and the rules collected on it, each of unit mass.

    Args:
        exact: Deflated eigenvalues.
        ends: Interval of the spectrum as the long chain saw it. The outermost nodes of anti-Gauss rules can lie beyond
            it; they are moved in, since long horizons amplify a spurious negative node exponentially.
        dimension: D, dimension of the complement.
        rest: Measure of the long chain's start on the complement, finely resolved.
        length: Steps of a short chain.
        shorts: Rules of the short chains.
    """

    exact: Spectrum
    ends: tuple[float, float]
    dimension: int
    rest: Jacobi | None
    length: int
    shorts: list[Spectrum]

    @classmethod
    def of(cls, parts: Split, *, dim: int) -> "Deflated":
        """What a chain alone tells of an operator of dimension ``dim``."""
        count = len(parts.values)
        return cls(Spectrum.of(parts.values), parts.ends, dim - count, parts.rest, length=SHORT_LENGTHS[-1], shorts=[])

    @property
    def is_known(self) -> bool:
        """Whether anything at all is known of the complement."""
        return self.rest is not None or bool(self.shorts)

    def spectrum(self) -> SampledSpectrum:
        """Everything known so far, as one spectrum with its errors."""
        if self.dimension == 0:
            return SampledSpectrum.exact(self.exact.nodes)
        rules = list(self.shorts)
        correction, errors = Spectrum.of([]), list[tuple[Spectrum, ...]]()
        if self.rest is not None:
            fine, short = averaged_rule(self.rest), averaged_rule(self.rest.head(self.length))
            rules.append(short)
            correction = self._scaled([(1.0, fine), (-1.0, short)])
            errors = self._errors(fine, self.rest)
        sampled = self._scaled([(1.0 / len(rules), rule) for rule in rules])
        return SampledSpectrum(
            fine=_joined([(1.0, self.exact), (1.0, sampled), (1.0, correction)]),
            sampled=sampled,
            num_probes=len(rules),
            dimension=self.dimension,
            errors=tuple(errors),
        )

    def _errors(self, fine: Spectrum, rest: Jacobi) -> list[tuple[Spectrum, ...]]:
        """How far the fine rule may be off, and how much the error of the short rule may differ between probes."""
        size = rest.size
        errors = [self._against(fine, rest, {size // 2, size // 2 + 1, (3 * size) // 4, size - 1}, FINE_RULE_ERROR)]
        if size > self.length:
            short = {self.length // 2, self.length - 2, self.length - 1, self.length}
            errors.append(self._against(fine, rest, short, SHORT_RULE_SPREAD))
        return errors

    def _against(self, fine: Spectrum, rest: Jacobi, lengths: set[int], factor: float) -> tuple[Spectrum, ...]:
        return tuple(
            self._scaled([(factor, averaged_rule(rest.head(length))), (-factor, fine)])
            for length in sorted({max(1, length) for length in lengths})
        )

    def _scaled(self, terms: list[tuple[float, Spectrum]]) -> Spectrum:
        whole = _joined([(factor * self.dimension, rule) for factor, rule in terms])
        return Spectrum(np.clip(whole.nodes, *self.ends), whole.weights)


def _joined(terms: list[tuple[float, Spectrum]]) -> Spectrum:
    return Spectrum(
        np.concatenate([rule.nodes for _, rule in terms]),
        np.concatenate([factor * rule.weights for factor, rule in terms]),
    )


def choose_length(state: Deflated, precision: Precision, *, rtol: float, budget: int) -> int:
    """Length of the short chains that reaches ``rtol`` with the fewest products, judged on the long chain alone.

    Short ones average more sampling noise away per product, long ones scatter less about the fine rule. Where the
    budget does not suffice, the length with the smallest error at its end.

    Args:
        state: The complement, with no short chain yet.
        precision: Relative half-width of what is wanted.
        rtol: Half-width wanted.
        budget: Products left.
    """
    if state.rest is None:  # the long chain met every distinct eigenvalue, so no chain has more steps
        return min(SHORT_LENGTHS[-1], max(1, state.exact.nodes.size))
    best, best_cost = SHORT_LENGTHS[0], (math.inf, math.inf)
    for length in SHORT_LENGTHS:
        trial = replace(state, length=length).spectrum()
        floor = precision(trial.with_endless_sampling())
        single = max(precision(trial) - floor, 0.0)
        affordable = 1 + budget // length
        needed = 1 + math.ceil((single / (rtol - floor)) ** 2) if floor < rtol else affordable + 1
        reached = needed <= affordable
        cost = (0.0, needed * length) if reached else (1.0, floor + single / math.sqrt(affordable))
        if cost < best_cost:
            best, best_cost = length, cost
        if length >= state.rest.size:
            break
    return best


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
