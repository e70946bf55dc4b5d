"""Pieces of the data with probe vectors of their own: a trace from fewer sweeps.

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
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import require_finite
from zoscope.problem import Objective, SecondDerivativesByHand, Shard
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import widening

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
class Apart:
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
