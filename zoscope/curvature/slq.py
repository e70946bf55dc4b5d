"""Deflated stochastic Lanczos quadrature: the spectrum behind every threshold from one pass over an operator."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import (
    Chain,
    Jacobi,
    Recurrences,
    SharedBasis,
    inner,
    lengths,
    memory_for_vectors,
    project_out,
    require_finite,
    rounding,
    vectors_that_fit,
)
from zoscope.curvature.nonsmooth import Jump
from zoscope.curvature.operators import Array, DenseOperator, LinearOperator, dense_eigenpairs, dense_eigenvalues
from zoscope.errors import UsageError
from zoscope.runtime import spawn_generators
from zoscope.theory.spectrum import ENDLESS, NORMAL, Estimate, SampledSpectrum, Spectrum, widening


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


Method = Literal["dense", "deflated-slq", "forward"]

EIGENVALUE_TOLERANCE = 0.01
"""Residual of a converged eigenvalue, in units of its value."""

NORM = 3.0
"""Half-width wanted of the norm, in units of that of the trace: what one product tells of it is about as much."""


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue of a symmetric operator.

    Args:
        value: Eigenvalue in loss/param².
        residual: ``‖Mv - λv‖`` of the unit Ritz vector; some eigenvalue lies within this distance.
        converged: Whether the residual is at most 1 % of the value.
    """

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True, kw_only=True)
class TraceAndNorm:
    """What every measurement learns about a symmetric operator ``M`` of dimension d, and what it took.

    Args:
        trace: ``Tr M``, loss/param².
        frobenius_sq: ``‖M‖_F²``.
        num_hvps: Matrix-vector products spent, a sweep of all pieces of the data counted as one; of forward passes the
            directions, each two evaluations.
        seconds: Wall time spent.
        notes: What the user should know about how the measurement went.
        hvp: How Hessian-vector products were computed; ``None`` where there is but one way.
    """

    trace: Estimate
    frobenius_sq: Estimate
    num_hvps: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    hvp: str | None = None

    @property
    def error(self) -> float:
        """Relative 95 % half-width of the trace, or a third of that of the norm where it is larger."""
        return max(relative(self.trace), relative(self.frobenius_sq) / NORM)


@dataclass(frozen=True, kw_only=True)
class Curvature(TraceAndNorm):
    """Everything that one measuring pass learns about a symmetric operator ``M`` of dimension d.

    Args:
        lambda_max: Largest eigenvalue (algebraic).
        lambda_min: Smallest eigenvalue (algebraic).
        trace_positive: Sum of the positive eigenvalues.
        negative_mass: Sum of ``|λ|`` over the negative eigenvalues, ≥ 0.
        effective_rank: ``(Σλ)²/Σλ²`` over the positive eigenvalues; 0 when there are none.
        method: How it was measured.
        spectrum: Nodes and weights from which every threshold is computed.
        ritz: Eigenvalues found one by one, ascending: all of them when dense, else the Ritz values of a Krylov space.
            There the ends converge first, and a repeated eigenvalue appears once.
        block_traces: Traces of the diagonal blocks that were asked for; ``None`` when none were.
        vector_measure: Spectral measure of the vector that was given, ``Σ w f(θ) = vᵀ f(M) v``; ``None`` without one.
    """

    lambda_max: Eigenvalue
    lambda_min: Eigenvalue
    trace_positive: Estimate
    negative_mass: float
    effective_rank: float
    method: Method
    spectrum: SampledSpectrum
    ritz: tuple[Eigenvalue, ...] = ()
    block_traces: tuple[Estimate, ...] | None = None
    vector_measure: Spectrum | None = None


@dataclass(frozen=True)
class ForwardNoise:
    """How single examples e spread around their mean, by groups of directions; see ``measure_forward``.

    Args:
        gradient_sq: ``(m,)`` estimates of ``E‖g_e − g‖²``.
        curvature: ``(m,)`` estimates of ``E (g_e − g)ᵀH(g_e − g)``.
        slopes_sq: ``(m,)`` estimates of ``‖g‖²`` from the same directions.
        gradient_error: Error of ``gradient_sq`` from truncation and rounding.
        slopes_error: The same of ``slopes_sq``.
        hessian_sq: ``E‖H_e − H‖_F²``.
    """

    gradient_sq: Array
    curvature: Array
    slopes_sq: Array
    gradient_error: float
    slopes_error: float
    hessian_sq: Estimate


@dataclass(frozen=True, kw_only=True)
class ForwardCurvature(TraceAndNorm):
    """What forward passes learn about the Hessian H; see ``measure_forward``.

    Args:
        gradient_sq: ``‖g‖²``, loss²/param².
        rayleigh: ``gᵀHg/‖g‖²``; ``None`` for a zero gradient.
        loss: Loss at the parameters.
        indefinite: Whether negative curvature was seen along a direction.
        step: Step h of the differences along directions of unit entries, param.
        disagreement: Error of the trace from truncation and rounding, relative, from what single directions show at
            steps of h/2 and h; part of the errors above.
        num_evaluations: Evaluations of the whole loss.
        noise: How examples spread, where that was asked for.
        jump: Where the loss is constant but for jumps.
    """

    gradient_sq: Estimate
    rayleigh: Estimate | None
    loss: float
    indefinite: bool
    step: float
    disagreement: float
    num_evaluations: int
    method: Method = "forward"
    noise: ForwardNoise | None = None
    jump: Jump | None = None


