"""Spectra as theory sees them: nodes and weights, exact or sampled, with what is known of their error."""

import itertools
import math
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from numbers import Integral, Real
from typing import Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray


def require_finite(bound: Literal["", "> 0", ">= 0"] = "", **values: float) -> None:
    """Raise ``ValueError`` unless every one of the named values is a finite number within the bound."""
    for name, value in values.items():
        known = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not known or (bound and value < 0) or (bound == "> 0" and value == 0):
            raise ValueError(f"{name} must be finite{bound and f' and {bound}'}, got {value!r}")


def require_count(name: str, value: int, *, least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


NORMAL = 1.959963984540054
"""Half-width of the 95 % interval of a normal law, in standard deviations."""


def widening(freedom: float) -> float:
    """How much wider the 95 % interval of a t law is than that of a normal law, over its scale.

    The t law is ``tan θ √ν`` with a density of ``θ`` proportional to ``cos^(ν-1) θ``, which Gauss's rule integrates to
    rounding; Newton's method from below finds the quantile, as the distribution function is concave there.
    (``scipy.special`` has it too, and takes longer to import than the measurement of a small problem.)

    Args:
        freedom: Degrees of freedom ν ≥ 1, not necessarily whole; ``inf`` for a normal law.

    Returns:
        The 97.5 % quantile of Student's t law over that of the normal law; 1 for ``ν = inf``.

    Raises:
        ValueError: If ``freedom`` is below 1 or NaN.
    """
    if not freedom >= 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    if freedom > 1e6:
        return 1.0
    nodes, weights = _gauss_rule()
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    theta = math.atan(NORMAL / math.sqrt(freedom))
    for _ in range(50):
        inside = 0.5 * theta * float(weights @ np.cos(0.5 * theta * (nodes + 1)) ** (freedom - 1))
        step = (0.475 - scale * inside) / (scale * math.cos(theta) ** (freedom - 1))
        theta += step
        if abs(step) < 1e-14:
            break
    return math.sqrt(freedom) * math.tan(theta) / NORMAL


@cache
def _gauss_rule() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss's rule on [-1, 1]; computing it takes far longer than using it."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    return nodes, weights


Function = Callable[[float], float]
Search = Generator[float, float, float]
"""Yields where it wants a value, is sent that value, and returns what it was looking for."""


def searched(f: Function, search: Search) -> float:
    """What a search of ``f`` finds."""
    (found,) = searched_together(lambda _, places: [f(places[0])], [search])
    return found


def searched_together(
    values: Callable[[list[int], list[float]], Sequence[float]], searches: Sequence[Search]
) -> list[float]:
    """What several searches find, each of a function of its own.

    Args:
        values: ``values(which, places)``: of each search named in ``which`` the value at its place.
        searches: The searches.
    """
    found = [math.nan] * len(searches)
    waiting = {which: next(search) for which, search in enumerate(searches)}
    while waiting:
        told = values(list(waiting), list(waiting.values()))
        for which, value in zip(list(waiting), told, strict=True):
            try:
                waiting[which] = searches[which].send(value)
            except StopIteration as done:
                found[which] = done.value
                del waiting[which]
    return found


def root(f: Function, low: float, high: float, *, xtol: float) -> float:
    """Where ``f`` changes its sign between ``low`` and ``high``, to ``xtol`` or to rounding.

    Args:
        f: Continuous, of opposite signs at the two ends; ``±inf`` is a value.
        low: One end of the bracket.
        high: The other end.
        xtol: Absolute error allowed.

    Raises:
        ValueError: If both signs are the same.
    """
    return searched(f, root_search(low, high, xtol=xtol))


def root_search(low: float, high: float, *, xtol: float) -> Search:
    """The search of ``root``: inverse quadratic interpolation where the last three points make it safe, else bisection.

    Source: Chandrupatla, A new hybrid quadratic/bisection algorithm, Adv. Eng. Software 28 (1997).
    """
    a, b = high, low
    fa, fb = (yield a), (yield b)
    if fa == 0 or fb == 0:
        return a if fa == 0 else b
    if (fa > 0) == (fb > 0):
        raise ValueError(f"f must change its sign between {low} and {high}")
    part = 0.5
    while True:
        x = a + part * (b - a)
        fx = yield x
        if (fx > 0) == (fa > 0):
            c, fc, a, fa = a, fa, x, fx
        else:
            c, fc, b, fb, a, fa = b, fb, a, fa, x, fx
        best, value = (a, fa) if abs(fa) < abs(fb) else (b, fb)
        room = (2 * math.ulp(abs(best)) + 0.5 * xtol) / abs(b - a)
        if value == 0 or room > 0.5:
            return best
        part = min(max(_interpolated(a, b, c, fa, fb, fc), room), 1 - room)


def _interpolated(a: float, b: float, c: float, fa: float, fb: float, fc: float) -> float:
    """Part of the way from a to b at which to look next."""
    if not all(map(math.isfinite, (fa, fb, fc))) or fb == fc or b == c:
        return 0.5
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    if not (phi**2 < xi and (1 - phi) ** 2 < 1 - xi):
        return 0.5
    return fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)


