"""Trace and Frobenius norm alone, from probe vectors that differ between strata of the data where that helps.

A trace is additive over the data: ``Tr H = Σ_b w_b Tr H_b`` for pieces b of the examples. A sweep that gives every
piece a random vector of its own costs what one product costs. Its variance is ``2 Σ w_b² ‖H_b‖_F²``, that of a product
``2 ‖H‖_F² = 2 Σ w_b w_c Tr H_b H_c``. Where the examples bend the loss in similar directions, as in most networks, most
of the latter is what different pieces have in common, and a sweep tells almost as much as there are pieces. Outliers of
the whole are deflated first. They are no eigenvectors of the pieces: where deflation does more than pieces can, a short
pilot says so, and probe vectors are shared by all examples as usual.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import Chain, Rows, lengths, project_out, require_finite, rounding
from zoscope.curvature.operators import LinearOperator, ShardOperator
from zoscope.curvature.slq import (
    AT_ONCE,
    BLOCK,
    ENTRIES,
    FEWEST_HVPS,
    KEPT,
    NORM,
    DeflatedHutchinson,
    Eigenvalue,
    Moments,
    OnProgress,
    Sampling,
    TraceAndNorm,
    compared,
    exact_part,
    measure,
    relative,
    ritz_values,
)
from zoscope.errors import UsageError
from zoscope.problem import Objective, SecondDerivativesByHand, Shard
from zoscope.theory.spectrum import NORMAL, Estimate, widening

MOST_APART, FEWEST_APART = 32, 4
"""Pieces that get probe vectors of their own: with more the error hardly falls further, with fewer it falls little."""

VECTORS_APART = 4
"""Graph of such a piece, in vectors of the parameters: drawing one and projecting it must cost little beside it."""

LEAST_APART = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of such a graph, below which a product is overhead."""

TRIED = 4
"""Examples whose graph is measured, and twice as many."""

SAME_LOSS = 1e-4
"""Relative difference of the loss that rounding makes where a batch is cut."""

Pieces = tuple[tuple[Shard, ...], ...]


def pieces_apart(objective: Objective) -> Pieces | None:
    """The data in pieces of about the same size whose mean losses add up to the loss, for probe vectors of their own.

    How many depends on the shapes of the graph alone, never on a timing: the same seed gives the same numbers.

    Args:
        objective: The prepared problem.

    Returns:
        Neighbouring micro-batches in each; ``None`` where the data cannot be cut into enough of them.
    """
    shards, rows = objective.shards, sum(shard.rows or 0 for shard in objective.shards)
    try:
        if objective.indivisible is None and all(shard.rows for shard in shards):
            size = bytes_per_row(objective) * rows
            vector = objective.num_params * torch.finfo(objective.dtype).bits // 8
            least = max(LEAST_APART.get(objective.device.type, 0), VECTORS_APART * vector)
            count = min(MOST_APART, rows, int(size / least))
            shards = objective.cut(math.ceil(rows / max(1, count)))
        else:
            count = MOST_APART
        count = min(count, len(shards))
        if count < FEWEST_APART:
            return None
        whole, parts = objective.value_of(objective.shards), objective.value_of(shards)
    except Exception:  # batches that cannot be cut, or a loss that wants them whole
        return None
    if not abs(whole - parts) <= SAME_LOSS * abs(whole):
        return None
    return _grouped(shards, count)


def fewer_pieces(objective: Objective, count: int) -> Pieces:
    """As `pieces_apart`, which found more than ``count`` of them, in larger ones: they take less overhead."""
    rows = sum(shard.rows or 0 for shard in objective.shards)
    can_be_cut = objective.indivisible is None and all(shard.rows for shard in objective.shards)
    shards = objective.cut(math.ceil(rows / count)) if can_be_cut else objective.shards
    return _grouped(shards, min(count, len(shards)))


def _grouped(shards: tuple[Shard, ...], count: int) -> Pieces:
    cuts = [round(place * len(shards) / count) for place in range(count + 1)]
    return tuple(shards[low:high] for low, high in itertools.pairwise(cuts))


def variances(products: list[Tensor], *, count: int, dimension: int) -> dict[int, float]:
    """Variance of a sweep by the number of pieces, from a few neighbouring ones of ``count``.

    Args:
        products: Of each with the same unit vectors of a complement, ``w_b P M_b z`` ``(k, d)``: those of larger pieces
            are their sums.
        count: How many pieces there are of this size.
        dimension: That of the complement.
    """
    share, found = len(products) / count, dict[int, float]()
    while True:
        squares = sum(float(p.double().square().sum()) for p in products)
        found[count] = 2 * dimension * squares / len(products[0]) / share
        if len(products) % 2 or count // 2 < FEWEST_APART:
            return found
        products, count = [one + two for one, two in zip(products[::2], products[1::2], strict=True)], count // 2


