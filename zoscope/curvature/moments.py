"""Trace, norm and largest eigenvalue alone, which take fewer products than a spectrum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.apart import Apart, Pieces, fewer_pieces, pieces_apart, variances
from zoscope.curvature.complement import Deflated
from zoscope.curvature.lanczos import Chain, Rows, project_out
from zoscope.curvature.measure import (
    BLOCK,
    FEWEST_HVPS,
    FIRST_STEPS,
    MANY_STEPS,
    MORE_STEPS,
    OnProgress,
    chain_steps,
    measure,
)
from zoscope.curvature.operators import LinearOperator, ShardOperator
from zoscope.curvature.results import NORM, Eigenvalue, Moments, relative, ritz_values
from zoscope.curvature.slq import Split, probe_block, split
from zoscope.errors import UsageError
from zoscope.runtime import spawn_generators
from zoscope.theory.spectrum import Estimate, SampledSpectrum

SMALL = 100
"""Dimension up to which all eigenvalues are computed: that takes no more products than sampling."""

FAR = 3.0
"""Products of sampling, in units of the chain, up to which a chain stops that no longer saves more than it takes."""

PILOT_PIECES, PILOT_VECTORS = 4, 2
"""Least that tells how much pieces help, beside a quarter of them: about half a product each time."""

COARSER = 1.15
"""Variance of larger pieces, in units of that of the best, up to which they are taken: they take less overhead."""

PAYS = 0.7
"""Variance of a sweep of pieces, in units of that of a product, below which they are used: a sweep takes longer."""

FEWEST_SHARED = 3
"""Shared vectors beside the chain's start, which may have missed an outlier: what it scatters then tells."""

LARGEST_EXPONENT = 100.0
"""Of an error that is as good as infinite."""

AT_ONCE, ENTRIES = 16, 2**26
"""Most vectors drawn together, and most entries that they have beyond the usual block."""