CAP = 50.0
"""Largest logarithm of a feedback: it overflows far above the root, and a ceiling keeps secant slopes sane."""


def first_crossing(total: Function, *, guess: float) -> float:
    """Root of ``total(lr) = 1``, from a guess; ``inf`` when there is none below the largest float."""
    return searched(total, crossing_search(guess))


def crossing_search(guess: float) -> Search:
    """The search of ``first_crossing``, to a relative error of about 1e-14.

    Secant steps on ``log total`` in ``log lr``, kept inside the bracket seen so far. That curve is nearly a straight
    line: its slope lies between 1 (every mode in its steady state) and 2 (none yet), more where a mode is unstable.
    """
    x = math.log(guess)
    slope, reach, last = 1.5, 1.0, 1.0
    low, high = -math.inf, math.inf
    value = _log_excess((yield math.exp(x)))
    for _ in range(40):
        low, high = (x, high) if value < 0 else (low, x)
        step = min(max(-value / slope, -reach), reach)
        if not low <= x + step <= high:
            step = 0.5 * (low + high) - x
        if abs(step * last) < 1e-15 or abs(step) < 2e-14:  # a secant step errs by about the product of the last two
            return math.exp(x + step)
        x, last, reach = x + step, step, 2 * reach
        if abs(x) > 700:
            return math.inf if x > 0 else 0.0
        previous, value = value, _log_excess((yield math.exp(x)))
        slope = max((value - previous) / step, 1e-2)
    rest = root_search(low, high, xtol=2e-14)
    place = next(rest)
    while True:
        try:
            place = rest.send(_log_excess((yield math.exp(place))))
        except StopIteration as done:
            return math.exp(done.value)


def _log_excess(total: float) -> float:
    if total < -1.0:  # far above the root, where a signed quadrature weight of an unstable mode takes over
        return CAP
    return min(max(math.log(total), -CAP), CAP) if total > 0 else -CAP


def lowest(f: Function, low: float, high: float, *, xtol: float) -> tuple[float, float]:
    """Where a function with one minimum in an interval has it, to ``xtol``, and its value there; by golden section."""
    golden = 0.5 * (math.sqrt(5) - 1)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = f(left), f(right)
    while high - low > xtol:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = f(right)
    return (left, at_left) if at_left < at_right else (right, at_right)


Array = NDArray[np.float64]
NodeFunction = Callable[[Array], Array]


FEWEST_TO_COMPARE = 3
"""Probe vectors whose scatter says anything."""

ENDLESS = 10**18
"""Number of probe vectors that leaves no noise."""

SIGNIFICANT = 3.0
"""Standard deviations by which a scatter must exceed that of sampling."""


