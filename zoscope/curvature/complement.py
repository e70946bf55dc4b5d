"""What is known of the complement of the deflated eigenpairs, and what it takes to know it well enough.

Probe vectors of the complement are drawn after it is fixed, so that each is an unbiased sample of it, whatever was
deflated. They come in three lengths, as in a multilevel estimate (Giles 2008):

* one is followed by a long Lanczos recurrence, a fine quadrature rule;
* some by a short one. A short rule is biased where a function has a kink (the positive part of an indefinite Hessian at
  0), but nearly equally so for every vector: the difference of fine and short rule of the first one corrects it;
* the others by a single product, which tells the first two moments. Most thresholds are nearly parabolas in the
  eigenvalues, so that moments are what most of the noise is in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from zoscope.curvature.lanczos import Jacobi
from zoscope.curvature.slq import Deflated, averaged_rule, joined, tilted
from zoscope.theory.spectrum import ENDLESS, SampledSpectrum, Spectrum

SHORT_LENGTHS = (5, 8, 12, 20)
"""Lengths of the short recurrences to choose from."""

FINE_RULE_ERROR = 1.0
"""Error of an averaged rule relative to its largest change over the second half of its steps; 0.2-1 measured."""

SHORT_RULE_SPREAD = 0.3
"""Scatter (two standard deviations) of a short rule's error over probe vectors, relative to the error itself.

Measured 0.25-0.75 of the error at the same length, 0.3 of the largest error over lengths from half of it upwards.
"""

FUTILE = 1.1
"""Half-width, in units of the part that does not average out, from which on more probe vectors are not worth it."""

NOMINAL = 16
"""Number of vectors at which the noise of one is read off, with Student's factor for as many."""

UNREACHABLE = 10**4
"""A number of vectors that nobody waits for."""

Precision = Callable[[SampledSpectrum], float]


