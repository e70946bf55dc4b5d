"""Trace, norm and largest eigenvalue alone, which take fewer products than a spectrum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.apart import Apart, Pieces, fewer_pieces, pieces_apart, variances
from zoscope.curvature.beyond import KEPT, Beyond, exact_part
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
from zoscope.errors import UsageError
from zoscope.runtime import spawn_generators
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import NORMAL

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

UNREACHABLE, SMALLEST = 10**9, 1e-100
"""A number of vectors that nobody waits for, and a width that no number reaches."""

FEWEST_SHARED = 3
"""Shared vectors drawn before it is known how many will be needed."""

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
        self._early: list[Tensor] = []  # vectors and their products
        self._notes: list[str] = []

    def run(self) -> Moments:
        op = self._operator
        if op.dim <= min(SMALL, self._max_hvps):
            found = measure(op, method="dense")
            return self._result(found.trace, found.frobenius_sq, found.ritz, pieces=1)
        chain = self._chain()
        ritz, steps = ritz_values(chain.jacobi), chain.jacobi.size
        if steps == op.dim:
            trace, norm = (Estimate(value, 0.0) for value in exact_part(chain.jacobi))
            return self._result(trace, norm, ritz, pieces=1)
        beyond = self._beyond(chain)
        basis = chain.combine(np.eye(steps))
        self._early.clear()
        self._share_vectors(beyond, basis)
        if self._pieces is None or self._ratio == 1:
            return self._result(beyond.trace(), beyond.norm(), ritz, pieces=1)
        assert isinstance(op, ShardOperator)
        pieces = self._pieces if self._count == len(self._pieces) else fewer_pieces(op.objective, self._count)
        return self._result(self._sample_apart(beyond, basis, pieces=pieces), beyond.norm(), ritz, pieces=len(pieces))

    # --- the chain ------------------------------------------------------------------------------------------------

    def _chain(self) -> Chain:
        """Extend the chain until the largest eigenvalue is known and more steps take more products than they save."""
        op = self._operator
        most, note = chain_steps(op, most=MANY_STEPS, max_hvps=self._max_hvps, beside=KEPT)
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
        if not ritz_values(chain.jacobi)[-1].converged:
            return False
        beyond = self._beyond(chain)
        if self._looked_at == 0:
            self._pilot(chain, beyond)
        if self._looked_at < steps and self._saves_no_more(chain, beyond):
            self._pilot(chain, beyond)  # what was deflated since then helps shared vectors more than pieces
        return self._saves_no_more(chain, beyond)

    def _saves_no_more(self, chain: Chain, beyond: Beyond) -> bool:
        """Whether more steps of the chain take more products than they save."""
        steps, ahead = chain.jacobi.size, self._ahead(beyond)
        if ahead <= MORE_STEPS or ahead > FAR * steps:
            return ahead <= MORE_STEPS
        gained = beyond.exact[1] - exact_part(chain.jacobi.head(steps - MORE_STEPS))[1]
        wanted = max(self._rtol * abs(beyond.trace().value) / NORMAL, SMALLEST)  # standard error
        return self._ratio * 2 * gained < MORE_STEPS * wanted**2

    def _ahead(self, beyond: Beyond) -> float:
        """Products that sampling takes after a chain."""
        trace, norm = self._vectors_for(beyond)
        return norm + self._ratio * (trace - norm) if trace > norm else norm

    def _vectors_for(self, beyond: Beyond) -> tuple[int, int]:
        """Shared probe vectors, in all, that the trace takes, and the norm."""
        return (
            _vectors_for(beyond.trace, beyond.count, rtol=self._rtol),
            _vectors_for(beyond.norm, beyond.count, rtol=NORM * self._rtol),
        )

    def _beyond(self, chain: Chain) -> Beyond:
        """What the first shared vectors tell: they are drawn early, and looked at from every chain since."""
        if not self._early:
            vectors = self._normal(FEWEST_SHARED, self._probe_generator)
            self._early = [vectors, self._operator.matmat(vectors)]
        beyond = Beyond(exact_part(chain.jacobi), self._operator.dim - chain.jacobi.size)
        beyond.add(*chain.beyond(self._early[0], self._early[1]))
        return beyond

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

    def _normal(self, count: int, generator: torch.Generator) -> Tensor:
        op = self._operator
        return torch.randn(count, op.dim, generator=generator, dtype=op.dtype, device=op.device)

    def _projected(self, count: int, basis: Rows) -> Tensor:
        once = project_out(self._normal(count, self._probe_generator), basis)
        return project_out(once, basis)  # the second time removes what rounding left of the first

    # --- the result -----------------------------------------------------------------------------------------------

    @property
    def _left(self) -> int:
        return self._max_hvps - (self._operator.num_hvps - self._first)

    def _report(self, stage: str, reached: float | None) -> None:
        if self._on_progress is not None:
            self._on_progress(stage, self._operator.num_hvps - self._first, reached)

    def _result(self, trace: Estimate, norm: Estimate, ritz: tuple[Eigenvalue, ...], *, pieces: int) -> Moments:
        self._report("done", _error(trace, norm))
        return Moments(
            trace=trace,
            frobenius_sq=norm,
            lambda_max=ritz[-1],
            pieces=pieces,
            num_hvps=self._operator.num_hvps - self._first,
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