@dataclass(frozen=True)
class Estimate:
    """A number and its uncertainty.

    Args:
        value: The estimate.
        stderr: Standard error from random sampling; 0 for an exact number.
        quadrature: Bound on the deterministic error of the quadrature rule, in the unit of ``value``.
        ends: The 95 % interval where it is not symmetric.
    """

    value: float
    stderr: float = 0.0
    quadrature: float = 0.0
    ends: tuple[float, float] | None = None

    @property
    def half_width(self) -> float:
        """Half-width of the 95 % interval: ``1.96 stderr + quadrature``; the second part does not average out."""
        return 1.96 * self.stderr + self.quadrature

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval ``(lo, hi)``."""
        if self.ends is not None:
            return self.ends
        return self.value - self.half_width, self.value + self.half_width

    def scaled(self, factor: float) -> "Estimate":
        """``factor`` > 0 times the number."""
        ends = None if self.ends is None else (factor * self.ends[0], factor * self.ends[1])
        return Estimate(factor * self.value, factor * self.stderr, factor * self.quadrature, ends)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues with multiplicities: ``Tr f(M) = sum_j weights_j f(nodes_j)``.

    Args:
        nodes: ``(n,)`` eigenvalues or quadrature nodes, loss/param² for a Hessian.
        weights: ``(n,)`` multiplicities; ones when left out. Those of a quadrature rule that corrects another one add
            up to a multiplicity, though single ones may be negative.
    """

    nodes: Array
    weights: Array = field(default=cast("Array", None))  # replaced by ones

    def __post_init__(self) -> None:
        nodes = np.atleast_1d(np.asarray(self.nodes, dtype=np.float64))
        weights = np.ones_like(nodes) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        if nodes.ndim != 1 or weights.shape != nodes.shape:
            raise ValueError(f"nodes and weights must be vectors of one length, got {nodes.shape} and {weights.shape}")
        if not (np.isfinite(nodes).all() and np.isfinite(weights).all()):
            raise ValueError("nodes and weights must be finite")
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def of(cls, eigenvalues: ArrayLike) -> "Spectrum":
        """Exact spectrum from a list of eigenvalues."""
        return cls(np.asarray(eigenvalues, dtype=np.float64))

    def trace_of(self, f: NodeFunction) -> float:
        """``Tr f(M)`` for a vectorised ``f``."""
        return float(self.weights @ f(self.nodes)) if self.nodes.size else 0.0

    @cached_property
    def trace(self) -> float:
        """``Tr M``."""
        return self.trace_of(lambda x: x)

    @cached_property
    def frobenius_sq(self) -> float:
        """``‖M‖_F²``."""
        return self.trace_of(np.square)

    @cached_property
    def lambda_max(self) -> float:
        """Largest node (algebraic) of positive weight; 0 for an empty spectrum."""
        nodes = self.nodes[self.weights > 0]
        return float(nodes.max()) if nodes.size else 0.0

    @cached_property
    def known(self) -> dict[Hashable, float]:
        """What has been computed of this spectrum and is asked for again, such as thresholds by their condition."""
        return {}

    @cached_property
    def positive(self) -> "Spectrum":
        """The positive part: nodes ≤ 0 dropped."""
        keep = (self.nodes > 0) & (self.weights != 0)
        return Spectrum(self.nodes[keep], self.weights[keep])