def measure_moments(
    operator: LinearOperator,
    *,
    rtol: float = 0.01,
    max_hvps: int = 600,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Moments:
    """Measure trace, norm and the largest eigenvalue of a symmetric operator.

    Args:
        operator: Symmetric operator of dimension d.
        rtol: 95 % half-width wanted of the trace, relative to it; three times as much of ``‖M‖_F²``.
        max_hvps: Products allowed.
        seed: Of the probe vectors.
        on_progress: Called after every stage, with ``Moments.error`` so far.

    Returns:
        The measurement; whether ``rtol`` was reached is for the caller to see: ``result.error``.

    Raises:
        ValueError: If an argument is out of range.
        UsageError: If the budget is too small for an error bar.
        NumericalError: If a product is not finite.
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be > 0, got {rtol}")
    if max_hvps < FEWEST_HVPS:
        raise UsageError(f"--max-hvps {max_hvps}: an error bar takes at least {FEWEST_HVPS} products. Raise it.")
    return _Measurement(operator, rtol=rtol, max_hvps=max_hvps, seed=seed, on_progress=on_progress).run()


class _Measurement:
    def __init__(
        self,
        operator: LinearOperator,
        *,
        rtol: float,
        max_hvps: int,
        seed: int,
        on_progress: OnProgress | None,
    ) -> None:
        self._operator = operator
        self._rtol = rtol
        self._max_hvps = max_hvps
        self._on_progress = on_progress
        self._begin, self._first = time.perf_counter(), operator.num_hvps
        self._chain_generator, self._probe_generator, self._pilot_generator = spawn_generators(seed, 3, operator.device)
        self._pieces = pieces_apart(operator.objective) if isinstance(operator, ShardOperator) else None
        self._count = 0  # of pieces, as many as help
        self._looked_at = 0  # steps of the chain when it was last measured how much pieces help
        self._ratio = 1.0  # variance of a sweep of pieces, in units of that of a product; 1 where they do not pay
        self._notes: list[str] = []

    def run(self) -> Moments:
        op = self._operator
        if op.dim <= min(SMALL, self._max_hvps):
            found = measure(op, method="dense")
            return self._result(found.spectrum, found.trace, found.ritz, pieces=1)
        chain = self._chain()
        parts = split(chain.jacobi, dim=op.dim)
        ritz, state = ritz_values(chain.jacobi), _state(parts, dim=op.dim)
        basis = chain.combine(parts.vectors)
        self._share_vectors(state, basis)
        spectrum = state.spectrum()
        trace = _trace(spectrum)
        if self._pieces is None or self._ratio == 1:
            return self._result(spectrum, trace, ritz, pieces=1)
        assert isinstance(op, ShardOperator)
        pieces = self._pieces if self._count == len(self._pieces) else fewer_pieces(op.objective, self._count)
        trace = self._sample_apart(state, basis, trace, pieces=pieces)
        return self._result(spectrum, trace, ritz, pieces=len(pieces))

    # --- the chain ------------------------------------------------------------------------------------------------

    def _chain(self) -> Chain:
        """Extend the chain until the largest eigenvalue is known and sampling takes no more products than the chain."""
        op = self._operator
        most, note = chain_steps(op, most=MANY_STEPS, max_hvps=self._max_hvps)
        self._notes += note
        start = torch.randn(op.dim, generator=self._chain_generator, dtype=op.dtype, device=op.device)
        chain = Chain(op, start, capacity=most)
        chain.extend(min(FIRST_STEPS, most))
        while not chain.exhausted and chain.jacobi.size < most and not self._suffices(chain):
            self._report("outliers", None)
            chain.extend(min(MORE_STEPS, most - chain.jacobi.size))
        return chain

    def _suffices(self, chain: Chain) -> bool:
        steps = chain.jacobi.size
        parts = split(chain.jacobi, dim=self._operator.dim)
        state = _state(parts, dim=self._operator.dim)
        if not (state.is_known and ritz_values(chain.jacobi)[-1].converged):
            return False
        if self._looked_at == 0:
            self._pilot(chain, parts, state)
        if self._looked_at < steps and self._saves_no_more(chain, state):
            self._pilot(chain, parts, state)  # what was deflated since then helps shared vectors more than pieces
        return self._saves_no_more(chain, state)

    def _saves_no_more(self, chain: Chain, state: Deflated) -> bool:
        """Whether more steps of the chain take more products than they save."""
        steps, ahead = chain.jacobi.size, self._ahead(state)
        if ahead <= steps or ahead > FAR * steps:
            return ahead <= steps
        before = _state(split(chain.jacobi.head(steps - MORE_STEPS), dim=self._operator.dim), dim=self._operator.dim)
        return before.is_known and self._ahead(before) - ahead < MORE_STEPS

    def _ahead(self, state: Deflated) -> float:
        """Products that sampling takes after a chain."""
        trace, norm = self._products_for(state.spectrum())
        return norm + self._ratio * (trace - norm) if trace > norm else norm

    def _products_for(self, spectrum: SampledSpectrum) -> tuple[float, float]:
        """Shared probe vectors, in all, that the trace takes, and the norm; infinite where no number suffices."""
        products = [
            _probes_for(spectrum, estimate, rtol=rtol)
            for estimate, rtol in ((_trace, self._rtol), (_norm, NORM * self._rtol))
        ]
        return products[0], products[1]

    def _pilot(self, chain: Chain, parts: Split, state: Deflated) -> None:
        """Find how many pieces help, and the variance of their sweep in units of that of a product, from a few."""
        self._looked_at, self._ratio = chain.jacobi.size, 1.0
        op, pieces = self._operator, self._pieces
        joint = 2 * state.spectrum().sampled.trace_of(np.square)
        if pieces is None or joint <= 0:
            return
        assert isinstance(op, ShardOperator)
        vectors = _unit(chain.project_out(self._normal(PILOT_VECTORS, self._pilot_generator), parts.vectors))
        seen = [
            weight * chain.project_out(products, parts.vectors)
            for weight, _, products in op.apart(pieces[: max(PILOT_PIECES, len(pieces) // 4)], lambda: vectors)
        ]
        found = variances(seen, count=len(pieces), dimension=state.dimension)
        self._count = min(count for count, variance in found.items() if variance <= COARSER * min(found.values()))
        # No less by Cauchy and Schwarz; less is seen where a quarter of the examples does not bend the loss at all.
        ratio = max(found[self._count] / joint, 1 / self._count)
        self._ratio = ratio if ratio <= PAYS else 1.0

    # --- probe vectors --------------------------------------------------------------------------------------------

    def _share_vectors(self, state: Deflated, basis: Rows) -> None:
        """Sample with vectors that all examples share, as many as the norm takes; the trace too without pieces."""
        missing = 1
        while state.dimension > 0:
            if state.is_known:
                spectrum = state.spectrum()
                trace, norm = self._products_for(spectrum)
                wanted = [trace, norm] if self._ratio == 1 else [norm]
                # What deflation leaves open does not average out.
                needed = max((n for n in wanted if math.isfinite(n)), default=0.0)
                missing = max(math.ceil(needed), 1 + FEWEST_SHARED) - spectrum.num_probes
                self._report("bulk", self._error(spectrum, _trace(spectrum)))
            most = max(BLOCK, min(AT_ONCE, ENTRIES // self._operator.dim, missing // 2))  # few vectors ask for too many
            probes = min(most, missing, self._left)
            if probes < 1:
                return
            state.shorts += probe_block(
                self._operator, basis, probes=probes, length=1, shape=state.shape, generator=self._probe_generator
            )

    def _sample_apart(self, state: Deflated, basis: Rows, shared: Estimate, *, pieces: Pieces) -> Estimate:
        """Add sweeps in which every piece has vectors of its own until the trace is known, or the budget spent."""
        op, ratio = self._operator, self._ratio
        assert isinstance(op, ShardOperator)
        op.release()  # the graph of the whole is not needed any more
        sampled, num_shared = Apart(state.dimension), state.spectrum().num_probes
        both, exact = shared, state.exact.trace
        while True:
            room = self._rtol * abs(both.value) - both.quadrature
            if both.half_width <= self._rtol * abs(both.value) or room <= 0:
                return both
            count = num_shared + sampled.sweeps / ratio
            missing = ratio * count * ((1.96 * both.stderr / room) ** 2 - 1)
            sweeps = min(max(1, math.ceil(missing)), self._left, AT_ONCE)
            if sweeps < 1:
                return both

            def draw(sweeps: int = sweeps) -> Tensor:
                return _unit(project_out(self._normal(sweeps, self._probe_generator), basis))

            for weight, vectors, products in op.apart(pieces, draw):
                sampled.add(weight, vectors, project_out(products, basis))
            sampled.sweeps += sweeps
            own = sampled.estimate
            # Weights by the pilot, not by what they weigh, which would favour small values.
            part = num_shared / (num_shared + sampled.sweeps / ratio)
            value = part * shared.value + (1 - part) * (exact + own.value)
            both = Estimate(value, math.hypot(part * shared.stderr, (1 - part) * own.stderr), shared.quadrature)
            self._report("pieces", relative(both))

    def _normal(self, count: int, generator: torch.Generator) -> Tensor:
        op = self._operator
        return torch.randn(count, op.dim, generator=generator, dtype=op.dtype, device=op.device)

    # --- the result -----------------------------------------------------------------------------------------------

    @property
    def _left(self) -> int:
        return self._max_hvps - (self._operator.num_hvps - self._first)

    def _error(self, spectrum: SampledSpectrum, trace: Estimate) -> float:
        return max(relative(trace), relative(_norm(spectrum)) / NORM)

    def _report(self, stage: str, reached: float | None) -> None:
        if self._on_progress is not None:
            self._on_progress(stage, self._operator.num_hvps - self._first, reached)

    def _result(
        self, spectrum: SampledSpectrum, trace: Estimate, ritz: tuple[Eigenvalue, ...], *, pieces: int
    ) -> Moments:
        self._report("done", self._error(spectrum, trace))
        return Moments(
            trace=trace,
            frobenius_sq=_norm(spectrum),
            lambda_max=ritz[-1],
            pieces=pieces,
            num_hvps=self._operator.num_hvps - self._first,
            seconds=time.perf_counter() - self._begin,
            hvp=self._operator.hvp,
            notes=tuple(self._notes),
        )


def _state(parts: Split, *, dim: int) -> Deflated:
    """What a chain tells, to be followed by probe vectors of one product each."""
    state = Deflated.of(parts, dim=dim)
    state.length = 1
    return state


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return unit


def _trace(spectrum: SampledSpectrum) -> Estimate:
    return spectrum.trace_of(lambda values: values)


def _norm(spectrum: SampledSpectrum) -> Estimate:
    """``‖M‖_F²``, with the error that its logarithm has: a sum of squares is skewed, and a small one looks precise."""
    plain, part = spectrum.trace_of(np.square), spectrum.sampled.trace_of(np.square)
    if not part > 0 or plain.stderr == 0:
        return plain
    return replace(plain, stderr=part * math.expm1(min(1.96 * plain.stderr / part, LARGEST_EXPONENT)) / 1.96)


def _probes_for(spectrum: SampledSpectrum, estimate_of: Callable[[SampledSpectrum], Estimate], *, rtol: float) -> float:
    """Probe vectors, in all, with which an estimate is known to ``rtol``; 0 where it is, infinite where never."""
    estimate = estimate_of(spectrum)
    room = rtol * abs(estimate.value) - estimate.quadrature
    if 1.96 * estimate.stderr <= room:
        return 0.0
    if room <= 0:
        return math.inf
    count = least = spectrum.num_probes + 1
    for _ in range(4):  # a fixed point: more vectors know their own error better, too
        error = 1.96 * estimate_of(replace(spectrum, num_probes=count)).stderr
        count = max(least, math.ceil(count * (error / room) ** 2))
    return float(count)
