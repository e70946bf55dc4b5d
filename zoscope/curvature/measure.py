"""One pass over an operator that yields trace, norm, extreme eigenvalues and the spectrum behind every threshold."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.basis import SharedBasis, vectors_that_fit
from zoscope.curvature.complement import Deflated, Plan, Precision, plan, probes_missing
from zoscope.curvature.dense import dense_eigenpairs, dense_eigenvalues
from zoscope.curvature.diagonal import BlockTraces
from zoscope.curvature.lanczos import Chain, Jacobi
from zoscope.curvature.operators import DenseOperator, LinearOperator
from zoscope.curvature.results import Curvature, Eigenvalue, Method, ritz_values
from zoscope.curvature.slq import measure_of, probe_block, split
from zoscope.errors import UsageError
from zoscope.runtime import available_memory, spawn_generators
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum

FEWEST_HVPS = 20
"""Products below which neither the outliers nor the error of the rest can be told."""

DENSE_LIMIT = 4096
"""Largest dimension for which the dense path is chosen by itself."""

FIRST_STEPS, MORE_STEPS, MANY_STEPS, MOST_STEPS = 12, 6, 80, 160
"""Length of the long chain: at first, by how much it grows, what does as a rule, and at most, where the quadrature
error alone would take more than half of the precision asked for: no number of probe vectors makes up for that."""

VECTOR_STEPS = 8
"""Lanczos steps spent on the spectral measure of a vector; at most a tenth of the products allowed."""

BLOCK = 4
"""Probe vectors that advance together."""

MEMORY_SHARE = 0.4
"""Part of the free memory that a Lanczos basis may take."""


OnProgress = Callable[[str, int, float | None], None]
"""Called with the stage, the products spent in it and the relative half-width reached, if there is one."""

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
    most_steps: int = MOST_STEPS,
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
        most_steps: Most steps of the long chain, which keeps as many vectors: they resolve the bulk of the spectrum.
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
    return _curvature(result, cost=cost, vector_measure=vector_measure, hvp=operator.hvp)


@dataclass(frozen=True)
class _Result:
    spectrum: SampledSpectrum
    ritz: tuple[Eigenvalue, ...]
    method: Method
    block_traces: tuple[Estimate, ...] | None
    notes: tuple[str, ...] = ()


def _dense(operator: LinearOperator, traces: BlockTraces | None) -> _Result:
    eigenvalues, asymmetry = dense_eigenvalues(operator)
    blocks = None if traces is None else traces.exact(operator.dense().diagonal())
    every = tuple(Eigenvalue(float(value), residual=asymmetry, converged=True) for value in eigenvalues)
    return _Result(SampledSpectrum.exact(eigenvalues), every, "dense", blocks)


class _Sampling:
    """The stochastic path: one long chain, then short chains until the error is small enough or the budget is spent."""

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
        self._on_pairs = on_pairs
        self._operator = operator
        self._precision = precision
        self._traces = traces
        self._ends = ends
        self._most_steps = most_steps
        self._rtol = rtol
        self._max_hvps = max_hvps
        self._first = operator.num_hvps
        self._on_progress = on_progress
        self._chain_generator, self._probe_generator = spawn_generators(seed, 2, operator.device)
        self._notes: list[str] = []

    def run(self) -> _Result:
        op, traces, chain = self._operator, self._traces, self._long_chain()
        jacobi = chain.jacobi
        parts = split(jacobi, dim=op.dim)
        basis = chain.combine(parts.vectors) if traces is None else traces.deflate(chain, parts)
        if self._on_pairs is not None:
            self._on_pairs(parts.values, basis.whole() if isinstance(basis, SharedBasis) else basis)
        state = Deflated.of(parts, dim=op.dim)
        ahead = self._plan(state)
        state.length, missing = ahead.length, ahead.probes
        while state.dimension > 0:
            probes = min(BLOCK, missing, self._left // state.length)
            if state.is_known and probes == 0:
                break
            state.shorts += probe_block(
                op,
                basis,
                probes=max(1, probes),
                length=state.length,
                generator=self._probe_generator,
                on_first=None if traces is None else traces.add,
            )
            _, missing = probes_missing(state, self._precision, rtol=self._rtol)
            _, reached = self._best(state)
            self._report("bulk", reached)
            if reached <= self._rtol or missing == 0:
                break
        spectrum, _ = self._best(state)
        blocks = None if traces is None else traces.estimates(spectrum)
        return _Result(spectrum, ritz_values(jacobi), "deflated-slq", blocks, tuple(self._notes))

    def _best(self, state: Deflated) -> tuple[SampledSpectrum, float]:
        """Of the two ways to put the rules together the one that tells more of what is wanted, and how well.

        Short rules where they do: of what is not wanted, such as other horizons, they tell more.
        """
        usual, shaped = state.spectrum(), state.shaped()
        reached = self._precision(usual)
        if shaped is None or reached <= self._rtol:
            return usual, reached
        return min((usual, reached), (shaped, self._precision(shaped)), key=lambda pair: pair[1])

    @property
    def _left(self) -> int:
        return self._max_hvps - (self._operator.num_hvps - self._first)

    def _long_chain(self) -> Chain:
        """Extend the chain until its own quadrature error leaves room for sampling error, within budget and memory.

        Beyond that as long as sampling would take more products than the chain: what is deflated does not scatter.
        """
        most, notes = chain_steps(self._operator, most=self._most_steps, max_hvps=self._max_hvps)
        self._notes += notes
        start = torch.randn(
            self._operator.dim,
            generator=self._chain_generator,
            dtype=self._operator.dtype,
            device=self._operator.device,
        )
        chain = Chain(self._operator, start, capacity=most)
        chain.extend(min(FIRST_STEPS, most))
        self._report("outliers", None)
        while not chain.exhausted and chain.jacobi.size < most and not self._suffices(chain.jacobi):
            chain.extend(min(MORE_STEPS, most - chain.jacobi.size))
            self._report("outliers", None)
        return chain

    def _suffices(self, jacobi: Jacobi) -> bool:
        state = Deflated.of(split(jacobi, dim=self._operator.dim), dim=self._operator.dim)
        if not (state.is_known and self._ends_converged(jacobi)):
            return False
        quadrature = self._precision(state.spectrum().with_endless_sampling())
        if jacobi.size >= MANY_STEPS:
            return quadrature <= self._rtol / 2
        return quadrature <= self._rtol / 4 and self._plan(state).cost <= jacobi.size

    def _plan(self, state: Deflated) -> Plan:
        return plan(state, self._precision, rtol=self._rtol, budget=self._left)

    def _ends_converged(self, jacobi: Jacobi) -> bool:
        found, (bottom, top) = ritz_values(jacobi), self._ends
        return all(eigenvalue.converged for eigenvalue in (*found[:bottom], *found[len(found) - top :]))

    def _report(self, stage: str, reached: float | None) -> None:
        if self._on_progress is not None:
            spent = self._operator.num_hvps - self._first
            self._on_progress(stage, spent, reached)


def chain_steps(operator: LinearOperator, *, most: int, max_hvps: int, beside: int = 0) -> tuple[int, list[str]]:
    """Steps of a long chain: ``most``, a third of the products, or what memory less ``beside`` vectors holds.

    Returns:
        The steps, and what a user should know of them.
    """
    row = operator.dim * torch.empty((), dtype=operator.dtype).element_size()
    crew = operator.crew
    free = available_memory(operator.device) if crew is None else crew.memory_for_vectors()
    fits = vectors_that_fit(MEMORY_SHARE, row, free=free) - 4 * BLOCK - 1 - beside
    most = min(most, max(min(max_hvps, 2), max_hvps // 3), operator.dim)
    if fits >= most:
        return most, []
    most = max(2, fits)
    return most, [
        f"Memory for {most} Lanczos vectors of {row / 2**20:.0f} MiB only: fewer outliers are deflated, so the same "
        "precision takes more probe vectors."
    ]


def _curvature(
    result: _Result, *, cost: tuple[int, float], vector_measure: Spectrum | None, hvp: str | None
) -> Curvature:
    spectrum = result.spectrum
    trace, positive = spectrum.trace_of(lambda x: x), spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    # Few products leave the positive part open, of which this much is certain.
    positive = replace(positive, value=max(positive.value, trace.value, result.ritz[-1].value, 0.0))
    positive_sq = spectrum.fine.trace_of(lambda x: np.maximum(x, 0.0) ** 2)
    return Curvature(
        trace=trace,
        frobenius_sq=spectrum.trace_of(np.square),
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
        notes=result.notes,
        hvp=hvp,
    )


def _precision_of_positive_trace(spectrum: SampledSpectrum) -> float:
    trace = spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    return trace.half_width / trace.value if trace.value > 0 else 0.0
