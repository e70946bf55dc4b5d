"""How the Hessians and gradients of random mini-batches spread around those of all examples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.lanczos import Jacobi, Recurrences, project_out
from zoscope.curvature.operators import ExampleMean, coupling_and_spread, gradient_sums, signed_sum
from zoscope.curvature.slq import averaged_rule
from zoscope.problem import Objective, Shard
from zoscope.problem.objective import Examples, Indices
from zoscope.theory.minibatch import HessianNoise, spread_of_batches
from zoscope.theory.spectrum import Spectrum

Array = NDArray[np.float64]


class Division:
    """The examples in random parts, whose losses are known one by one.

    Args:
        objective: The prepared problem.
        indices: Which examples each part has; whole batches where those cannot be cut.

    Attributes:
        weights: ``(k,)``, share of each part in the loss.
        centre: ``(k,)``, losses of the parts at θ.
    """

    def __init__(self, objective: Objective, indices: Sequence[Indices]) -> None:
        self._objective, self._indices = objective, indices
        self._shards: list[tuple[Shard, ...]] = []
        self.gather()
        counts = np.array([sum(shard.examples for shard in part) for part in self._shards], dtype=np.float64)
        self.weights: Array = counts / counts.sum()
        self.centre: Array = np.zeros(len(indices))

    def gather(self) -> None:
        """Cut the batches as they are now."""
        examples = Examples(self._objective)
        self._shards = [examples.gather(part) for part in self._indices]

    def losses(self) -> Array:
        """Of the parts, ``(k,)``."""
        return np.array([self._objective.value_of(part) for part in self._shards])


MODES = 32
"""Eigenvectors that are followed one by one, those of the largest eigenvalues."""

ALL_MODES = 64
"""Dimension up to which every eigenvector is."""

GROUPS = 32
"""Random groups that the examples are cut into."""

SINGLE = 64
"""Number of examples up to which every one is a group, and the spread is exact."""

PROBES = 8
"""Random vectors through which the spread along all other directions is seen."""

LENGTH = 10
"""Lanczos steps from what a probe vector becomes."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues ``(q,)`` with orthonormal eigenvectors ``(q, d)``."""

    values: Array
    vectors: Tensor

    @classmethod
    def largest(cls, values: Array, vectors: Tensor) -> "Eigenpairs":
        """A copy of those that are worth following one by one."""
        keep = np.arange(len(values))
        if vectors.shape[-1] > ALL_MODES:
            keep = np.sort(np.argsort(-np.abs(values))[:MODES])
        return cls(values[keep], vectors[torch.as_tensor(keep, device=vectors.device)].clone())


def hessian_noise(
    operator: ExampleMean, examples: Examples, pairs: Eigenpairs, *, generator: torch.Generator
) -> tuple[HessianNoise, int]:
    """Spread of the examples' Hessians, seen from eigenvectors and from random vectors.

    Along each eigenvector the spread ``v_iᵀDv_i`` and the coupling to the others are means over groups. For the
    complement of the eigenvectors, with projection P, a random z and random signs ξ give ``w = P Σ_g ξ_g (H_g - H) z``
    with ``E wᵀf(H)w = Tr(P D P f(H))`` for every f at once: Lanczos from w is its quadrature rule.

    Args:
        operator: H, as a mean over examples.
        examples: What mini-batches draw from.
        pairs: Eigenpairs to follow one by one.
        generator: Of the groups, the signs and the probe vectors, on the operator's device.

    Returns:
        The spread, and the sweeps over the data in random groups, each worth a product, that came on top of products.
    """
    coupling, spread = _along(operator, examples, pairs, generator=generator)
    rest: tuple[Spectrum, ...] = ()
    coarse: tuple[Spectrum, ...] = ()
    cost = len(pairs.values)
    if len(pairs.values) < operator.dim:
        vectors = torch.stack([_spread_vector(operator, examples, pairs, generator) for _ in range(PROBES)])
        for _ in range(2):  # the second pass removes what rounding left of the first
            vectors = project_out(vectors, pairs.vectors)
        masses = vectors.double().square().sum(dim=1).cpu().numpy()
        length = min(LENGTH, operator.dim - len(pairs.values))
        rest, coarse = _rules(operator, vectors, masses, pairs, length)
        cost += PROBES
    return HessianNoise(
        nodes=pairs.values,
        coupling=coupling,
        spread=spread,
        rest=rest,
        coarse=coarse,
        complete=examples.count <= SINGLE,
    ), cost