@dataclass
class StratifiedHutchinson:
    """Sweeps in which every piece had a vector of its own: estimates of ``Tr PMP`` on a complement.

    Args:
        dimension: That of the complement.
        values: ``w_b D zᵀM_b z`` per piece and vector.
        variances: ``2 w_b² D ‖P M_b z‖²`` per piece and vector, whose mean is the variance of one such value.
        sweeps: Vectors per piece.
    """

    dimension: int
    values: list[float] = field(default_factory=list)
    variances: list[float] = field(default_factory=list)
    sweeps: int = 0

    def add(self, weight: float, vectors: Tensor, products: Tensor) -> None:
        """Count unit vectors ``(k, d)`` of the complement and their projected products with one piece.

        Raises:
            NumericalError: If a product is not finite.
        """
        scale = weight * self.dimension
        self.values += [scale * float(v) for v in (vectors * products).sum(dim=1, dtype=torch.float64)]
        squares = products.square().sum(dim=1, dtype=torch.float64)
        require_finite(*squares.tolist())
        self.variances += [2 * scale * weight * float(square) for square in squares]

    @property
    def estimate(self) -> Estimate:
        """Mean over the sweeps, its standard error widened as in ``SampledSpectrum.stderr_of``."""
        variances = np.array(self.variances)
        spread = float(np.square(variances - variances.mean()).sum()) * len(variances) / max(1, len(variances) - 1)
        freedom = 2 * float(variances.sum()) ** 2 / spread if spread > 0 else math.inf
        stderr = math.sqrt(float(variances.sum())) / self.sweeps * widening(max(1.0, freedom))
        return Estimate(sum(self.values) / self.sweeps, stderr)


