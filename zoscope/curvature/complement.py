"""What is known of the complement of the deflated eigenpairs, and what it takes to know it well enough."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zoscope.curvature.lanczos import Jacobi
from zoscope.curvature.slq import Split, averaged_rule, joined, reshaped
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

SHORT_LENGTHS = (5, 8, 12, 20)
"""Lengths of the short chains to choose from."""

FINE_RULE_ERROR = 1.0
"""Error of an averaged rule relative to its largest change over the second half of its steps; 0.2-1 measured."""

SHORT_RULE_SPREAD = 0.3
"""Scatter (two standard deviations) of a short rule's error over probe vectors, relative to the error itself.

Measured 0.25-0.75 of the error at the same length, 0.3 of the largest error over lengths from half of it upwards.
"""

FUTILE = 1.1
"""Half-width, in units of the part that does not average out, from which on more probe vectors are not worth it."""

Precision = Callable[[SampledSpectrum], float]


@dataclass
class Deflated:
    """The complement of the deflated eigenpairs and the rules collected on it, each of unit mass.

    Args:
        exact: Deflated eigenvalues.
        ends: Interval of the spectrum as the long chain saw it. The outermost nodes of anti-Gauss rules can lie beyond
            it; they are moved in, since long horizons amplify a spurious negative node exponentially.
        dimension: D, dimension of the complement.
        rest: Measure of the long chain's start on the complement, finely resolved.
        length: Steps of a short chain.
        shorts: Rules of the short chains.
        coupling: What the residuals of the deflated pairs change to second order.
    """

    exact: Spectrum
    ends: tuple[float, float]
    dimension: int
    rest: Jacobi | None
    length: int
    shorts: list[Spectrum]
    coupling: Spectrum = field(default_factory=lambda: Spectrum.of([]))

    @classmethod
    def of(cls, parts: Split, *, dim: int) -> "Deflated":
        """What a chain alone tells of an operator of dimension ``dim``."""
        count = len(parts.values)
        return cls(
            Spectrum.of(parts.values),
            parts.ends,
            dim - count,
            parts.rest,
            length=SHORT_LENGTHS[-1],
            shorts=[],
            coupling=_coupling(parts),
        )

    @property
    def is_known(self) -> bool:
        """Whether anything at all is known of the complement."""
        return self.rest is not None or bool(self.shorts)

    def spectrum(self) -> SampledSpectrum:
        """Everything known so far, as one spectrum with its errors."""
        if self.dimension == 0:
            return SampledSpectrum.exact(self.exact.nodes)
        rules = list(self.shorts)
        correction, errors = Spectrum.of([]), list[tuple[Spectrum, ...]]()
        if self.rest is not None:
            fine = averaged_rule(self.rest)
            short = averaged_rule(self.rest.head(self.length))
            rules.append(short)
            correction = self._scaled([(1.0, fine), (-1.0, short)])
            errors = self._errors(fine, self.rest)
        if self.coupling.nodes.size:
            errors.append((self.coupling,))
        sampled = self._scaled([(1.0 / len(rules), rule) for rule in rules])
        return SampledSpectrum(
            fine=joined([(1.0, self.exact), (1.0, sampled), (1.0, correction)]),
            sampled=sampled,
            num_probes=len(rules),
            dimension=self.dimension,
            errors=tuple(errors),
            probes=tuple(self._scaled([(1.0, rule)]) for rule in rules),
        )

    def shaped(self) -> SampledSpectrum | None:
        """The fine rule of the long chain's start, tilted to the first two moments, which all probe vectors know.

        Sampling noise is that of one vector in all but the parabola of a function. It is the better one where short
        rules tell less of a function than that, such as of a kink where most eigenvalues are.
        """
        if self.rest is None or not self.shorts:
            return None
        fine, short = averaged_rule(self.rest), averaged_rule(self.rest.head(self.length))
        rules = [short, *self.shorts]
        mean, square = (float(np.mean([rule.trace_of(lambda x, p=p: x**p) for rule in rules])) for p in (1, 2))  # type: ignore[misc]
        sampled = self._scaled([(1.0, reshaped(fine, mean, square))])
        lengths = self._halfway(self.rest.size)
        errors = [self._against(fine, self.rest, lengths, FINE_RULE_ERROR)]
        if self.coupling.nodes.size:
            errors.append((self.coupling,))
        return SampledSpectrum(
            fine=joined([(1.0, self.exact), (1.0, sampled)]),
            sampled=sampled,
            num_probes=1,
            dimension=self.dimension,
            errors=tuple(errors),
            num_moments=len(rules),
        )

    def _errors(self, fine: Spectrum, rest: Jacobi) -> list[tuple[Spectrum, ...]]:
        """How far the fine rule may be off, and how much the error of the short rule may differ between probes."""
        size = rest.size
        errors = [self._against(fine, rest, self._halfway(size), FINE_RULE_ERROR)]
        if size > self.length:
            short = {self.length // 2, self.length - 2, self.length - 1, self.length}
            errors.append(self._against(fine, rest, short, SHORT_RULE_SPREAD))
        return errors

    @staticmethod
    def _halfway(size: int) -> set[int]:
        """Lengths over the second half of a rule."""
        return {size // 2, size // 2 + 1, (3 * size) // 4, size - 1}

    def _against(self, fine: Spectrum, rest: Jacobi, lengths: set[int], factor: float) -> tuple[Spectrum, ...]:
        return tuple(
            self._scaled([(factor, averaged_rule(rest.head(length))), (-factor, fine)])
            for length in sorted({max(1, length) for length in lengths})
        )

    def _scaled(self, terms: list[tuple[float, Spectrum]]) -> Spectrum:
        whole = joined([(factor * self.dimension, rule) for factor, rule in terms])
        return Spectrum(np.clip(whole.nodes, *self.ends), whole.weights)


def _coupling(parts: Split) -> Spectrum:
    """Change of the spectrum when each pair θ couples by its residual r to a flat direction: ``[[θ, r], [r, 0]]``."""
    theta = parts.values
    root = np.sqrt((theta / 2) ** 2 + parts.residuals**2)
    nodes = np.concatenate([theta / 2 + root, theta / 2 - root, theta, np.zeros_like(theta)])
    return Spectrum(np.clip(nodes, *parts.ends), np.repeat([1.0, 1.0, -1.0, -1.0], len(theta)))


@dataclass(frozen=True)
class Plan:
    """How to sample a complement.

    Args:
        length: Steps of a short chain.
        probes: Short chains that should do, beside the long one.
    """

    length: int
    probes: int

    @property
    def cost(self) -> int:
        """Products."""
        return self.length * self.probes


def plan(
    state: Deflated, precision: Precision, *, rtol: float, budget: int, lengths: Sequence[int] = SHORT_LENGTHS
) -> Plan:
    """Length of the short chains that reaches ``rtol`` with the fewest products, judged on the long chain alone.

    Short ones average more sampling noise away per product, long ones scatter less about the fine rule. Where the
    budget does not suffice, the length with the smallest error at its end.

    Args:
        state: The complement, with no short chain yet.
        precision: Relative half-width of what is wanted.
        rtol: Half-width wanted.
        budget: Products left.
        lengths: To choose from.
    """
    if state.rest is None:  # the long chain met every distinct eigenvalue, so no chain has more steps
        return Plan(min(lengths[-1], max(1, state.exact.nodes.size)), 1)
    best, best_cost = Plan(lengths[0], 1), (math.inf, math.inf)
    for length in lengths:
        trial = replace(state, length=length).spectrum()
        floor = precision(trial.with_endless_sampling())
        single = max(precision(trial) - floor, 0.0)
        affordable = 1 + budget // length
        needed = 1 + math.ceil((single / (rtol - floor)) ** 2) if floor < rtol else affordable + 1
        reached = needed <= affordable
        cost = (0.0, needed * length) if reached else (1.0, floor + single / math.sqrt(affordable))
        if cost < best_cost:
            best, best_cost = Plan(length, max(1, needed - 1)), cost
        if length >= state.rest.size:
            break
    return best


def probes_missing(state: Deflated, precision: Precision, *, rtol: float) -> tuple[float, int]:
    """Half-width reached, and how many more short chains should bring it to ``rtol``: a guess.

    Where the quadrature error alone is larger, they go on until the sampling error adds little to it; then none is
    missing.
    """
    spectrum = state.spectrum()
    reached, floor = precision(spectrum), precision(spectrum.with_endless_sampling())
    wanted = rtol if floor < rtol else FUTILE * floor
    if reached <= wanted:
        return reached, 0
    total = spectrum.num_probes * ((reached - floor) / (wanted - floor)) ** 2
    return reached, max(1, math.ceil(total) - spectrum.num_probes)