def _groups(examples: Examples, generator: torch.Generator) -> tuple[list[Indices], float]:
    """A random partition, and the spread of its groups in units of one example's."""
    count = examples.count if examples.count <= SINGLE else GROUPS
    sizes = [len(part) for part in np.array_split(np.arange(examples.count), count)]
    return examples.partition(count, generator), float(np.mean([spread_of_batches(examples.count, k) for k in sizes]))


def _along(
    operator: ExampleMean, examples: Examples, pairs: Eigenpairs, *, generator: torch.Generator
) -> tuple[Array, Array]:
    """Samples of coupling ``(k, q, q)`` and spread ``(k, q)`` along eigenvectors, one per group."""
    groups, scale = _groups(examples, generator)
    coupling, spread = zip(*coupling_and_spread(operator, examples, groups, pairs.values, pairs.vectors), strict=True)
    return np.array(coupling) / scale, np.array(spread) / scale


def _spread_vector(operator: ExampleMean, examples: Examples, pairs: Eigenpairs, generator: torch.Generator) -> Tensor:
    """``Σ_g ξ_g (H_g - H) z / √(k s_g)`` for a new partition, a new z and new signs; two products.

    z has coordinates ±1 along the eigenvectors, which carry most of the spread: their squares do not scatter.
    """
    groups, scale = _groups(examples, generator)
    z = torch.randn(1, operator.dim, generator=generator, dtype=operator.dtype, device=operator.device)
    if len(pairs.values):
        along = torch.tensor([_signs(len(pairs.values), generator)], dtype=z.dtype, device=z.device)
        z = project_out(z, pairs.vectors) + along @ pairs.vectors
    signs = _signs(len(groups), generator)
    total = operator.matmat(z) * -sum(signs) + signed_sum(operator, examples, groups, signs, z)
    return total[0] / math.sqrt(len(groups) * scale)


def _signs(count: int, generator: torch.Generator) -> list[float]:
    drawn = torch.randint(0, 2, (count,), generator=generator, device=generator.device)
    return [float(sign) for sign in (2 * drawn - 1).tolist()]


def _rules(
    operator: ExampleMean, vectors: Tensor, masses: Array, pairs: Eigenpairs, length: int
) -> tuple[tuple[Spectrum, ...], tuple[Spectrum, ...]]:
    if not masses.any():
        return (), ()
    chains = Recurrences(operator, vectors, deflated=pairs.vectors).extend(length).jacobis()
    fine = tuple(_rule(chain, mass) for chain, mass in zip(chains, masses, strict=True))
    short = tuple(_rule(c.head(max(1, (3 * c.size) // 4)), mass) for c, mass in zip(chains, masses, strict=True))
    return fine, short


def _rule(chain: Jacobi, mass: float) -> Spectrum:
    """Of a vector's spectral measure; nodes beyond the chain's own Ritz values are moved in."""
    rule, ends = averaged_rule(chain), chain.eigh()[0][[0, -1]]
    return Spectrum(np.clip(rule.nodes, *ends), mass * rule.weights)


@dataclass(frozen=True)
class GradientNoise:
    """How the gradients of single examples spread around their mean g, with covariance ``n⁻¹Σ_e g_e g_eᵀ - ggᵀ``.

    Args:
        vectors: ``(p, d)`` random vectors with this covariance, loss/param.
        traces: ``(p,)`` estimates of its trace.
        variance: ``(d,)`` its diagonal.
    """

    vectors: Tensor
    traces: Array
    variance: Tensor


def gradient_noise(
    objective: Objective, examples: Examples, mean: Tensor, *, generator: torch.Generator
) -> GradientNoise:
    """Spread of the examples' gradients.

    Args:
        objective: The prepared problem.
        examples: What mini-batches draw from.
        mean: ``(d,)`` the gradient of all examples.
        generator: Of the groups and the signs.
    """
    vectors, traces = [], []
    variance = torch.zeros_like(mean, dtype=torch.float64)
    for _ in range(PROBES):
        groups, scale = _groups(examples, generator)
        total, squares = gradient_sums(objective, examples, groups, _signs(len(groups), generator), mean)
        vectors.append(total / math.sqrt(len(groups) * scale))
        squares = squares / (len(groups) * scale)
        variance += squares / PROBES
        traces.append(float(squares.sum()))
    return GradientNoise(torch.stack(vectors), np.array(traces), variance)