@dataclass
class Complement:
    """The complement of the deflated eigenpairs and the measures of probe vectors on it, each of unit mass.

    Args:
        exact: Deflated eigenvalues.
        ends: Smallest and largest Ritz value known. The outermost nodes of anti-Gauss rules can lie beyond; they are
            moved in, since long horizons amplify a spurious negative node exponentially.
        dimension: D, dimension of the complement.
        coupling: What the residuals of the deflated pairs change to second order.
        rounding: By how much rounding may move an eigenvalue, loss/param².
        precision: Relative rounding error of a sum of products.
        fine: Recurrence of the first probe vector.
        shorts: Recurrences of ``length`` steps.
        firsts: Recurrences of one step.
        length: Steps of a short recurrence.
    """

    exact: Spectrum
    ends: tuple[float, float]
    dimension: int
    coupling: Spectrum
    rounding: float
    precision: float
    fine: Jacobi | None = None
    shorts: list[Jacobi] = field(default_factory=list)
    firsts: list[Jacobi] = field(default_factory=list)
    length: int = SHORT_LENGTHS[0]

    @classmethod
    def of(cls, deflated: Deflated, *, dim: int, rounding: float, precision: float) -> "Complement":
        """Before the first probe vector."""
        values = deflated.values
        return cls(
            Spectrum.of(values), deflated.ends, dim - len(values), _coupling(deflated), rounding, precision=precision
        )

    @property
    def num_vectors(self) -> int:
        """Probe vectors so far."""
        return (self.fine is not None) + len(self.shorts) + len(self.firsts)

    def missing(self, ahead: "Plan") -> tuple[int, int] | None:
        """Short recurrences and single products that a plan still takes; ``None`` where it has been carried out."""
        shorts = max(0, ahead.shorts - len(self.shorts) - 1)
        vectors = max(0, ahead.vectors - self.num_vectors - shorts)
        return (shorts, vectors) if shorts or vectors else None

    def spectrum(self) -> SampledSpectrum:
        """Everything known so far, as one spectrum with its errors."""
        if self.dimension == 0:
            return SampledSpectrum.exact(self.exact.nodes)
        assert self.fine is not None
        ends = self._ends(self.fine)
        fine, coarse = (_rule(jacobi, ends) for jacobi in (self.fine, self.fine.head(self.length)))
        rules = [coarse, *(_rule(jacobi, ends) for jacobi in self.shorts)]
        correction = self._scaled([(1.0, fine), (-1.0, coarse)])
        pooled = np.mean([_moments(j) for j in (self.fine, *self.shorts, *self.firsts)], axis=0)
        corrected = [(fine.trace_of(f) - coarse.trace_of(f)) for f in (_identity, np.square)]
        average, end = joined([(1.0 / len(rules), rule) for rule in rules]), max(map(abs, ends))
        sampled, missing = tilted(average, *(pooled - corrected), end=end)
        sampled = self._scaled([(1.0, sampled)])
        whole = joined([(1.0, self.exact), (1.0, sampled), (1.0, correction)])
        errors = [
            *self._quadrature(self.fine, ends),
            (self._scaled([(1.0, missing)]),),
            (self.coupling,),
            *_rounded(self.exact, sampled, by=self.rounding, relative=self.precision),
        ]
        return SampledSpectrum(
            fine=whole,
            sampled=sampled,
            num_probes=len(rules),
            num_moments=len(rules) + len(self.firsts),
            dimension=self.dimension,
            errors=tuple(kind for kind in errors if any(rule.nodes.size for rule in kind)),
            probes=tuple(self._scaled([(1.0, rule)]) for rule in rules),
        )

    def _ends(self, fine: Jacobi) -> tuple[float, float]:
        values, _ = fine.eigh()
        return min(self.ends[0], float(values[0])), max(self.ends[1], float(values[-1]))

    def _quadrature(self, fine: Jacobi, ends: tuple[float, float]) -> list[tuple[Spectrum, ...]]:
        """How far the fine rule may be off, and how much the error of the short rule may differ between probes."""
        size = fine.size
        if fine.betas[-1] == 0:  # all that the vector sees has been found
            return []
        halfway = {size // 2, size // 2 + 1, (3 * size) // 4, size - 1}
        errors = [self._against(fine, ends, halfway, FINE_RULE_ERROR)]
        if size > self.length:
            short = {self.length // 2, self.length - 2, self.length - 1, self.length}
            errors.append(self._against(fine, ends, short, SHORT_RULE_SPREAD))
        return errors

    def _against(
        self, fine: Jacobi, ends: tuple[float, float], lengths: set[int], factor: float
    ) -> tuple[Spectrum, ...]:
        whole = _rule(fine, ends)
        return tuple(
            self._scaled([(factor, _rule(fine.head(length), ends)), (-factor, whole)])
            for length in sorted({max(1, length) for length in lengths})
        )

    def _scaled(self, terms: Sequence[tuple[float, Spectrum]]) -> Spectrum:
        return joined([(factor * self.dimension, rule) for factor, rule in terms])


def _identity(nodes: np.ndarray) -> np.ndarray:
    return nodes


def _rule(jacobi: Jacobi, ends: tuple[float, float]) -> Spectrum:
    rule = averaged_rule(jacobi)
    return Spectrum(np.clip(rule.nodes, *ends), rule.weights)


def _moments(jacobi: Jacobi) -> tuple[float, float]:
    """``zᵀMz`` and ``‖Mz‖²`` of the unit vector behind a recurrence, exactly."""
    return float(jacobi.alphas[0]), float(jacobi.alphas[0] ** 2 + jacobi.betas[0] ** 2)


def _coupling(deflated: Deflated) -> Spectrum:
    """Change of the spectrum when each pair θ couples by its residual r to a flat direction: ``[[θ, r], [r, 0]]``."""
    theta = deflated.values
    root = np.sqrt((theta / 2) ** 2 + deflated.residuals**2)
    nodes = np.concatenate([theta / 2 + root, theta / 2 - root, theta, np.zeros_like(theta)])
    return Spectrum(np.clip(nodes, *deflated.ends), np.repeat([1.0, 1.0, -1.0, -1.0], len(theta)))


def _rounded(exact: Spectrum, sampled: Spectrum, *, by: float, relative: float) -> tuple[tuple[Spectrum, ...], ...]:
    """What rounding changes: single eigenvalues moved, sampled nodes blurred, as seen at a kink, and sums off."""
    nodes, weights = sampled.nodes, sampled.weights
    moved = Spectrum(np.append(exact.nodes + by, exact.nodes), np.append(exact.weights, -exact.weights))
    blurred = Spectrum(
        np.concatenate([nodes - by, nodes + by, nodes]), np.concatenate([weights / 2, weights / 2, -weights])
    )
    stretched = Spectrum(np.append(nodes * (1 + relative), nodes), np.append(weights, -weights))
    return (moved,), (blurred,), (stretched,)


@dataclass(frozen=True)
class Plan:
    """How to sample a complement.

    Args:
        length: Steps of a short recurrence.
        shorts: Vectors with a rule, the first one included.
        vectors: Vectors in all.
    """

    length: int
    shorts: int
    vectors: int

    @property
    def cost(self) -> int:
        """Products beside the fine rule."""
        return self.length * (self.shorts - 1) + self.vectors - self.shorts

    def within(self, budget: int, *, have: int) -> "Plan":
        """The same shares of fewer products."""
        share = min(1.0, budget / self.cost) if self.cost > 0 else 1.0
        shorts = have + math.floor((self.shorts - have) * share)
        return Plan(self.length, shorts, max(shorts, math.floor(self.vectors * share)))


def plan(state: Complement, precision: Precision, *, rtol: float, budget: int) -> Plan:
    """Lengths and numbers of probe vectors that reach ``rtol`` with the fewest products.

    Args:
        state: The complement with a fine rule.
        precision: Relative half-width of what is wanted.
        rtol: Half-width wanted. Where it cannot be reached, one that is little more than what does not average out.
        budget: Products left.
    """
    have, best, best_cost = len(state.shorts) + 1, Plan(_size(state), 1, 1), (math.inf, math.inf)
    lengths = (*(steps for steps in SHORT_LENGTHS if steps < _size(state)), _size(state))
    for length in (state.length,) if state.shorts else lengths:
        noise = Noise(replace(state, length=length).spectrum(), precision)
        wanted = max(rtol, FUTILE * noise.floor) - noise.floor
        candidate = noise.plan(max(wanted, 1e-12), length=length, have=have)
        if noise.floor < rtol and candidate.cost <= budget:
            cost = 0.0, float(candidate.cost)
        else:
            candidate = candidate.within(budget, have=have)
            cost = 1.0, noise.half_width(candidate)
        if cost < best_cost:
            best, best_cost = candidate, cost
    return best


def _size(state: Complement) -> int:
    assert state.fine is not None
    return state.fine.size


class Noise:
    """A relative half-width by its parts: ``floor + √(moment²/vectors + rest(shorts)²)``.

    Args:
        spectrum: Sampled spectrum.
        precision: Relative half-width of what is wanted.

    Attributes:
        floor: What does not average out.
        moment: Of one vector, in the parabola of a function, which single products tell.
    """

    def __init__(self, spectrum: SampledSpectrum, precision: Precision) -> None:
        self._spectrum, self._precision = spectrum, precision
        self.floor = precision(spectrum.with_endless_sampling())
        self.moment = math.sqrt(NOMINAL) * self._above(ENDLESS, NOMINAL)
        # Two numbers tell Student's factor well enough for a plan; every one of them asks for all that is wanted.
        few, many = (max(self._above(shorts, ENDLESS), 1e-300) for shorts in (1, NOMINAL))
        self._few, self._power = few, math.log(few / many) / math.log(NOMINAL)

    def rest(self, shorts: int) -> float:
        """Of some short rules, in what is left of a function, with Student's factor for as many."""
        early = self._few * min(shorts, NOMINAL) ** -self._power
        return float(early * math.sqrt(min(1.0, NOMINAL / shorts)))

    def _above(self, shorts: int, vectors: int) -> float:
        return max(self._precision(self._spectrum.with_counts(shorts, vectors)) - self.floor, 0.0)

    def half_width(self, plan: Plan) -> float:
        """After a plan."""
        return self.floor + math.hypot(self.moment / math.sqrt(plan.vectors), self.rest(plan.shorts))

    def plan(self, wanted: float, *, length: int, have: int) -> Plan:
        """Numbers that reach a half-width ``wanted`` above the floor with the fewest products."""
        best, more = Plan(length, UNREACHABLE, UNREACHABLE), 0
        while length * more < best.cost:
            shorts, left = have + more, wanted**2 - self.rest(have + more) ** 2
            if left > 0:
                vectors = math.ceil(min(self.moment**2 / left, UNREACHABLE))
                best = min(best, Plan(length, shorts, max(shorts, vectors)), key=lambda found: found.cost)
            more = max(more + 1, 3 * more // 2)
        return best