@dataclass(frozen=True)
class SampledSpectrum:
    """A spectrum of which a part was estimated with random probe vectors.

    Args:
        fine: Best estimate of the whole spectrum.
        sampled: The part of ``fine`` that comes from random probe vectors, averaged over them; empty when exact.
        num_probes: Number of independent probe vectors; 0 when exact.
        dimension: Dimension of the subspace that the probe vectors sample.
        errors: Signed differences between quadrature rules of one measure, each as large as that of ``fine`` may be.
        probes: Rules of the single probe vectors, each an estimate of the sampled part. What they differ by beyond
            sampling is an error of the rules.
        num_moments: Number of probe vectors behind the first two moments, where more than ``num_probes`` know those;
            0 where none do.
    """

    fine: Spectrum
    sampled: Spectrum
    num_probes: int
    dimension: int
    errors: tuple[tuple[Spectrum, ...], ...] = ()
    probes: tuple[Spectrum, ...] = ()
    num_moments: int = 0

    @classmethod
    def exact(cls, eigenvalues: ArrayLike) -> "SampledSpectrum":
        """A spectrum known without error."""
        spectrum = Spectrum.of(eigenvalues)
        return cls(fine=spectrum, sampled=Spectrum.of([]), num_probes=0, dimension=0)

    @property
    def is_exact(self) -> bool:
        """Whether every eigenvalue is known, and exactly."""
        return self.num_probes == 0 and not self.errors

    @property
    def error_nodes(self) -> Array:
        """``(m,)`` every node that errors are computed from, once each: rules of one measure share most of them."""
        return self._rules[0]

    def stderr_of(self, f: NodeFunction) -> float:
        """Standard error of ``Tr f(M)`` from sampling.

        A probe vector uniform on the sphere of radius √d has ``Var zᵀAz = 2 (d Tr A² - (Tr A)²) / (d + 2)``. Both
        traces are averages over the same quadrature nodes, far better known than a variance over a handful of probes.
        ``Tr A²`` has a scatter of its own, large where few eigenvalues dominate: the result is widened by Student's
        factor at ``n (Tr A²)²/Tr A⁴`` degrees of freedom (Satterthwaite), so that ±1.96 of it is a 95 % interval.

        Args:
            f: A vectorised function; ``inf`` where it overflows makes the error infinite.
        """
        return self.stderr_at(f(self.error_nodes))

    def stderr_at(self, values: Array) -> float:
        """``stderr_of`` the function with these values ``(m,)`` at ``error_nodes``."""
        weights = self._rules[1]
        counted = weights != 0
        if self.is_exact or not counted.any():
            return 0.0
        values, weights = values[counted], weights[counted]
        if not self.num_moments or not np.isfinite(values).all():
            return self._stderr(values, weights, self.num_probes)
        parabola = self._parabolas @ (self._parabolas.T @ (weights * values))
        own = self._stderr(values - parabola, weights, self.num_probes)
        return math.hypot(self._stderr(parabola, weights, self.num_moments), own)

    def _stderr(self, values: Array, weights: Array, count: int) -> float:
        scale = float(np.abs(values).max())  # taken out, so that fourth powers of large values do not overflow
        if scale == 0 or not np.isfinite(scale):
            return scale
        variance, tail = self._variance(values / scale, weights)
        return scale * widening(max(count / tail, 1.0)) * math.sqrt(variance / count) if variance > 0 else 0.0

    def _variance(self, values: Array, weights: Array) -> tuple[float, float]:
        """Of one probe vector, and ``Tr A⁴/(Tr A²)²``, which tells how well that is known."""
        squares = values**2
        first, second, fourth = (float(weights @ part) for part in (values, squares, squares**2))
        # Rules that are tilted or averaged have weights below 0; where even this sum is, nothing is known of the tail.
        tail = (fourth / second**2 if fourth > 0 else math.inf) if second**2 > 0 else 1.0
        return 2.0 * (self.dimension * second - first**2) / (self.dimension + 2), tail

    def quadrature_error_of(self, f: NodeFunction) -> float:
        """Bound on the error of ``Tr f(M)`` from quadrature, added up over its kinds."""
        return self.quadrature_error_at(f(self.error_nodes))

    def quadrature_error_at(self, values: Array) -> float:
        """``quadrature_error_of`` the function with these values ``(m,)`` at ``error_nodes``."""
        return sum(float(np.abs(weights @ values).max()) for weights in self._rules[2]) + self._scatter_at(values)

    def _scatter_at(self, values: Array) -> float:
        """95 % half-width from what the rules of single probe vectors scatter beyond sampling, if that is significant.

        The correction that makes a fine rule of short ones comes from a single vector, and does not average it out.
        """
        count = len(self.probes)
        scale = float(np.abs(values).max(initial=0.0))
        if count < FEWEST_TO_COMPARE or scale == 0 or not np.isfinite(scale):
            return 0.0
        places, weights, begins = self._single
        totals = np.add.reduceat(weights * values[places] / scale, begins)
        average = np.bincount(places, weights, minlength=values.size) / count
        variance, tail = self._variance(values / scale, average)
        # A sample variance scatters by this much: Gaussian forms have an excess kurtosis of 12 Tr A⁴/(Tr A²)².
        allowed = 1.0 + SIGNIFICANT * math.sqrt(2.0 / (count - 1) + 12.0 * tail / count)
        excess = float(np.var(totals, ddof=1)) - allowed * variance
        return 1.96 * scale * math.sqrt(excess * (1 + 1 / count)) if excess > 0 else 0.0

    def trace_of(self, f: NodeFunction) -> Estimate:
        """``Tr f(M)`` with its sampling and quadrature errors."""
        values = f(self.error_nodes)
        return Estimate(self.fine.trace_of(f), self.stderr_at(values), self.quadrature_error_at(values))

    @cached_property
    def _rules(self) -> tuple[Array, Array, tuple[Array, ...]]:
        """The nodes of all rules behind the errors, and weights on them: ``(m,)`` sampled, ``(rules, m)`` per kind."""
        rules = [self.sampled, *(rule for kind in self.errors for rule in kind)]
        singles = np.concatenate([rule.nodes for rule in (*rules, *self.probes)])
        nodes, found = np.unique(singles, return_inverse=True)
        places = found[: sum(rule.nodes.size for rule in rules)]
        weights = np.zeros((len(rules), nodes.size))
        rows = np.repeat(np.arange(len(rules)), [rule.nodes.size for rule in rules])
        np.add.at(weights, (rows, places), np.concatenate([rule.weights for rule in rules]))
        ends = np.cumsum([1, *(len(kind) for kind in self.errors)])
        return nodes, weights[0], tuple(weights[low:high] for low, high in itertools.pairwise(ends))

    @cached_property
    def _parabolas(self) -> Array:
        """``(k, 3)`` parabolas at the nodes of ``sampled``, orthonormal under its weights; fewer for few nodes."""
        nodes, weights = (part[self._rules[1] != 0] for part in self._rules[:2])
        size = float(np.abs(nodes).max(initial=0.0)) or 1.0
        root = np.sqrt(np.maximum(weights, 0.0))
        powers = np.vander(nodes / size, min(3, nodes.size), increasing=True) * root[:, None]
        left, scales, _ = np.linalg.svd(powers, full_matrices=False)
        basis: Array = left[:, scales > 1e-12 * scales.max(initial=0.0)]
        basis /= np.where(root > 0, root, np.inf)[:, None]
        return basis

    @cached_property
    def _single(self) -> tuple[NDArray[np.intp], Array, NDArray[np.intp]]:
        """Of the rules of single probe vectors, one after the other: places in `error_nodes`, weights, beginnings."""
        nodes = np.concatenate([rule.nodes for rule in self.probes])
        begins = np.cumsum([0, *(rule.nodes.size for rule in self.probes[:-1])])
        return np.searchsorted(self.error_nodes, nodes), np.concatenate([r.weights for r in self.probes]), begins

    def with_counts(self, num_probes: int, num_moments: int) -> "SampledSpectrum":
        """The same, as if over other numbers of probe vectors; what is computed of its nodes is kept."""
        other = replace(self, num_probes=num_probes, num_moments=num_moments)
        kept = ("_rules", "_single", "_parabolas")
        other.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return other

    def with_endless_sampling(self) -> "SampledSpectrum":
        """The same, as if over infinitely many probe vectors: what is left of its error is quadrature."""
        return self.with_counts(ENDLESS, ENDLESS)