def bytes_per_row(objective: Objective) -> float:
    """Growth of a graph with its examples: a part of it is as large for one as for all, and left out."""
    rows = objective.shards[0].rows or 1
    few, more = min(TRIED, (rows + 1) // 2), min(2 * TRIED, rows)
    sizes = [_graph_bytes(objective, objective.head(count)) for count in (few, more)]
    return (sizes[1] - sizes[0]) / (more - few) if more > few else float(sizes[0])


def _graph_bytes(objective: Objective, shard: Shard) -> int:
    """What the graph of a gradient keeps beside the parameters."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with SecondDerivativesByHand():
            loss = objective.loss(shard)
        graph = torch.autograd.grad(loss, objective.params, create_graph=True, allow_unused=True)
    own = {p.untyped_storage().data_ptr() for p in objective.params}
    # While the graph lives no address is used twice.
    return sum(size for where, size in sizes.items() if where not in own) if graph else 0


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
    return _Measurement(
        operator=operator, ends=(0, 1), rtol=rtol, max_hvps=max_hvps, seed=seed, kept=KEPT, on_progress=on_progress
    ).run()


class _Measurement(Sampling):
    def __post_init__(self) -> None:
        super().__post_init__()
        self._begin = time.perf_counter()
        operator = self.operator
        self._pieces = pieces_apart(operator.objective) if isinstance(operator, ShardOperator) else None
        self._count = 0  # of pieces, as many as help
        self._looked_at = 0  # steps of the chain when it was last measured how much pieces help
        self._ratio = 1.0  # variance of a sweep of pieces, in units of that of a product; 1 where they do not pay

    def run(self) -> Moments:
        op = self.operator
        if op.dim <= min(SMALL, self.max_hvps):
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
        norm = replace(norm, quadrature=4 * noise * norm.value)  # of squares, whose roundings add up
        trace, norm, notes = compared(trace, norm, start, dim=op.dim)
        self._notes += notes
        return self._result(trace, norm, ritz_values(start, dtype=op.dtype), pieces=pieces)

    def _sampled(self, chain: Chain) -> tuple[Estimate, Estimate, int]:
        """Trace, norm and the number of pieces with vectors of their own."""
        op = self.operator
        beyond = self._beyond(chain)
        basis = chain.combine(np.eye(chain.jacobi.size))
        self._early.clear()
        self._share_vectors(beyond, basis)
        if self._pieces is None or self._ratio == 1:
            return beyond.trace(), beyond.norm(), 1
        assert isinstance(op, ShardOperator)
        pieces = self._pieces if self._count == len(self._pieces) else fewer_pieces(op.objective, self._count)
        return self._sample_apart(beyond, basis, pieces=pieces), beyond.norm(), len(pieces)

    def _enough(self, chain: Chain, beyond: DeflatedHutchinson) -> bool:
        if self._looked_at == 0:
            self._pilot(chain, beyond)
        if self._looked_at < chain.jacobi.size and super()._enough(chain, beyond):
            self._pilot(chain, beyond)  # what was deflated since then helps shared vectors more than pieces
        return super()._enough(chain, beyond)

    def _ahead(self, chain: Chain, beyond: DeflatedHutchinson) -> float:
        trace, norm = self._vectors_for(beyond)
        return norm + self._ratio * (trace - norm) if trace > norm else norm

    def _saved(self, gained: float, ahead: float, beyond: DeflatedHutchinson) -> float:
        wanted = max(self.rtol * abs(beyond.trace().value) / NORMAL, SMALLEST)  # standard error
        return float(self._ratio * 2 * gained / wanted**2)

    def _vectors_for(self, beyond: DeflatedHutchinson) -> tuple[int, int]:
        """Shared probe vectors, in all, that the trace takes, and the norm."""
        return (
            _vectors_for(beyond.trace, beyond.count, rtol=self.rtol),
            _vectors_for(beyond.norm, beyond.count, rtol=NORM * self.rtol),
        )

    def _pilot(self, chain: Chain, beyond: DeflatedHutchinson) -> None:
        """Find how many pieces help, and the variance of their sweep in units of that of a product, from a few."""
        self._looked_at, self._ratio = chain.jacobi.size, 1.0
        op, pieces, joint = self.operator, self._pieces, beyond.variance
        if pieces is None or joint <= 0:
            return
        assert isinstance(op, ShardOperator)
        vectors = chain.project_out(self._normal(PILOT_VECTORS, self._pilot_generator))
        vectors /= lengths(vectors)
        seen = [
            weight * chain.project_out(products)
            for weight, _, products in op.apart(pieces[: max(PILOT_PIECES, len(pieces) // 4)], lambda: vectors)
        ]
        found = variances(seen, count=len(pieces), dimension=beyond.dimension)
        self._count = min(count for count, variance in found.items() if variance <= COARSER * min(found.values()))
        # No less by Cauchy and Schwarz; less is seen where a quarter of the examples does not bend the loss at all.
        ratio = max(found[self._count] / joint, 1 / self._count)
        self._ratio = ratio if ratio <= PAYS else 1.0

    def _share_vectors(self, beyond: DeflatedHutchinson, basis: Rows) -> None:
        """Sample with vectors that all examples share, as many as the norm takes; the trace too without pieces."""
        while True:
            self._report("bulk", TraceAndNorm(trace=beyond.trace(), frobenius_sq=beyond.norm()).error)
            trace, norm = self._vectors_for(beyond)
            missing = (max(trace, norm) if self._ratio == 1 else norm) - beyond.count
            most = max(BLOCK, min(AT_ONCE, ENTRIES // self.operator.dim, missing // 2))  # few vectors ask for too many
            probes = min(most, missing, self._left)
            if probes < 1:
                return
            vectors = self._probes(probes, basis)
            beyond.add(vectors, project_out(self.operator.matmat(vectors), basis))

    def _sample_apart(self, beyond: DeflatedHutchinson, basis: Rows, *, pieces: Pieces) -> Estimate:
        """Add sweeps in which every piece has vectors of its own until the trace is known, or the budget spent."""
        op, ratio = self.operator, self._ratio
        assert isinstance(op, ShardOperator)
        op.release()  # the graph of the whole is not needed any more
        sampled, num_shared = StratifiedHutchinson(beyond.dimension), beyond.count
        both = shared = beyond.trace()
        while True:
            wanted = self.rtol * abs(both.value)
            if both.half_width <= wanted:
                return both
            count = num_shared + sampled.sweeps / ratio
            factor = min(both.half_width / max(wanted, SMALLEST), UNREACHABLE)
            missing = ratio * count * (factor**2 - 1)
            sweeps = min(max(1, math.ceil(missing)), self._left, AT_ONCE)
            if sweeps < 1:
                return both
            for weight, vectors, products in op.apart(pieces, partial(self._probes, sweeps, basis)):
                sampled.add(weight, vectors, project_out(products, basis))
            sampled.sweeps += sweeps
            own = sampled.estimate
            # Weights by the pilot, not by what they weigh, which would favour small values.
            part = num_shared / (num_shared + sampled.sweeps / ratio)
            value = part * shared.value + (1 - part) * (beyond.exact[0] + own.value)
            both = Estimate(value, math.hypot(part * shared.stderr, (1 - part) * own.stderr))
            self._report("pieces", relative(both))

    def _probes(self, count: int, basis: Rows) -> Tensor:
        """Unit vectors of the complement, ``(count, d)``."""
        vectors = project_out(self._normal(count, self._probe_generator), basis, passes=2)
        return vectors / lengths(vectors)

    def _result(self, trace: Estimate, norm: Estimate, ritz: tuple[Eigenvalue, ...], *, pieces: int) -> Moments:
        found = Moments(
            trace=trace,
            frobenius_sq=norm,
            lambda_max=ritz[-1],
            pieces=pieces,
            num_hvps=self._spent,
            seconds=time.perf_counter() - self._begin,
            hvp=self.operator.hvp,
            notes=tuple(self._notes),
        )
        self._report("done", found.error)
        return found


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