@dataclass(frozen=True, kw_only=True)
class Moments(TraceAndNorm):
    """What `measure_moments` learns about a symmetric operator.

    Args:
        lambda_max: Largest eigenvalue (algebraic).
        pieces: Pieces of the data with probe vectors of their own; 1 where all examples share them.
    """

    lambda_max: Eigenvalue
    pieces: int


def relative(estimate: Estimate) -> float:
    """95 % half-width over the value; infinite for 0 with an error."""
    if estimate.half_width == 0:
        return 0.0
    return estimate.half_width / abs(estimate.value) if estimate.value else math.inf


def ritz_values(jacobi: Jacobi, *, dtype: torch.dtype) -> tuple[Eigenvalue, ...]:
    """Ritz values of a chain, ascending, with residuals, which contain the rounding of a number format."""
    values, vectors = jacobi.eigh()
    noise = rounding(dtype, float(np.abs(values).max()))
    residuals = np.hypot(jacobi.betas[-1] * np.abs(vectors[-1]), noise)
    return tuple(
        Eigenvalue(float(value), float(residual), converged=bool(residual <= EIGENVALUE_TOLERANCE * abs(value)))
        for value, residual in zip(values, residuals, strict=True)
    )


DEFLATION_TOLERANCE = 0.05
"""Largest residual of a deflated Ritz pair, in units of its value: it enters traces by its square."""

LARGEST_TILT = 4.0
"""Most by which a weight grows, in units of itself, when a rule is tilted to moments that are better known."""


def averaged_rule(jacobi: Jacobi, ends: tuple[float, float] | None = None) -> Spectrum:
    """Average of the k-node rule of a stretched matrix and the (k-1)-node Gauss rule; unit mass.

    With the square of the last off-diagonal stretched by ``s`` and weights of ``1/s`` and ``1 - 1/s`` the errors of the
    two cancel up to degree 2k - 1: ``s = 2`` is the anti-Gauss rule, whose error is minus that of the Gauss rule, and
    ``s = 1`` the k-node Gauss rule. The nodes move apart with s, which is as large as leaves them between the ends.
    (Moving single nodes in would change the moments: by a lot where there is much mass, as in a bulk near zero.)

    Args:
        jacobi: Tridiagonal matrix of k ≥ 1 steps.
        ends: An interval with all of its eigenvalues, where nodes may lie; anywhere when left out.

    Returns:
        ``2k - 1`` nodes; the k-node Gauss rule, which is exact, where the Krylov space is invariant.

    Source: Laurie, Anti-Gaussian quadrature formulas, Math. Comp. 65 (1996); with weights: Ehrich, On stratified
    extensions of Gauss-Laguerre and Gauss-Hermite quadrature formulas, J. Comput. Appl. Math. 140 (2002).
    """
    k = jacobi.size
    if k == 1 or jacobi.betas[-1] == 0:
        return gauss_rule(jacobi)
    nodes, vectors = jacobi.head(k - 1).eigh()
    stretch = 2.0
    for end in ends or ():  # an end is a node where this stretch makes the determinant vanish
        with np.errstate(divide="ignore", invalid="ignore"):
            coupled = float(jacobi.betas[k - 2] ** 2 * np.sum(vectors[-1] ** 2 / (nodes - end)))
        stretch = min(stretch, max(1.0, (jacobi.alphas[-1] - end) / coupled)) if coupled else stretch
    stretched = jacobi.betas.copy()
    stretched[k - 2] *= np.sqrt(stretch)
    parts = gauss_rule(Jacobi(jacobi.alphas, stretched)), Spectrum(nodes, vectors[0] ** 2)
    return joined([(1 / stretch, parts[0]), (1 - 1 / stretch, parts[1])])


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


def gauss_rule(jacobi: Jacobi, *, mass: float = 1.0) -> Spectrum:
    """The k-node Gauss rule of the measure behind a tridiagonal matrix; no node lies beyond its Ritz values."""
    nodes, vectors = jacobi.eigh()
    return Spectrum(nodes, mass * vectors[0] ** 2)


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
    def of(cls, jacobi: Jacobi) -> Deflated:
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
        """``P Z`` for vectors ``(b, d)``."""
        return project_out(vectors, self.vectors, passes=2)

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
    return gauss_rule(chain.jacobi, mass=squared)


SHORT_LENGTHS = (5, 8, 12, 20)
"""Lengths of the short recurrences to choose from."""

FINE_RULE_ERROR = 1.0
"""Error of an averaged rule relative to its largest change over the second half of its steps; 0.2-1 measured."""

SHORT_RULE_SPREAD = 0.3
"""Scatter (two standard deviations) of a short rule's error over probe vectors, relative to the error itself.

Measured 0.25-0.75 of the error at the same length, 0.3 of the largest error over lengths from half of it upwards.
"""

FUTILE = 1.1
"""Half-width, in units of the part that does not average out, from which on more probe vectors are not worth it."""

NOMINAL = 16
"""Number of vectors at which the noise of one is read off, with Student's factor for as many."""

UNREACHABLE = 10**4
"""A number of vectors that nobody waits for."""

