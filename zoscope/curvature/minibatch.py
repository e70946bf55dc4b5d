"""How the Hessians and gradients of random mini-batches spread around those of all examples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.lanczos import Recurrences, project_out
from zoscope.curvature.operators import (
    Array,
    Preconditioned,
    ShardOperator,
    coupling_and_spread,
    gradient_sums,
    signed_sum,
)
from zoscope.curvature.slq import gauss_rule
from zoscope.problem import Objective
from zoscope.problem.objective import Examples, Indices
from zoscope.theory.minibatch import HessianNoise, spread_of_batches
from zoscope.theory.spectrum import Spectrum


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
        self._gather()
        counts = np.array([sum(shard.examples for shard in part) for part in self._parts], dtype=np.float64)
        self.weights: Array = counts / counts.sum()
        self.centre: Array = np.zeros(len(indices))

    def _gather(self) -> None:
        """Cut the batches as they are now."""
        examples = Examples(self._objective)
        self._shards, self._parts = self._objective.shards, [examples.gather(part) for part in self._indices]

    def losses(self) -> Array:
        """Of the parts, ``(k,)``."""
        if self._shards is not self._objective.shards:  # the micro-batch was halved
            self._gather()
        return np.array([self._objective.value_of(part) for part in self._parts])


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
    operator: ShardOperator | Preconditioned, examples: Examples, pairs: Eigenpairs, *, generator: torch.Generator
) -> tuple[HessianNoise, int]:
    """Spread of the examples' Hessians, seen from eigenvectors and from random vectors.

    Along each eigenvector the spread ``v_iᵀDv_i`` and the coupling to the others are means over groups. For the
    complement of the eigenvectors, with projection P, a random z and random signs ξ give ``w = P Σ_g ξ_g (H_g - H) z``
    with ``E wᵀf(H)w = Tr(P D P f(H))`` for every f at once: Lanczos from w is its quadrature rule.

    Args:
        operator: H, or ``P^-½ H P^-½``.
        examples: What mini-batches draw from.
        pairs: Eigenpairs to follow one by one.
        generator: Of the groups, the signs and the probe vectors, on the operator's device.

    Returns:
        The spread, and the sweeps over the data in random groups, each worth a product, that came on top of products.
    """
    groups, scale = _groups(examples, generator)
    coupling, spread = zip(*coupling_and_spread(operator, examples, groups, pairs.values, pairs.vectors), strict=True)
    rest: tuple[tuple[Spectrum, Spectrum], ...] = ()
    cost = len(pairs.values)
    if len(pairs.values) < operator.dim:
        vectors = torch.stack([_spread_vector(operator, examples, pairs, generator) for _ in range(PROBES)])
        vectors = project_out(vectors, pairs.vectors, passes=2)
        masses = vectors.double().square().sum(dim=1).cpu().numpy()
        length = min(LENGTH, operator.dim - len(pairs.values))
        rest = _rules(operator, vectors, masses, pairs, length)
        cost += PROBES
    return HessianNoise(
        nodes=pairs.values,
        coupling=np.array(coupling) / scale,
        spread=np.array(spread) / scale,
        rest=rest,
        complete=examples.count <= SINGLE,
    ), cost


def _groups(examples: Examples, generator: torch.Generator) -> tuple[list[Indices], float]:
    """A random partition, and the spread of its groups in units of one example's."""
    count = examples.count if examples.count <= SINGLE else GROUPS
    sizes = [len(part) for part in np.array_split(np.arange(examples.count), count)]
    return examples.partition(count, generator), float(np.mean([spread_of_batches(examples.count, k) for k in sizes]))


def _spread_vector(
    operator: ShardOperator | Preconditioned, examples: Examples, pairs: Eigenpairs, generator: torch.Generator
) -> Tensor:
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
    operator: ShardOperator | Preconditioned, vectors: Tensor, masses: Array, pairs: Eigenpairs, length: int
) -> tuple[tuple[Spectrum, Spectrum], ...]:
    if not masses.any():
        return ()
    chains = Recurrences(operator, vectors, deflated=pairs.vectors).extend(length).jacobis()
    return tuple(
        (gauss_rule(chain, mass=mass), gauss_rule(chain.head(max(1, (3 * chain.size) // 4)), mass=mass))
        for chain, mass in zip(chains, masses, strict=True)
    )


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
