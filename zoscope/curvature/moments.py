"""Trace, norm and largest eigenvalue alone, which take fewer products than a spectrum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.agreement import compared
from zoscope.curvature.apart import Apart, Pieces, fewer_pieces, pieces_apart, variances
from zoscope.curvature.beyond import KEPT, Beyond, exact_part
from zoscope.curvature.lanczos import Chain, Rows, project_out, rounding
from zoscope.curvature.measure import AT_ONCE, ENTRIES, measure
from zoscope.curvature.operators import LinearOperator, ShardOperator
from zoscope.curvature.results import NORM, Eigenvalue, Moments, relative, ritz_values
from zoscope.curvature.sampling import BLOCK, FEWEST_HVPS, OnProgress, Sampling
from zoscope.errors import UsageError
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import NORMAL

SMALL = 100
"""Dimension up to which all eigenvalues are computed: that takes no more products than sampling."""

PILOT_PIECES, PILOT_VECTORS = 4, 2
"""Least that tells how much pieces help, beside a quarter of them: about half a product each time."""

COARSER = 1.15
"""Variance of larger pieces, in units of that of the best, up to which they are taken: they take less overhead."""

PAYS = 0.7
"""Variance of a sweep of pieces, in units of that of a product, below which they are used: a sweep takes longer."""

UNREACHABLE, SMALLEST = 10**9, 1e-100
"""A number of vectors that nobody waits for, and a width that no number reaches."""


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


class _Measurement(Sampling):
    def __init__(
        self,
        operator: LinearOperator,
        *,
        rtol: float,
        max_hvps: int,
        seed: int,
        on_progress: OnProgress | None,
    ) -> None:
        super().__init__(operator, ends=(0, 1), max_hvps=max_hvps, seed=seed, kept=KEPT, on_progress=on_progress)
        self._rtol = rtol
        self._begin = time.perf_counter()
        self._pieces = pieces_apart(operator.objective) if isinstance(operator, ShardOperator) else None
        self._count = 0  # of pieces, as many as help
        self._looked_at = 0  # steps of the chain when it was last measured how much pieces help
        self._ratio = 1.0  # variance of a sweep of pieces, in units of that of a product; 1 where they do not pay

    def run(self) -> Moments:
        op = self._operator
        if op.dim <= min(SMALL, self._max_hvps):
            found = measure(op, method="dense")
            return self._result(found.trace, found.frobenius_sq, found.ritz, pieces=1)
        chain = self._outliers()
        start, pieces = chain.jacobi, 1
        if start.size == op.dim:
            trace, norm = (Estimate(value) for value in exact_part(start))
        else:
            trace, norm, pieces = self._sampled(chain)
        noise = rounding(op.dtype, 1.0)
        trace = replace(trace, quadrature=noise * abs(trace.value))
        norm = replace(norm, quadrature=2 * noise * norm.value)
        trace, norm, notes = compared(trace, norm, start, dim=op.dim)
        self._notes += notes
        return self._result(trace, norm, ritz_values(start, dtype=op.dtype), pieces=pieces)

    def _sampled(self, chain: Chain) -> tuple[Estimate, Estimate, int]:
        """Trace, norm and the number of pieces with vectors of their own."""
        op = self._operator
        beyond = self._beyond(chain)
        basis = chain.combine(np.eye(chain.jacobi.size))
        self._early.clear()
        self._share_vectors(beyond, basis)
        if self._pieces is None or self._ratio == 1:
            return beyond.trace(), beyond.norm(), 1
        assert isinstance(op, ShardOperator)
        pieces = self._pieces if self._count == len(self._pieces) else fewer_pieces(op.objective, self._count)
        return self._sample_apart(beyond, basis, pieces=pieces), beyond.norm(), len(pieces)

    # --- the chain ------------------------------------------------------------------------------------------------

    def _enough(self, chain: Chain, beyond: Beyond) -> bool:
        if self._looked_at == 0:
            self._pilot(chain, beyond)
        if self._looked_at < chain.jacobi.size and super()._enough(chain, beyond):
            self._pilot(chain, beyond)  # what was deflated since then helps shared vectors more than pieces
        return super()._enough(chain, beyond)

    def _ahead(self, chain: Chain, beyond: Beyond) -> float:
        trace, norm = self._vectors_for(beyond)
        return norm + self._ratio * (trace - norm) if trace > norm else norm

    def _saved(self, gained: float, ahead: float, beyond: Beyond) -> float:
        wanted = max(self._rtol * abs(beyond.trace().value) / NORMAL, SMALLEST)  # standard error
        return float(self._ratio * 2 * gained / wanted**2)

    def _vectors_for(self, beyond: Beyond) -> tuple[int, int]:
        """Shared probe vectors, in all, that the trace takes, and the norm."""
        return (
            _vectors_for(beyond.trace, beyond.count, rtol=self._rtol),
            _vectors_for(beyond.norm, beyond.count, rtol=NORM * self._rtol),
        )

    def _pilot(self, chain: Chain, beyond: Beyond) -> None:
        """Find how many pieces help, and the variance of their sweep in units of that of a product, from a few."""
        self._looked_at, self._ratio = chain.jacobi.size, 1.0
        op, pieces, joint = self._operator, self._pieces, beyond.variance
        if pieces is None or joint <= 0:
            return
        assert isinstance(op, ShardOperator)
        everything = np.eye(chain.jacobi.size)
        vectors = _unit(chain.project_out(self._normal(PILOT_VECTORS, self._pilot_generator), everything))
        seen = [
            weight * chain.project_out(products, everything)
            for weight, _, products in op.apart(pieces[: max(PILOT_PIECES, len(pieces) // 4)], lambda: vectors)
        ]
        found = variances(seen, count=len(pieces), dimension=beyond.dimension)
        self._count = min(count for count, variance in found.items() if variance <= COARSER * min(found.values()))
        # No less by Cauchy and Schwarz; less is seen where a quarter of the examples does not bend the loss at all.
        ratio = max(found[self._count] / joint, 1 / self._count)
        self._ratio = ratio if ratio <= PAYS else 1.0

    # --- probe vectors --------------------------------------------------------------------------------------------

    def _share_vectors(self, beyond: Beyond, basis: Rows) -> None:
        """Sample with vectors that all examples share, as many as the norm takes; the trace too without pieces."""
        while True:
            self._report("bulk", _error(beyond.trace(), beyond.norm()))
            trace, norm = self._vectors_for(beyond)
            missing = (max(trace, norm) if self._ratio == 1 else norm) - beyond.count
            most = max(BLOCK, min(AT_ONCE, ENTRIES // self._operator.dim, missing // 2))  # few vectors ask for too many
            probes = min(most, missing, self._left)
            if probes < 1:
                return
            vectors = _unit(self._projected(probes, basis))
            beyond.add(vectors, project_out(self._operator.matmat(vectors), basis))

    def _sample_apart(self, beyond: Beyond, basis: Rows, *, pieces: Pieces) -> Estimate:
        """Add sweeps in which every piece has vectors of its own until the trace is known, or the budget spent."""
        op, ratio = self._operator, self._ratio
        assert isinstance(op, ShardOperator)
        op.release()  # the graph of the whole is not needed any more
        sampled, num_shared = Apart(beyond.dimension), beyond.count
        both = shared = beyond.trace()
        while True:
            wanted = self._rtol * abs(both.value)
            if both.half_width <= wanted:
                return both
            count = num_shared + sampled.sweeps / ratio
            factor = min(both.half_width / max(wanted, SMALLEST), UNREACHABLE)
            missing = ratio * count * (factor**2 - 1)
            sweeps = min(max(1, math.ceil(missing)), self._left, AT_ONCE)
            if sweeps < 1:
                return both

            def draw(sweeps: int = sweeps) -> Tensor:
                return _unit(self._projected(sweeps, basis))

            for weight, vectors, products in op.apart(pieces, draw):
                sampled.add(weight, vectors, project_out(products, basis))
            sampled.sweeps += sweeps
            own = sampled.estimate
            # Weights by the pilot, not by what they weigh, which would favour small values.
            part = num_shared / (num_shared + sampled.sweeps / ratio)
            value = part * shared.value + (1 - part) * (beyond.exact[0] + own.value)
            both = Estimate(value, math.hypot(part * shared.stderr, (1 - part) * own.stderr))
            self._report("pieces", relative(both))

    def _projected(self, count: int, basis: Rows) -> Tensor:
        once = project_out(self._normal(count, self._probe_generator), basis)
        return project_out(once, basis)  # the second time removes what rounding left of the first

    # --- the result -----------------------------------------------------------------------------------------------

    def _result(self, trace: Estimate, norm: Estimate, ritz: tuple[Eigenvalue, ...], *, pieces: int) -> Moments:
        self._report("done", _error(trace, norm))
        return Moments(
            trace=trace,
            frobenius_sq=norm,
            lambda_max=ritz[-1],
            pieces=pieces,
            num_hvps=self._spent,
            seconds=time.perf_counter() - self._begin,
            hvp=self._operator.hvp,
            notes=tuple(self._notes),
        )


def _error(trace: Estimate, norm: Estimate) -> float:
    return max(relative(trace), relative(norm) / NORM)


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return unit


def _vectors_for(estimate: Callable[[int], Estimate], count: int, *, rtol: float) -> int:
    """Probe vectors, in all, with which an estimate that has ``count`` is known to ``rtol``; no fewer than those."""
    now = estimate(count)
    wanted, needed = rtol * abs(now.value), count
    if now.half_width <= wanted:
        return count
    for _ in range(4):  # a fixed point: more vectors know their own error better, too
        ratio = min(estimate(needed).half_width / max(wanted, SMALLEST), UNREACHABLE)
        needed = max(count + 1, math.ceil(min(needed * ratio**2, UNREACHABLE)))
    return needed