Precision = Callable[[SampledSpectrum], float]


@dataclass
class Complement:
    """The complement of the deflated eigenpairs and the measures of probe vectors on it, each of unit mass.

    Args:
        exact: Deflated eigenvalues.
        ends: Smallest and largest Ritz value of the chain. No node lies beyond the Ritz values that are known: long
            horizons amplify a spurious negative node exponentially.
        dimension: D, dimension of the complement.
        coupling: What the residuals of the deflated pairs change to second order.
        rounding: By how much rounding may move an eigenvalue, loss/param².
        precision: Relative rounding error of a sum of products.
        fine: Recurrence of the first probe vector.
        shorts: Recurrences of ``length`` steps.
        firsts: Recurrences of one step.
        length: Steps of a short recurrence.
    """

    exact: Spectrum
    ends: tuple[float, float]
    dimension: int
    coupling: Spectrum
    rounding: float
    precision: float
    fine: Jacobi | None = None
    shorts: list[Jacobi] = field(default_factory=list)
    firsts: list[Jacobi] = field(default_factory=list)
    length: int = SHORT_LENGTHS[0]

    @classmethod
    def of(cls, deflated: Deflated, *, dim: int, rounding: float, precision: float) -> Complement:
        """Before the first probe vector."""
        values = deflated.values
        return cls(Spectrum.of(values), deflated.ends, dim - len(values), _coupling(deflated), rounding, precision)

    @property
    def num_vectors(self) -> int:
        """Probe vectors so far."""
        return (self.fine is not None) + len(self.shorts) + len(self.firsts)

    def missing(self, ahead: SamplingPlan) -> tuple[int, int] | None:
        """Short recurrences and single products that a plan still takes; ``None`` where it has been carried out."""
        shorts = max(0, ahead.shorts - len(self.shorts) - 1)
        vectors = max(0, ahead.vectors - self.num_vectors - shorts)
        return (shorts, vectors) if shorts or vectors else None

    def spectrum(self) -> SampledSpectrum:
        """Everything known so far, as one spectrum with its errors."""
        if self.dimension == 0:
            return SampledSpectrum.exact(self.exact.nodes)
        assert self.fine is not None
        found = np.concatenate([self.ends, *(jacobi.eigh()[0] for jacobi in (self.fine, *self.shorts))])
        ends = float(found.min()), float(found.max())
        fine, coarse = (averaged_rule(jacobi, ends) for jacobi in (self.fine, self.fine.head(self.length)))
        rules = [coarse, *(averaged_rule(jacobi, ends) for jacobi in self.shorts)]
        correction = self._scaled([(1.0, fine), (-1.0, coarse)])
        pooled = np.mean([_moments(j) for j in (self.fine, *self.shorts, *self.firsts)], axis=0)
        corrected = fine.trace - coarse.trace, fine.frobenius_sq - coarse.frobenius_sq
        average, end = joined([(1.0 / len(rules), rule) for rule in rules]), max(map(abs, ends))
        sampled, missing = tilted(average, *(pooled - corrected), end=end)
        sampled = self._scaled([(1.0, sampled)])
        whole = joined([(1.0, self.exact), (1.0, sampled), (1.0, correction)])
        errors = [
            *self._quadrature(self.fine, ends),
            (self._scaled([(1.0, missing)]),),
            (self.coupling,),
            *_rounded(self.exact, sampled, by=self.rounding, relative=self.precision),
        ]
        return SampledSpectrum(
            fine=whole,
            sampled=sampled,
            num_probes=len(rules),
            num_moments=len(rules) + len(self.firsts),
            dimension=self.dimension,
            errors=tuple(kind for kind in errors if any(rule.nodes.size for rule in kind)),
            probes=tuple(self._scaled([(1.0, rule)]) for rule in rules),
        )

    def _quadrature(self, fine: Jacobi, ends: tuple[float, float]) -> list[tuple[Spectrum, ...]]:
        """How far the fine rule may be off, and how much the error of the short rule may differ between probes."""
        size = fine.size
        if fine.betas[-1] == 0:  # all that the vector sees has been found
            return []
        halfway = {size // 2, size // 2 + 1, (3 * size) // 4, size - 1}
        errors = [self._against(fine, ends, halfway, FINE_RULE_ERROR)]
        if size > self.length:
            short = {self.length // 2, self.length - 2, self.length - 1, self.length}
            errors.append(self._against(fine, ends, short, SHORT_RULE_SPREAD))
        return errors

    def _against(
        self, fine: Jacobi, ends: tuple[float, float], lengths: set[int], factor: float
    ) -> tuple[Spectrum, ...]:
        whole = averaged_rule(fine, ends)
        return tuple(
            self._scaled([(factor, averaged_rule(fine.head(length), ends)), (-factor, whole)])
            for length in sorted({max(1, length) for length in lengths})
        )

    def _scaled(self, terms: Sequence[tuple[float, Spectrum]]) -> Spectrum:
        return joined([(factor * self.dimension, rule) for factor, rule in terms])


def _moments(jacobi: Jacobi) -> tuple[float, float]:
    """``zᵀMz`` and ``‖Mz‖²`` of the unit vector behind a recurrence, exactly."""
    return float(jacobi.alphas[0]), float(jacobi.alphas[0] ** 2 + jacobi.betas[0] ** 2)


def _coupling(deflated: Deflated) -> Spectrum:
    """Change of the spectrum when each pair θ couples by its residual r to a flat direction: ``[[θ, r], [r, 0]]``."""
    theta = deflated.values
    root = np.sqrt((theta / 2) ** 2 + deflated.residuals**2)
    nodes = np.concatenate([theta / 2 + root, theta / 2 - root, theta, np.zeros_like(theta)])
    return Spectrum(np.clip(nodes, *deflated.ends), np.repeat([1.0, 1.0, -1.0, -1.0], len(theta)))


def _rounded(exact: Spectrum, sampled: Spectrum, *, by: float, relative: float) -> tuple[tuple[Spectrum, ...], ...]:
    """What rounding changes: single eigenvalues moved, sampled nodes blurred, as seen at a kink, and sums off."""
    nodes, weights = sampled.nodes, sampled.weights
    moved = Spectrum(np.append(exact.nodes + by, exact.nodes), np.append(exact.weights, -exact.weights))
    blurred = Spectrum(
        np.concatenate([nodes - by, nodes + by, nodes]), np.concatenate([weights / 2, weights / 2, -weights])
    )
    stretched = Spectrum(np.append(nodes * (1 + relative), nodes), np.append(weights, -weights))
    return (moved,), (blurred,), (stretched,)


@dataclass(frozen=True)
class SamplingPlan:
    """How to sample a complement.

    Args:
        length: Steps of a short recurrence.
        shorts: Vectors with a rule, the first one included.
        vectors: Vectors in all.
    """

    length: int
    shorts: int
    vectors: int

    @property
    def cost(self) -> int:
        """Products beside the fine rule."""
        return self.length * (self.shorts - 1) + self.vectors - self.shorts

    def within(self, budget: int, *, have: int) -> SamplingPlan:
        """The same shares of fewer products."""
        share = min(1.0, budget / self.cost) if self.cost > 0 else 1.0
        shorts = have + math.floor((self.shorts - have) * share)
        return SamplingPlan(self.length, shorts, max(shorts, math.floor(self.vectors * share)))


def plan(state: Complement, precision: Precision, *, rtol: float, budget: int) -> SamplingPlan:
    """Lengths and numbers of probe vectors that reach ``rtol`` with the fewest products.

    Args:
        state: The complement with a fine rule.
        precision: Relative half-width of what is wanted.
        rtol: Half-width wanted. Where it cannot be reached, one that is little more than what does not average out.
        budget: Products left.
    """
    assert state.fine is not None
    have, size = len(state.shorts) + 1, state.fine.size
    best, best_cost = SamplingPlan(size, 1, 1), (math.inf, math.inf)
    lengths = (*(steps for steps in SHORT_LENGTHS if steps < size), size)
    for length in (state.length,) if state.shorts else lengths:
        noise = Noise(replace(state, length=length).spectrum(), precision)
        wanted = max(rtol, FUTILE * noise.floor) - noise.floor
        candidate = noise.plan(max(wanted, 1e-12), length=length, have=have)
        if noise.floor < rtol and candidate.cost <= budget:
            cost = 0.0, float(candidate.cost)
        else:
            candidate = candidate.within(budget, have=have)
            cost = 1.0, noise.half_width(candidate)
        if cost < best_cost:
            best, best_cost = candidate, cost
    return best


class Noise:
    """A relative half-width by its parts: ``floor + √(moment²/vectors + rest(shorts)²)``.

    Args:
        spectrum: Sampled spectrum.
        precision: Relative half-width of what is wanted.

    Attributes:
        floor: What does not average out.
        moment: Of one vector, in the parabola of a function, which single products tell.
    """

    def __init__(self, spectrum: SampledSpectrum, precision: Precision) -> None:
        self._spectrum, self._precision = spectrum, precision
        self.floor = precision(spectrum.with_endless_sampling())
        self.moment = math.sqrt(NOMINAL) * self._above(ENDLESS, NOMINAL)
        # Two numbers tell Student's factor well enough for a plan; every one of them asks for all that is wanted.
        few, many = (max(self._above(shorts, ENDLESS), 1e-300) for shorts in (1, NOMINAL))
        self._few, self._power = few, math.log(few / many) / math.log(NOMINAL)

    def rest(self, shorts: int) -> float:
        """Of some short rules, in what is left of a function, with Student's factor for as many."""
        early = self._few * min(shorts, NOMINAL) ** -self._power
        return float(early * math.sqrt(min(1.0, NOMINAL / shorts)))

    def _above(self, shorts: int, vectors: int) -> float:
        return max(self._precision(self._spectrum.with_counts(shorts, vectors)) - self.floor, 0.0)

    def half_width(self, plan: SamplingPlan) -> float:
        """After a plan."""
        return self.floor + math.hypot(self.moment / math.sqrt(plan.vectors), self.rest(plan.shorts))

    def plan(self, wanted: float, *, length: int, have: int) -> SamplingPlan:
        """Numbers that reach a half-width ``wanted`` above the floor with the fewest products."""
        best, more = SamplingPlan(length, UNREACHABLE, UNREACHABLE), 0
        while length * more < best.cost:
            shorts, left = have + more, wanted**2 - self.rest(have + more) ** 2
            if left > 0:
                vectors = math.ceil(min(self.moment**2 / left, UNREACHABLE))
                best = min(best, SamplingPlan(length, shorts, max(shorts, vectors)), key=lambda found: found.cost)
            more = max(more + 1, 3 * more // 2)
        return best


KEPT = 10
"""Products kept for what they have in common, which tells the fourth moment."""

TAIL_UNSEEN = 2.0
"""What the tail ``Tr A⁴/(Tr A²)²`` may be larger by than vectors show, times their number (in a forecast: then)."""

ALONE, HIDDEN = 0.5, 1e4
"""Squared cosine from which products share an eigenvalue, and its true part over that seen, once in a million times."""

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
class DeflatedHutchinson:
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

        Its variance is known from D directions at once; the error is widened as in ``SampledSpectrum.stderr_of``. The
        few vectors that make both trace and variance too small also make the tail too small: it counts as heavier by
        two over their number, with which intervals that end the sampling cover as often as they say.
        """
        count = count or self.count
        square = float(np.mean(self.squares))
        tail = self._fourth / square**2 + TAIL_UNSEEN / count if square > 0 else 0.0
        stderr = math.sqrt(self.variance / count) * (widening(max(1.0, count / tail)) if tail > 0 else 1.0)
        return Estimate(self.exact[0] + float(np.mean(self.traces)), stderr)

    def norm(self, count: int | None = None) -> Estimate:
        """``‖M‖_F²``, as if from ``count`` probe vectors.

        The error is that of its logarithm: a sum of squares is skewed, and a small one looks precise.
        """
        count, part = count or self.count, float(np.mean(self.squares))
        if part == 0:
            return Estimate(self.exact[1], 0.0)
        unseen = TAIL_UNSEEN / 2 * part**2 / count
        variance = max(self._spread(self._fourth + unseen, part), float(np.var(self.squares, ddof=1)))
        relative = widening(max(1, count - 1)) * math.sqrt(variance / count) / part
        stderr = part * math.expm1(min(NORMAL * relative, LARGEST_EXPONENT)) / NORMAL
        return Estimate(self.exact[1] + part, stderr)

    def may_hide(self, rtol: float) -> bool:
        """Whether one eigenvalue is all that they see, which may be large: each may be nearly orthogonal to it."""
        cosines_sq = [float(one.dot(other)) ** 2 for (one, _), (other, _) in combinations(self.kept, 2)]
        part = HIDDEN * float(np.mean(self.squares))
        return float(np.mean(cosines_sq)) > ALONE and part > rtol * (self.exact[1] + part)

    @property
    def _fourth(self) -> float:
        """``‖(PMP)²‖_F²``: the mean of ``D² (PMz · PMz')²`` over pairs of vectors."""
        return self.dimension**2 * float(np.mean(self.common))

    def _spread(self, square: float, first: float) -> float:
        return 2.0 * max(self.dimension * square - first**2, 0.0) / (self.dimension + 2)


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


OnProgress = Callable[[str, int, float | None], None]
"""Called with the stage, the products spent in it and the relative half-width reached, if there is one."""

FEWEST_HVPS = 20
"""Products below which neither the outliers nor the error of the rest can be told."""

FIRST_STEPS, MORE_STEPS, MANY_STEPS = 12, 6, 80
"""Length of a chain: at first, by how much it grows, and at most where outliers are looked for."""

FAR = 3.0
"""Products of sampling, in units of the chain, up to which a chain stops that no longer saves more than it takes."""

FEWEST_VECTORS = 3
"""Probe vectors drawn before it is known how many will be needed."""

BLOCK = 4
"""Probe vectors that advance together."""

MEMORY_SHARE = 0.4
"""Part of the free memory that a Lanczos basis may take."""


@dataclass(kw_only=True)
class Sampling(ABC):
    """The chain, the first probe vectors and the account of products that measurements share.

    Args:
        operator: Symmetric operator of dimension d.
        ends: How many of the smallest and of the largest eigenvalues should converge, where the budget allows.
        rtol: Half-width at which to stop.
        max_hvps: Products allowed.
        seed: Of all random vectors.
        kept: Vectors that the measurement keeps beside the chain.
        on_progress: Called after every stage.
    """

    operator: LinearOperator
    ends: tuple[int, int]
    rtol: float
    max_hvps: int
    seed: int
    kept: int = 0
    on_progress: OnProgress | None

    def __post_init__(self) -> None:
        device = self.operator.device
        self._first = self.operator.num_hvps
        self._chain_generator, self._probe_generator, self._pilot_generator = spawn_generators(self.seed, 3, device)
        self._early: list[Tensor] = []  # vectors and their products
        self._notes: list[str] = []

    @abstractmethod
    def _ahead(self, chain: Chain, beyond: DeflatedHutchinson) -> float:
        """Products that sampling takes after a chain."""

    def _saved(self, gained: float, ahead: float, beyond: DeflatedHutchinson) -> float:
        """Products of sampling that a part ``gained`` of ``‖M‖_F²`` in the chain saves of those ahead."""
        left = float(np.mean(beyond.squares))
        return ahead * gained / left if left > 0 else 0.0

    def _outliers(self) -> Chain:
        """Extend a chain until the ends wanted are known and more steps take more products than they save."""
        op = self.operator
        most = self._chain_steps(MANY_STEPS)
        chain = Chain(op, self._normal(1, self._chain_generator)[0], capacity=most)
        chain.extend(min(FIRST_STEPS, most))
        self._report("outliers", None)
        while not chain.exhausted and chain.jacobi.size < most and not self._suffices(chain):
            chain.extend(min(MORE_STEPS, most - chain.jacobi.size))
            self._report("outliers", None)
        return chain

    def _suffices(self, chain: Chain) -> bool:
        found, (bottom, top) = ritz_values(chain.jacobi, dtype=self.operator.dtype), self.ends
        if not all(eigenvalue.converged for eigenvalue in (*found[:bottom], *found[len(found) - top :])):
            return False
        return self._enough(chain, self._beyond(chain))

    def _enough(self, chain: Chain, beyond: DeflatedHutchinson) -> bool:
        """Whether more steps take more products than they save, once the ends have converged."""
        if beyond.may_hide(self.rtol):
            return False
        steps, ahead = chain.jacobi.size, self._ahead(chain, beyond)
        if ahead <= MORE_STEPS or ahead > FAR * steps:
            return ahead <= MORE_STEPS
        gained = beyond.exact[1] - exact_part(chain.jacobi.head(steps - MORE_STEPS))[1]
        return self._saved(gained, ahead, beyond) < MORE_STEPS

    def _beyond(self, chain: Chain) -> DeflatedHutchinson:
        """What the first probe vectors tell of the complement of a Krylov space."""
        if not self._early:
            vectors = self._normal(FEWEST_VECTORS, self._probe_generator)
            self._early = [vectors, self.operator.matmat(vectors)]
        beyond = DeflatedHutchinson(exact_part(chain.jacobi), self.operator.dim - chain.jacobi.size)
        beyond.add(*chain.beyond(self._early[0], self._early[1]))
        return beyond

    def _chain_steps(self, most: int) -> int:
        """Steps of a chain: ``most``, a third of the products, or what memory holds; notes the last case."""
        op = self.operator
        row = op.dim * torch.empty((), dtype=op.dtype).element_size()
        free = memory_for_vectors(op.ranks, op.device)
        fits = vectors_that_fit(MEMORY_SHARE, row, free=free) - 4 * BLOCK - 1 - self.kept
        most = min(most, max(min(self.max_hvps, 2), self.max_hvps // 3), op.dim)
        if fits >= most:
            return most
        most = max(2, fits)
        self._notes.append(
            f"Memory for {most} Lanczos vectors of {row / 2**20:.0f} MiB only: fewer outliers are deflated, so the "
            "same precision takes more probe vectors."
        )
        return most

    @property
    def _spent(self) -> int:
        return self.operator.num_hvps - self._first

    @property
    def _left(self) -> int:
        return self.max_hvps - self._spent

    def _normal(self, count: int, generator: torch.Generator) -> Tensor:
        op = self.operator
        return torch.randn(count, op.dim, generator=generator, dtype=op.dtype, device=op.device)

    def _report(self, stage: str, reached: float | None) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, self._spent, reached)


DENSE_LIMIT = 4096
"""Largest dimension for which the dense path is chosen by itself."""

MANY_FINE_STEPS, MOST_FINE_STEPS = 80, 160
"""Steps of the fine rule that do as a rule, and at most, where the quadrature error alone would take more than half of
the precision asked for: no number of probe vectors makes up for that."""

VECTOR_STEPS = 8
"""Lanczos steps spent on the spectral measure of a vector; at most a tenth of the products allowed."""

AT_ONCE, ENTRIES = 16, 2**26
"""Most probe vectors that advance together, and most entries that they have beyond the usual block."""


OnPairs = Callable[[Array, Tensor], None]
"""Called with eigenvalues ``(q,)`` and orthonormal eigenvectors ``(q, d)``, which are valid during the call."""


def measure(
    operator: LinearOperator,
    *,
    method: Literal["auto", "dense", "deflated-slq"] = "auto",
    precision: Precision | None = None,
    vector: Tensor | None = None,
    top: int = 1,
    bottom: int = 0,
    most_steps: int = MOST_FINE_STEPS,
    blocks: Sequence[int] | None = None,
    rtol: float = 0.02,
    max_hvps: int = 600,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    on_pairs: OnPairs | None = None,
) -> Curvature:
    """Measure a symmetric operator.

    Args:
        operator: Symmetric operator of dimension d.
        method: ``"dense"`` computes all eigenvalues from d products; ``"deflated-slq"`` samples; ``"auto"`` is dense
            where that takes no more products than ``max_hvps``, and d ≤ 4,096.
        precision: Largest relative 95 % half-width among the quantities wanted; the trace of the positive part when
            left out.
        vector: ``(d,)`` vector, such as the gradient, whose spectral measure is wanted too.
        top: How many of the largest eigenvalues should converge, where the budget allows.
        bottom: How many of the smallest ones.
        most_steps: Most steps of the fine rule, which resolve the bulk of the spectrum.
        blocks: Sizes of neighbouring groups of coordinates, d in all, whose traces are wanted too, at no further
            product.
        rtol: Half-width at which to stop.
        max_hvps: Products allowed.
        seed: Of the probe vectors.
        on_progress: Called after every stage.
        on_pairs: Called with the eigenpairs that were found one by one: all of them, or the deflated ones.

    Returns:
        The measurement. Whether ``rtol`` was reached is for the caller to see: ``precision(result.spectrum)``.

    Raises:
        ValueError: If an argument is out of range.
        UsageError: If the budget is too small for an error bar, or the matrix too large for memory.
        NumericalError: If a product is not finite.
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be > 0, got {rtol}")
    if max_hvps < 1:
        raise ValueError(f"max_hvps must be at least 1, got {max_hvps}")
    if blocks is not None and sum(blocks) != operator.dim:
        raise ValueError(f"blocks must add up to the dimension {operator.dim}, got {sum(blocks)}")
    traces = None if blocks is None else BlockTraces(blocks)
    started, spent = time.perf_counter(), operator.num_hvps
    if method == "dense" or (method == "auto" and operator.dim <= min(DENSE_LIMIT, max_hvps)):
        result = _dense(operator, traces)
        vector_measure = measure_of(DenseOperator(operator.dense()), vector, steps=VECTOR_STEPS)
        if on_pairs is not None:
            on_pairs(*dense_eigenpairs(operator))
    else:
        if max_hvps < FEWEST_HVPS:
            raise UsageError(
                f"--max-hvps {max_hvps}: {operator.dim:,} parameters are sampled, and an error bar takes at least "
                f"{FEWEST_HVPS} products. Raise it."
            )
        vector_measure = measure_of(operator, vector, steps=max(1, min(VECTOR_STEPS, max_hvps // 10)))
        result = _Sampling(
            operator=operator,
            precision=precision or _precision_of_positive_trace,
            traces=traces,
            ends=(bottom, top),
            most_steps=most_steps,
            rtol=rtol,
            max_hvps=max(1, max_hvps - (operator.num_hvps - spent)),
            seed=seed,
            on_progress=on_progress,
            on_pairs=on_pairs,
        ).run()
    return replace(
        result,
        num_hvps=operator.num_hvps - spent,
        seconds=time.perf_counter() - started,
        vector_measure=vector_measure,
        hvp=operator.hvp,
    )


def _dense(operator: LinearOperator, traces: BlockTraces | None) -> Curvature:
    eigenvalues, asymmetry = dense_eigenvalues(operator)
    blocks = None if traces is None else traces.exact(operator.dense().diagonal())
    every = tuple(Eigenvalue(float(value), residual=asymmetry, converged=True) for value in eigenvalues)
    return _curvature(SampledSpectrum.exact(eigenvalues), every, "dense", blocks, dim=operator.dim)


@dataclass(kw_only=True)
class _Sampling(Sampling):
    """The stochastic path: a chain for the outliers, then probe vectors of their complement."""

    precision: Precision
    traces: BlockTraces | None
    most_steps: int
    on_pairs: OnPairs | None

    def run(self) -> Curvature:
        op, traces, chain = self.operator, self.traces, self._outliers()
        start = chain.jacobi
        ritz, deflated = ritz_values(start, dtype=op.dtype), Deflated.of(start)
        deflation = Deflation(chain, deflated)
        basis = deflation.vectors
        if traces is not None:
            traces.deflate(deflation)
        if self.on_pairs is not None:
            self.on_pairs(deflated.values, basis.whole() if isinstance(basis, SharedBasis) else basis)
        noise = rounding(op.dtype, max(map(abs, deflated.ends)))
        state = Complement.of(deflated, dim=op.dim, rounding=noise, precision=rounding(op.dtype, 1.0))
        if state.dimension > 0:
            self._sample(state, deflation)
        spectrum = state.spectrum()
        blocks = None if traces is None else traces.estimates(spectrum)
        return _curvature(spectrum, ritz, "deflated-slq", blocks, dim=op.dim, start=start, notes=self._notes)

    def _ahead(self, chain: Chain, beyond: DeflatedHutchinson) -> float:
        """Products of a plan for what is left of the chain's start, a stand-in for a probe vector that is free.

        In a flat group of eigenvalues nothing is left of it although most of the group is yet to come: it takes at
        least as many products as the trace does.
        """
        deflated = Deflated.of(chain.jacobi)
        size = max(abs(beyond.trace().value), float(np.abs(chain.jacobi.eigh()[0]).sum()), np.finfo(float).tiny)
        least = 2 * float(np.mean(beyond.squares)) * (1.96 / (self.rtol * size)) ** 2
        mass = float(deflated.rest.weights.sum())
        if mass == 0:
            return least
        left = Spectrum(deflated.rest.nodes, beyond.dimension * deflated.rest.weights / mass)
        whole = joined([(1.0, Spectrum.of(deflated.values)), (1.0, left)])
        noise = Noise(SampledSpectrum(whole, left, 1, beyond.dimension), self.precision)
        return max(least, noise.plan(0.5 * self.rtol, length=SHORT_LENGTHS[0], have=1).cost)

    def _sample(self, state: Complement, deflation: Deflation) -> None:
        """Draw probe vectors until the precision wanted is reached, the budget spent, or more would not help."""
        if self._early:
            inside, products = deflation.beyond(*self._early)
            self._take_first_steps(state, inside, products)
            self._early.clear()
        self._draw_fine(state, deflation)
        ahead = None
        while True:
            spectrum = state.spectrum()
            reached, floor = self.precision(spectrum), self.precision(spectrum.with_endless_sampling())
            self._report("bulk", reached)
            if reached <= max(self.rtol, FUTILE * floor):
                return
            if ahead is None or not (missing := state.missing(ahead)):
                ahead = self._plan(state)
                state.length = ahead.length
                missing = state.missing(ahead) or (0, max(BLOCK, state.num_vectors // 4))  # Student's share
            if not self._draw(state, deflation, *missing):
                return

    def _draw(self, state: Complement, deflation: Deflation, shorts: int, vectors: int) -> bool:
        """Draw about half of the probe vectors that are missing; whether the budget allowed for any."""
        at_once = max(BLOCK, min(AT_ONCE, ENTRIES // self.operator.dim))
        shorts = min(shorts, max(BLOCK, shorts // 2), self._left // state.length)
        if shorts > 0:
            for count in _blocks(shorts, at_once):
                state.shorts += self._recurrences(count, deflation).extend(state.length).jacobis()
            return True
        vectors = min(max(vectors, 1), max(BLOCK, vectors // 2), self._left)
        for count in _blocks(vectors, at_once):
            starts = deflation.project(self._normal(count, self._probe_generator))
            products = project_out(self.operator.matmat(starts), deflation.vectors)
            self._take_first_steps(state, starts, products)
        return vectors > 0

    def _draw_fine(self, state: Complement, deflation: Deflation) -> None:
        """Follow the first probe vector until its own quadrature error leaves room for sampling error."""
        most = max(2, min(self.most_steps, self._left // 2, state.dimension))
        chain = self._recurrences(1, deflation)
        while True:
            size = 0 if state.fine is None else state.fine.size
            (state.fine,) = chain.extend(min(MORE_STEPS if size else FIRST_STEPS, most - size)).jacobis()
            state.length = state.fine.size
            quadrature = self.precision(state.spectrum().with_endless_sampling())
            self._report("bulk", None)
            if state.fine.size in (size, most) or quadrature <= self.rtol / 4:
                return
            many = state.fine.size >= MANY_FINE_STEPS
            if quadrature <= self.rtol / 2 and (many or self._plan(state).cost <= state.fine.size):
                return

    def _recurrences(self, count: int, deflation: Deflation) -> Recurrences:
        starts = deflation.project(self._normal(count, self._probe_generator))
        on_first = None if self.traces is None else self.traces.add
        return Recurrences(self.operator, starts, deflated=deflation.vectors, on_first=on_first)

    def _take_first_steps(self, state: Complement, vectors: Tensor, products: Tensor) -> None:
        state.firsts += first_steps(vectors, products)
        if self.traces is not None:
            scale = lengths(vectors)
            self.traces.add(vectors / scale, products / scale)

    def _plan(self, state: Complement) -> SamplingPlan:
        return plan(state, self.precision, rtol=self.rtol, budget=self._left)


def _blocks(count: int, most: int) -> list[int]:
    return [min(most, count - begin) for begin in range(0, count, most)]


def _curvature(
    spectrum: SampledSpectrum,
    ritz: tuple[Eigenvalue, ...],
    method: Method,
    block_traces: tuple[Estimate, ...] | None,
    *,
    dim: int,
    start: Jacobi | None = None,
    notes: Sequence[str] = (),
) -> Curvature:
    """What a spectrum says, held against the start of a chain; cost and way of the products are for the caller."""
    positive = spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    trace, norm = spectrum.trace_of(lambda x: x), spectrum.trace_of(np.square)
    if start is not None:
        known = trace.quadrature
        trace, norm, disagreements = compared(trace, norm, start, dim=dim)
        spectrum = _widened(spectrum, ritz, by=trace.quadrature - known)
        notes = (*notes, *disagreements)
    # Few products leave the positive part open, of which this much is certain.
    positive = replace(positive, value=max(positive.value, trace.value, ritz[-1].value, 0.0))
    positive_sq = spectrum.fine.trace_of(lambda x: np.maximum(x, 0.0) ** 2)
    return Curvature(
        trace=trace,
        frobenius_sq=norm,
        lambda_max=ritz[-1],
        lambda_min=ritz[0],
        trace_positive=positive,
        negative_mass=max(0.0, spectrum.fine.trace_of(lambda x: np.maximum(-x, 0.0)), positive.value - trace.value),
        effective_rank=positive.value**2 / positive_sq if positive_sq > 0 else 0.0,
        method=method,
        spectrum=spectrum,
        ritz=ritz,
        block_traces=block_traces,
        notes=tuple(notes),
    )


def _widened(spectrum: SampledSpectrum, ritz: tuple[Eigenvalue, ...], *, by: float) -> SampledSpectrum:
    """A spectrum whose thresholds know that so much of the trace is in doubt, at its outermost eigenvalue."""
    end = max((eigenvalue.value for eigenvalue in ritz), key=abs)
    if by <= 0 or end == 0:
        return spectrum
    return replace(spectrum, errors=(*spectrum.errors, (Spectrum(np.array([end]), np.array([by / abs(end)])),)))


def _precision_of_positive_trace(spectrum: SampledSpectrum) -> float:
    trace = spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    return trace.half_width / trace.value if trace.value > 0 else 0.0
