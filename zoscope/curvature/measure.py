"""One pass over an operator that yields trace, norm, extreme eigenvalues and the spectrum behind every threshold."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.agreement import compared
from zoscope.curvature.basis import SharedBasis, lengths
from zoscope.curvature.beyond import Beyond
from zoscope.curvature.complement import FUTILE, SHORT_LENGTHS, Complement, Noise, Plan, Precision, plan
from zoscope.curvature.dense import dense_eigenpairs, dense_eigenvalues
from zoscope.curvature.diagonal import BlockTraces
from zoscope.curvature.lanczos import Chain, Jacobi, Recurrences, project_out, rounding
from zoscope.curvature.operators import DenseOperator, LinearOperator
from zoscope.curvature.results import Curvature, Eigenvalue, Method, ritz_values
from zoscope.curvature.sampling import BLOCK, FEWEST_HVPS, FIRST_STEPS, MORE_STEPS, OnProgress, Sampling
from zoscope.curvature.slq import Deflated, Deflation, first_steps, joined, measure_of
from zoscope.errors import UsageError
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum

DENSE_LIMIT = 4096
"""Largest dimension for which the dense path is chosen by itself."""

MANY_FINE_STEPS, MOST_FINE_STEPS = 80, 160
"""Steps of the fine rule that do as a rule, and at most, where the quadrature error alone would take more than half of
the precision asked for: no number of probe vectors makes up for that."""

VECTOR_STEPS = 8
"""Lanczos steps spent on the spectral measure of a vector; at most a tenth of the products allowed."""

AT_ONCE, ENTRIES = 16, 2**26
"""Most probe vectors that advance together, and most entries that they have beyond the usual block."""


OnPairs = Callable[[NDArray[np.float64], Tensor], None]
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
        wanted = precision or _precision_of_positive_trace
        left = max(1, max_hvps - (operator.num_hvps - spent))
        result = _Sampling(
            operator,
            wanted,
            traces,
            ends=(bottom, top),
            most_steps=most_steps,
            rtol=rtol,
            max_hvps=left,
            seed=seed,
            on_progress=on_progress,
            on_pairs=on_pairs,
        ).run()
    cost = (operator.num_hvps - spent, time.perf_counter() - started)
    return _curvature(result, dim=operator.dim, cost=cost, vector_measure=vector_measure, hvp=operator.hvp)


@dataclass(frozen=True)
class _Result:
    spectrum: SampledSpectrum
    ritz: tuple[Eigenvalue, ...]
    method: Method
    block_traces: tuple[Estimate, ...] | None
    notes: tuple[str, ...] = ()
    start: Jacobi | None = None


def _dense(operator: LinearOperator, traces: BlockTraces | None) -> _Result:
    eigenvalues, asymmetry = dense_eigenvalues(operator)
    blocks = None if traces is None else traces.exact(operator.dense().diagonal())
    every = tuple(Eigenvalue(float(value), residual=asymmetry, converged=True) for value in eigenvalues)
    return _Result(SampledSpectrum.exact(eigenvalues), every, "dense", blocks)


class _Sampling(Sampling):
    """The stochastic path: a chain for the outliers, then probe vectors of their complement."""

    def __init__(
        self,
        operator: LinearOperator,
        precision: Precision,
        traces: BlockTraces | None,
        *,
        ends: tuple[int, int],
        most_steps: int,
        rtol: float,
        max_hvps: int,
        seed: int,
        on_progress: OnProgress | None,
        on_pairs: OnPairs | None,
    ) -> None:
        super().__init__(operator, ends=ends, max_hvps=max_hvps, seed=seed, on_progress=on_progress)
        self._on_pairs = on_pairs
        self._precision = precision
        self._traces = traces
        self._most_steps = most_steps
        self._rtol = rtol

    def run(self) -> _Result:
        op, traces, chain = self._operator, self._traces, self._outliers()
        start = chain.jacobi
        ritz, deflated = ritz_values(start, dtype=op.dtype), Deflated.of(start)
        deflation = Deflation(chain, deflated)
        basis = deflation.vectors
        if traces is not None:
            traces.deflate(deflation)
        if self._on_pairs is not None:
            self._on_pairs(deflated.values, basis.whole() if isinstance(basis, SharedBasis) else basis)
        noise = rounding(op.dtype, max(map(abs, deflated.ends)))
        state = Complement.of(deflated, dim=op.dim, rounding=noise, precision=rounding(op.dtype, 1.0))
        if state.dimension > 0:
            self._sample(state, deflation)
        spectrum = state.spectrum()
        blocks = None if traces is None else traces.estimates(spectrum)
        return _Result(spectrum, ritz, "deflated-slq", blocks, tuple(self._notes), start)

    def _ahead(self, chain: Chain, beyond: Beyond) -> float:
        """Products of a plan for what is left of the chain's start, a stand-in for a probe vector that is free.

        In a flat group of eigenvalues nothing is left of it although most of the group is yet to come: it takes at
        least as many products as the trace does.
        """
        deflated = Deflated.of(chain.jacobi)
        size = max(abs(beyond.trace().value), float(np.abs(chain.jacobi.eigh()[0]).sum()), np.finfo(float).tiny)
        least = 2 * float(np.mean(beyond.squares)) * (1.96 / (self._rtol * size)) ** 2
        mass = float(deflated.rest.weights.sum())
        if mass == 0:
            return least
        left = Spectrum(deflated.rest.nodes, beyond.dimension * deflated.rest.weights / mass)
        whole = joined([(1.0, Spectrum.of(deflated.values)), (1.0, left)])
        noise = Noise(SampledSpectrum(whole, left, 1, beyond.dimension), self._precision)
        return max(least, noise.plan(0.5 * self._rtol, length=SHORT_LENGTHS[0], have=1).cost)

    # --- probe vectors --------------------------------------------------------------------------------------------

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
            reached, floor = self._precision(spectrum), self._precision(spectrum.with_endless_sampling())
            self._report("bulk", reached)
            if reached <= max(self._rtol, FUTILE * floor):
                return
            if ahead is None or not (missing := state.missing(ahead)):
                ahead = self._plan(state)
                state.length = ahead.length
                missing = state.missing(ahead) or (0, max(BLOCK, state.num_vectors // 4))  # Student's share
            if not self._draw(state, deflation, *missing):
                return

    def _draw(self, state: Complement, deflation: Deflation, shorts: int, vectors: int) -> bool:
        """Draw about half of the probe vectors that are missing; whether the budget allowed for any."""
        at_once = max(BLOCK, min(AT_ONCE, ENTRIES // self._operator.dim))
        shorts = min(shorts, max(BLOCK, shorts // 2), self._left // state.length)
        if shorts > 0:
            for count in _blocks(shorts, at_once):
                state.shorts += self._recurrences(count, deflation).extend(state.length).jacobis()
            return True
        vectors = min(max(vectors, 1), max(BLOCK, vectors // 2), self._left)
        for count in _blocks(vectors, at_once):
            starts = deflation.project(self._normal(count, self._probe_generator))
            products = project_out(self._operator.matmat(starts), deflation.vectors)
            self._take_first_steps(state, starts, products)
        return vectors > 0

    def _draw_fine(self, state: Complement, deflation: Deflation) -> None:
        """Follow the first probe vector until its own quadrature error leaves room for sampling error."""
        most = max(2, min(self._most_steps, self._left // 2, state.dimension))
        chain = self._recurrences(1, deflation)
        while True:
            size = 0 if state.fine is None else state.fine.size
            (state.fine,) = chain.extend(min(MORE_STEPS if size else FIRST_STEPS, most - size)).jacobis()
            state.length = state.fine.size
            quadrature = self._precision(state.spectrum().with_endless_sampling())
            self._report("bulk", None)
            if state.fine.size in (size, most) or quadrature <= self._rtol / 4:
                return
            many = state.fine.size >= MANY_FINE_STEPS
            if quadrature <= self._rtol / 2 and (many or self._plan(state).cost <= state.fine.size):
                return

    def _recurrences(self, count: int, deflation: Deflation) -> Recurrences:
        starts = deflation.project(self._normal(count, self._probe_generator))
        on_first = None if self._traces is None else self._traces.add
        return Recurrences(self._operator, starts, deflated=deflation.vectors, on_first=on_first)

    def _take_first_steps(self, state: Complement, vectors: Tensor, products: Tensor) -> None:
        state.firsts += first_steps(vectors, products)
        if self._traces is not None:
            scale = lengths(vectors)
            self._traces.add(vectors / scale, products / scale)

    def _plan(self, state: Complement) -> Plan:
        return plan(state, self._precision, rtol=self._rtol, budget=self._left)


def _blocks(count: int, most: int) -> list[int]:
    return [min(most, count - begin) for begin in range(0, count, most)]


def _curvature(
    result: _Result, *, dim: int, cost: tuple[int, float], vector_measure: Spectrum | None, hvp: str | None
) -> Curvature:
    spectrum, notes = result.spectrum, result.notes
    positive = spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    trace, norm = spectrum.trace_of(lambda x: x), spectrum.trace_of(np.square)
    if result.start is not None:
        trace, norm, disagreements = compared(trace, norm, result.start, dim=dim)
        spectrum = _widened(spectrum, result.ritz, by=trace.quadrature - spectrum.trace_of(lambda x: x).quadrature)
        notes = (*notes, *disagreements)
    # Few products leave the positive part open, of which this much is certain.
    positive = replace(positive, value=max(positive.value, trace.value, result.ritz[-1].value, 0.0))
    positive_sq = spectrum.fine.trace_of(lambda x: np.maximum(x, 0.0) ** 2)
    return Curvature(
        trace=trace,
        frobenius_sq=norm,
        lambda_max=result.ritz[-1],
        lambda_min=result.ritz[0],
        trace_positive=positive,
        negative_mass=max(0.0, spectrum.fine.trace_of(lambda x: np.maximum(-x, 0.0)), positive.value - trace.value),
        effective_rank=positive.value**2 / positive_sq if positive_sq > 0 else 0.0,
        method=result.method,
        num_hvps=cost[0],
        seconds=cost[1],
        spectrum=spectrum,
        ritz=result.ritz,
        block_traces=result.block_traces,
        vector_measure=vector_measure,
        notes=notes,
        hvp=hvp,
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
