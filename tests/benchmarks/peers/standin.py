"""A diagonal matrix with the spectrum of a workload: where peers are tuned, at no cost to them.

The error of every estimator here depends on the eigenvalues alone when its probes are Gaussian, so a diagonal matrix
with (nearly) the eigenvalues of the Hessian tells how many products an estimator needs, in a second instead of hours.
Rademacher probes would be exact on a diagonal matrix; on a network they do as well as Gaussian ones to a few percent.

Of a probe only its part in each eigenspace counts, and within one all directions are alike. Where an eigenvalue is
repeated, which those of a quadrature are by the thousands, a vector is drawn by its length there (`Diagonal.starts`),
several by their products there (`Diagonal.probes`): the same distribution of every estimate, from far fewer numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from zoscope.curvature.slq import Curvature
from zoscope.theory.rules import UpdateRule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

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

    @cached_property
    def distinct(self) -> tuple[Array, Array]:
        """The different eigenvalues, ascending, and how often each is there."""
        nodes, counts = np.unique(self.values, return_counts=True)
        return nodes, counts.astype(np.float64)

    @property
    def spectrum(self) -> Spectrum:
        """As a spectrum."""
        return Spectrum(*self.distinct)

    def moment(self, power: int) -> float:
        """Σ λ^power."""
        return float((self.values**power).sum())

    def starts(self, count: int, generator: np.random.Generator) -> Array:
        """Gaussian vectors, ``(count, n)``, by their lengths in the eigenspaces of the n different eigenvalues."""
        counts = self.distinct[1]
        return np.sqrt(generator.chisquare(counts, size=(count, len(counts))))

    def probes(self, size: int, generator: np.random.Generator) -> tuple[Array, Array]:
        """Gaussian vectors, ``(rows, size)`` as columns, and the eigenvalue of each row.

        An eigenspace of more than ``size`` dimensions takes ``size`` rows: the triangular factor of its Gaussian block,
        whose entries are independent, χ on the diagonal and normal above it (Bartlett 1933). The first columns are
        such a factor, too: of fewer vectors.
        """
        nodes, counts = self.distinct
        large = counts > size
        values = np.repeat(nodes[~large], counts[~large].astype(int))
        rows = generator.standard_normal((len(values), size))
        factors = np.triu(generator.standard_normal((int(large.sum()), size, size)), 1)
        place = np.arange(size)
        factors[:, place, place] = np.sqrt(generator.chisquare(counts[large][:, None] - place))
        return (
            np.concatenate([values, np.repeat(nodes[large], size)]),
            np.concatenate([rows, factors.reshape(-1, size)]),
        )


def lanczos_rules(diagonal: Diagonal, starts: Array, *, steps: Sequence[int]) -> dict[int, list[Spectrum]]:
    """Gauss rules of starts (see `Diagonal.starts`), reorthogonalised: what SLQ averages, of mass 1 each, by length."""
    rules: dict[int, list[Spectrum]] = {length: [] for length in steps}
    nodes = diagonal.distinct[0]
    for start in starts:
        alphas, betas = _recurrence(nodes, start, min(max(steps, default=1), len(nodes)))
        for length in steps:
            size = min(length, len(alphas))
            off = betas[: size - 1]
            ritz, vectors = np.linalg.eigh(np.diag(alphas[:size]) + np.diag(off, 1) + np.diag(off, -1))
            rules[length].append(Spectrum(ritz, vectors[0] ** 2))
    return rules


def _recurrence(values: Array, start: Array, steps: int) -> tuple[Array, Array]:
    basis = np.empty((steps, len(start)))
    basis[0] = start / np.linalg.norm(start)
    alphas, betas = [], []
    for j in range(steps):
        w = values * basis[j]
        alphas.append(float(basis[j] @ w))
        known = basis[: j + 1]
        for _ in range(2):
            w -= known.T @ (known @ w)
        betas.append(float(np.linalg.norm(w)))
        if j + 1 == steps or betas[-1] < 1e-10 * float(np.abs(values).max()):
            break
        basis[j + 1] = w / betas[-1]
    return np.array(alphas), np.array(betas)


def mean_rule(rules: Sequence[Spectrum], dim: int) -> Spectrum:
    """The spectrum that SLQ reports: the average of its rules, of mass d."""
    return Spectrum(
        np.concatenate([rule.nodes for rule in rules]),
        np.concatenate([rule.weights * dim / len(rules) for rule in rules]),
    )
