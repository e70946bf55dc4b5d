"""A diagonal matrix with the spectrum of a workload: where peers are tuned, at no cost to them.

The error of every estimator here depends on the eigenvalues alone when its probes are Gaussian, so a diagonal matrix
with (nearly) the eigenvalues of the Hessian tells how many products an estimator needs, in a second instead of hours.
Rademacher probes would be exact on a diagonal matrix; on a network they do as well as Gaussian ones to a few percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.curvature.results import Curvature
from zoscope.theory.mean_square import StabilityCondition
from zoscope.theory.rules import UpdateRule
from zoscope.theory.spectrum import Spectrum

Array = NDArray[np.float64]
RULES = (UpdateRule("gd"), UpdateRule("gdm", momentum=0.9))
STEPS = 1000


def conditions() -> dict[str, StabilityCondition]:
    """The thresholds of the second comparison: η*(1000), both versions, and infinite time, of GD and GDM."""
    found = {}
    for rule in RULES:
        found[f"{rule.name} full"] = StabilityCondition(rule, steps=STEPS, version="full")
        found[f"{rule.name} positive"] = StabilityCondition(rule, steps=STEPS, version="positive")
        found[f"{rule.name} infinite"] = StabilityCondition(rule)
    return found


def thresholds(spectrum: Spectrum) -> dict[str, float]:
    """All of `conditions` on one spectrum."""
    return {name: condition.threshold(spectrum) for name, condition in conditions().items()}


@dataclass(frozen=True)
class Diagonal:
    """Eigenvalues of a stand-in, ``(d,)`` in float64."""

    values: Array

    @classmethod
    def of(cls, curvature: Curvature) -> "Diagonal":
        """Eigenvalues whose distribution is that of a measurement: all of a dense one, else quantiles of its nodes."""
        spectrum = curvature.spectrum
        if spectrum.is_exact:
            return cls(np.sort(spectrum.fine.nodes))
        fine = spectrum.fine
        single = np.isclose(fine.weights, 1.0, rtol=1e-12, atol=0.0)  # the deflated ones
        outliers, rest = fine.nodes[single], spectrum.sampled
        order = np.argsort(rest.nodes)
        count = spectrum.dimension
        cumulative = np.cumsum(rest.weights[order])
        places = (np.arange(count) + 0.5) * cumulative[-1] / count
        bulk = rest.nodes[order][np.minimum(np.searchsorted(cumulative, places), len(order) - 1)]
        return cls(np.sort(np.concatenate([outliers, bulk])))

    @property
    def dim(self) -> int:
        """d."""
        return len(self.values)

    @property
    def spectrum(self) -> Spectrum:
        """As a spectrum."""
        nodes, counts = np.unique(self.values, return_counts=True)
        return Spectrum(nodes, counts.astype(np.float64))

    def moment(self, power: int) -> float:
        """Σ λ^power."""
        return float((self.values**power).sum())

    def matrix(self, power: int = 1) -> Tensor:
        """``(d,)`` diagonal in float32."""
        return torch.from_numpy((self.values**power).astype(np.float32))


def lanczos_rules(values: Array, *, steps: Sequence[int], runs: int, seed: int = 0) -> dict[int, list[Spectrum]]:
    """Gauss rules of random starts on a diagonal matrix, reorthogonalised: what SLQ averages; mass 1 each."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.from_numpy(values.astype(np.float32))
    longest = min(max(steps), len(values))
    rules: dict[int, list[Spectrum]] = {length: [] for length in steps}
    for _ in range(runs):
        start = torch.randn(len(values), generator=generator)
        alphas, betas = _recurrence(diagonal, start, longest)
        for length in steps:
            size = min(length, len(alphas))
            off = betas[: size - 1]
            nodes, vectors = np.linalg.eigh(np.diag(alphas[:size]) + np.diag(off, 1) + np.diag(off, -1))
            rules[length].append(Spectrum(nodes, vectors[0] ** 2))
    return rules


def _recurrence(diagonal: Tensor, start: Tensor, steps: int) -> tuple[Array, Array]:
    basis = torch.empty(steps, len(start))
    basis[0] = start / start.norm()
    alphas, betas = [], []
    for j in range(steps):
        w = diagonal * basis[j]
        alphas.append(float(basis[j] @ w))
        known = basis[: j + 1]
        for _ in range(2):
            w -= known.T @ (known @ w)
        betas.append(float(w.norm()))
        if j + 1 == steps or betas[-1] < 1e-6 * float(diagonal.abs().max()):
            break
        basis[j + 1] = w / betas[-1]
    return np.array(alphas), np.array(betas)


def mean_rule(rules: Sequence[Spectrum], dim: int) -> Spectrum:
    """The spectrum that SLQ reports: the average of its rules, of mass d."""
    return Spectrum(
        np.concatenate([rule.nodes for rule in rules]),
        np.concatenate([rule.weights * dim / len(rules) for rule in rules]),
    )
