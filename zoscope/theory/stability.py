"""Mean-square stability on a quadratic: thresholds in closed form, for ever and for a number of steps."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.rules import GAUSSIAN, EstimatorMoments, UpdateRule
from zoscope.theory.spectrum import (
    Estimate,
    SampledSpectrum,
    Spectrum,
    crossing_search,
    first_crossing,
    require_count,
    require_finite,
    root,
    searched_together,
)

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Steps = int | Counts

NOISE = np.array([1.0, -1.0, 1.0])
"""How gradient noise enters the state of a mode."""

_IDENTITY = np.eye(3)[:, :, None]


def transition(z: Array, *, momentum: float, a: float) -> Array:
    """``A(z)`` for every z: ``(3, 3, n)`` from ``(n,)``.

    Rows: ``m'² = a z² x² + 2βz xm + β² m²`` (with ``E ĝ² = a λ² E x²``), ``xm' = z x² + β xm - m'²``,
    ``x'² = x² - 2(z x² + β xm) + m'²``.
    """
    matrices: Array = _IDENTITY + _change(z, momentum=momentum, a=a)
    return matrices


def _change(z: Array, *, momentum: float, a: float, drift: Array | None = None) -> Array:
    """``A(z) - I``, without the cancellation that subtracting would bring to slow modes.

    With weight decay w the mean moves by ``drift = η(λ+w)``, while the noise stays that of λ.
    """
    beta, one, zero = momentum, np.ones_like(z), np.zeros_like(z)
    square = a * z**2
    if drift is not None:
        square, z = drift**2 + (a - 1) * z**2, drift
    mm = np.array([square, 2 * beta * z, beta**2 * one])
    xm = np.array([z, beta * one, zero])
    change: Array = np.array([mm - 2 * xm, xm - mm, mm]) - _IDENTITY * np.array([0.0, 1.0, 1.0])[:, None, None]
    return change


def infinite_feedback(z: Array, *, momentum: float, moments: EstimatorMoments, drift: Array | None = None) -> Array:
    """``φ = b z² Σ_{τ≥0} k(τ) = b(1+β) z / (2(1-β²) - c z)``, ``(n,)``, for ``z ≥ 0``; ``inf`` from the pole on.

    With weight decay, ``z' = η(λ+w)``, ``φ = b(1+β) z² / ((1-β) z' (2(1+β) - z') - (a-1)(1+β) z²)``.
    """
    if drift is not None:
        gap = _decayed_gap(z, drift, momentum=momentum, a=moments.a)
        return np.divide(moments.b * (1 + momentum) * z**2, gap, out=np.full_like(z, np.inf), where=gap > 0)
    result = np.full_like(z, np.inf)
    gap = _gap(z, momentum=momentum, a=moments.a)
    np.divide(moments.b * (1 + momentum) * z, gap, out=result, where=gap > 0)
    return result


def infinite_response(z: Array, *, momentum: float, a: float, drift: Array | None = None) -> Array:
    """``Σ_{τ≥0} k(τ) = (1+β) / (z (2(1-β²) - c z))``, ``(n,)``, for ``z ≥ 0``; ``inf`` at 0 and from the pole on."""
    result = np.full_like(z, np.inf)
    gap = z * _gap(z, momentum=momentum, a=a) if drift is None else _decayed_gap(z, drift, momentum=momentum, a=a)
    np.divide(1 + momentum, gap, out=result, where=gap > 0)
    return result


def _gap(z: Array, *, momentum: float, a: float) -> Array:
    own = (1 - momentum) + (1 + momentum) * (a - 1)
    gap: Array = 2 * (1 - momentum**2) - own * z
    return gap


def _decayed_gap(z: Array, drift: Array, *, momentum: float, a: float) -> Array:
    gap: Array = (1 - momentum) * drift * (2 * (1 + momentum) - drift) - (a - 1) * (1 + momentum) * z**2
    return gap


def horizon_feedback(
    z: Array, steps: Steps, *, momentum: float, moments: EstimatorMoments, drift: Array | None = None
) -> Array:
    """``φ = b z² Σ_{τ<T} k(τ)`` for any real z; ``inf`` where it overflows. Shape of z; ``steps`` may differ by row."""
    # An unstable mode overflows on a long horizon: that is infinite feedback, and so is the inf - inf that may follow.
    with np.errstate(over="ignore", invalid="ignore"):
        feedback = moments.b * z**2 * _horizon_sum(z, steps, momentum=momentum, a=moments.a, drift=drift)
    return np.where(np.isnan(feedback), np.inf, feedback)


def horizon_response(z: Array, steps: Steps, *, momentum: float, a: float, drift: Array | None = None) -> Array:
    """``Σ_{τ<T} k(τ)`` for any real z; ``inf`` where it overflows. Shape of z; ``steps`` may differ by row."""
    with np.errstate(over="ignore", invalid="ignore"):
        response = _horizon_sum(z, steps, momentum=momentum, a=a, drift=drift)
    return np.where(np.isnan(response), np.inf, response)


def _horizon_sum(z: Array, steps: Steps, *, momentum: float, a: float, drift: Array | None = None) -> Array:
    if momentum == 0:
        excess = z * (a * z - 2) if drift is None else drift * (drift - 2) + (a - 1) * z**2
        return geometric_sum(excess, steps)
    change = _change(z.ravel(), momentum=momentum, a=a, drift=None if drift is None else drift.ravel())
    flat = _response_sum(change, np.broadcast_to(steps, z.shape).ravel())
    return flat.reshape(z.shape)


def geometric_sum(excess: Array, steps: Steps) -> Array:
    """``Σ_{τ<T} r^τ`` for ``r = 1 + excess``, to full precision as r → 1. Shape of ``excess``."""
    near, count = np.abs(excess) < 0.5, np.asarray(steps, dtype=np.float64)
    grown = np.expm1(count * np.log1p(excess, out=np.zeros_like(excess), where=near))
    grown = np.where(near, grown, np.power(1 + excess, count) - 1)
    return np.divide(grown, excess, out=np.broadcast_to(count, excess.shape).copy(), where=excess != 0)


def _response_sum(change: Array, steps: Counts) -> Array:
    """``Σ_{τ<T} [A^τ (1, -1, 1)]₁`` by repeated squaring, ``(n,)`` from ``A - I``, ``(3, 3, n)``, and T, ``(n,)``.

    Carries ``E = A^m - I`` instead of ``A^m``: a slow mode is a small column of E, which keeps its relative precision
    however long the horizon.
    """
    result, places = np.empty(steps.size), np.arange(steps.size)
    partial = np.broadcast_to(NOISE[:, None], change.shape[1:])  # Σ_{τ<m} A^τ w at m = 1, 2, 4, …
    total = np.zeros_like(partial)
    while steps.size:
        odd = steps & 1 == 1
        if odd.any():
            longer = partial + total + _apply(change, total)
            total = longer if odd.all() else np.where(odd, longer, total)
        steps = steps >> 1
        ended = steps == 0
        if ended.any():
            result[places[ended]] = total[0, ended]
            going = ~ended
            places, steps, total, partial = places[going], steps[going], total[:, going], partial[:, going]
            change = change[:, :, going]
        if steps.size:
            doubler = change + 2 * _IDENTITY  # A^2m - I = E(2I + E), and I + A^m = 2I + E
            partial, change = _apply(doubler, partial), _multiply(change, doubler)
    return result


def _apply(matrices: Array, vectors: Array) -> Array:
    result: Array = matrices[:, 0] * vectors[0] + matrices[:, 1] * vectors[1] + matrices[:, 2] * vectors[2]
    return result


def _multiply(left: Array, right: Array) -> Array:
    return left[:, 0, None] * right[None, 0] + left[:, 1, None] * right[None, 1] + left[:, 2, None] * right[None, 2]


def coupled_response(
    z: Array, gains: Array, steps: int | None, *, momentum: float, a: float, drift: Array | None = None
) -> Array:
    """``Σ_{τ<T} [A^τ w]`` in ``E x²``, ``(q,)``, where w is one unit of noise in every mode.

    Args:
        z: ``(q,)`` ``ηλ`` of the modes.
        gains: ``(q, q)`` symmetric ``G = η² M``, non-negative; ``diag(z²)`` leaves the modes alone.
        steps: T; ``None`` for infinite time.
        momentum: Heavy-ball β.
        a: Weight of the signal in the estimate.
        drift: ``(q,)`` ``η(λ+w)`` with weight decay w.

    Returns:
        Dimensionless; ``inf`` where the modes are unstable by themselves (infinite time) or the sum overflows.
    """
    if not z.size:
        return np.empty(0)
    moved = z if drift is None else drift
    with np.errstate(over="ignore", invalid="ignore"):  # an unstable mode overflows on a long horizon
        squares = a * gains + np.diag(moved**2 - z**2)  # what a step makes of E x², but for its path
        if momentum == 0:
            total = _plain(moved, squares, steps)
        else:
            change = _coupled_change(moved, squares, momentum=momentum)
            noise = np.repeat(NOISE, z.size)
            total = (_resolvent(change, noise) if steps is None else _summed(change, noise, steps))[: z.size]
    return np.where(np.isfinite(total), total, np.inf)


def _plain(moved: Array, squares: Array, steps: int | None) -> Array:
    """Without momentum ``A = I - 2 diag(moved) + squares`` is symmetric."""
    matrix = squares - 2 * np.diag(moved)
    if not np.isfinite(matrix).all():
        return np.full(moved.size, np.inf)
    excess, vectors = np.linalg.eigh(matrix)
    if steps is not None:
        sums = geometric_sum(excess, steps)
    elif excess[-1] >= 0 or excess[0] <= -2:
        return np.full(moved.size, np.inf)
    else:
        sums = -1 / excess
    total: Array = vectors @ (sums * vectors.sum(axis=0))
    return total


def _coupled_change(moved: Array, squares: Array, *, momentum: float) -> Array:
    """``A - I`` of all modes, ``(3q, 3q)``, in blocks ``E x², η E xm, η² E m²``."""
    count = moved.size
    eye, zero, path = np.eye(count), np.zeros((count, count)), np.diag(moved)
    mm = np.hstack([squares, 2 * momentum * path, momentum**2 * eye])
    xm = np.hstack([path, momentum * eye, zero])
    change: Array = np.vstack([mm - 2 * xm, xm - mm, mm])
    change[count:, count:] -= np.eye(2 * count)
    return change


def _resolvent(change: Array, noise: Array) -> Array:
    if not np.isfinite(change).all() or np.abs(1 + np.linalg.eigvals(change)).max() >= 1:
        return np.full_like(noise, np.inf)
    return np.asarray(np.linalg.solve(-change, noise), dtype=np.float64)


def _summed(change: Array, noise: Array, steps: int) -> Array:
    """``Σ_{τ<T} A^τ w`` by repeated squaring of ``A - I``, which keeps slow modes to their relative precision."""
    partial, total = noise, np.zeros_like(noise)
    while True:
        if steps & 1:
            total = partial + total + change @ total
        steps >>= 1
        if not steps or not np.isfinite(change).all():
            return total if not steps else np.full_like(noise, np.inf)
        partial = 2 * partial + change @ partial
        change = 2 * change + change @ change


Version = Literal["positive", "full"]


@dataclass(frozen=True)
class StabilityCondition:
    """``Σ_j w_j φ_lr(λ_j) = 1``: the noise that a step feeds back through all modes reaches what was put in.

    ``φ_lr(λ) = λ² Σ_{τ<T} [A^τ w]₁`` with the transition matrix A of a mode and ``w = b(η², -η, 1)``, η = lr_scale·lr.
    For gradient descent ``φ = bηλ (1 - r^T)/(2 - aηλ)``, ``r = 1 - 2ηλ + aη²λ²``. As T → ∞ on the positive part
    ``φ → b(1+β)ηλ / (2(1-β²) - cηλ)``, ``c = (1-β) + (1+β)(a-1)``: the exact threshold η*.

    Args:
        rule: Update rule.
        moments: Constants of the estimator.
        steps: Horizon T; ``None`` for infinite time.
        version: ``"positive"`` drops eigenvalues ≤ 0; ``"full"`` keeps all: escape along negative curvature is noise.

    Raises:
        ValueError: If ``steps`` is not a positive integer, or infinite time is asked of the full version, where no
            step size is stable for ever.

    Source: infinite time arXiv:2604.14669, Theorems 1-3; other (a, b) and the horizon derived in the guide's page on
    theory.
    """

    rule: UpdateRule
    moments: EstimatorMoments = GAUSSIAN
    steps: int | None = None
    version: Version = "positive"

    def __post_init__(self) -> None:
        if self.version not in ("positive", "full"):
            raise ValueError(f"version must be 'positive' or 'full', got {self.version!r}")
        if self.steps is not None:
            require_count("steps", self.steps)
        elif self.version == "full":
            raise ValueError("the full version needs a finite number of steps: along negative curvature none is stable")

    def feedback(self, nodes: Array, lr: float) -> Array:
        """``φ_lr`` at every node.

        Args:
            nodes: ``(n,)`` eigenvalues, loss/param².
            lr: Step size in param²/loss.

        Returns:
            ``(n,)``, dimensionless; 0 at nodes that the version drops, ``inf`` where a mode is unstable by itself
            (infinite time) or its response overflows (horizon).

        Raises:
            ValueError: If ``lr`` is not positive.
        """
        require_finite("> 0", lr=lr)
        feedback: Array = _feedbacks([self], np.asarray(nodes, dtype=np.float64), [lr])[0]
        return feedback

    def total_feedback(self, spectrum: Spectrum, lr: float) -> float:
        """``Σ_j w_j φ_lr(λ_j)``; below 1 exactly when ``lr`` is stable."""
        require_finite("> 0", lr=lr)
        return _total_feedbacks([self], spectrum, [lr])[0]

    def threshold(self, spectrum: Spectrum) -> float:
        """Largest stable step size.

        Args:
            spectrum: Nodes ``(n,)`` in loss/param², weights ``(n,)``.

        Returns:
            Root of ``Σ w φ = 1`` in param²/loss, to about 1e-13 relative; ``inf`` for a spectrum without feedback.
            In infinite time, where noise alone never reaches 1, the step size at which a single mode is unstable.
        """
        return thresholds([self], spectrum)[0]

    def estimate(self, sampled: SampledSpectrum) -> Estimate:
        """Threshold of a sampled spectrum with its error bar, as ``estimates``.

        Args:
            sampled: Spectrum with its sampled part.

        Returns:
            Threshold in param²/loss.
        """
        return estimates([self], sampled)[0]

    def _part(self, spectrum: Spectrum) -> Spectrum:
        if self.version == "positive":
            return spectrum.positive
        keep = spectrum.weights != 0
        return spectrum if keep.all() else Spectrum(spectrum.nodes[keep], spectrum.weights[keep])

    def _infinite_threshold(self, part: Spectrum, near: float | None) -> float:
        if min(part.trace, part.frobenius_sq) <= 0:
            return math.inf
        bounds = MomentBounds(self.rule, self.moments)
        largest = float(part.nodes.max())
        limit = fo_threshold(largest, rule=self.rule)
        if self.rule.weight_decay:
            limit = self._decayed_limit(largest)
        elif bounds.own > 0:
            limit = bounds.damping / (bounds.own * largest)  # a pole: the feedback passes 1 below it
        if self.moments.b == 0 or (bounds.own <= 0 and self.total_feedback(part, limit) < 1):
            return limit
        lower = bounds.tight(part.trace, part.frobenius_sq, largest).lower
        guess = near if near is not None and near < limit else lower
        return min(limit, first_crossing(lambda lr: self.total_feedback(part, lr), guess=guess))

    def _decayed_limit(self, largest: float) -> float:
        """Where the largest mode is unstable by itself, with weight decay."""
        beta, moved = self.rule.momentum, largest + self.rule.weight_decay
        own = (1 - beta) * moved**2 + (self.moments.a - 1) * (1 + beta) * largest**2
        return 2 * (1 - beta**2) * moved / (self.rule.lr_scale * own)

    def _guess(self, part: Spectrum) -> float:
        """A step size near the threshold of a finite horizon."""
        positive = part.positive
        early = 1 / math.sqrt(self.moments.b * part.frobenius_sq * float(self.steps or 1)) / self.rule.lr_scale
        if min(positive.trace, positive.frobenius_sq) <= 0:
            return early
        bounds = MomentBounds(self.rule, self.moments)
        return max(early, bounds.tight(positive.trace, positive.frobenius_sq, positive.lambda_max).lower)


def thresholds(
    conditions: Sequence[StabilityCondition],
    spectrum: Spectrum,
    *,
    near: Mapping[StabilityCondition, float] | None = None,
) -> list[float]:
    """Thresholds of several conditions, those of one rule side by side; a spectrum remembers its own.

    Args:
        conditions: Conditions, of any rules.
        spectrum: Nodes ``(n,)`` in loss/param², weights ``(n,)``.
        near: Guesses, such as the thresholds of a similar spectrum.

    Returns:
        One per condition, as ``StabilityCondition.threshold``.
    """
    near = near or {}
    known = spectrum.known
    missing = [condition for condition in dict.fromkeys(conditions) if condition not in known]
    for condition in missing:
        part = condition._part(spectrum)
        if not condition.rule.is_linear:
            known[condition] = math.inf
        elif condition.steps is None:
            known[condition] = condition._infinite_threshold(part, near.get(condition))
        elif condition.moments.b == 0 or part.frobenius_sq <= 0:
            known[condition] = math.inf
    for family in _families([condition for condition in missing if condition not in known]):
        known.update(zip(family, _horizon_thresholds(family, spectrum, near), strict=True))
    return [known[condition] for condition in conditions]


def _horizon_thresholds(
    family: Sequence[StabilityCondition], spectrum: Spectrum, near: Mapping[StabilityCondition, float]
) -> list[float]:
    """Thresholds of conditions of one rule, each for a finite number of steps and with some feedback."""
    rule, guesses = family[0].rule, [near.get(condition, math.inf) for condition in family]
    unknown = [place for place, guess in enumerate(guesses) if not 0 < guess < math.inf]
    if rule.momentum > 0:
        # Near that without momentum, where the effective step is lr_scale·lr/(1-β).
        plain = [replace(family[place], rule=UpdateRule("gd", weight_decay=rule.weight_decay)) for place in unknown]
        effective = [lr * (1 - rule.momentum) / rule.lr_scale for lr in thresholds(plain, spectrum)]
    else:
        effective = [family[place]._guess(family[place]._part(spectrum)) for place in unknown]
    for place, guess in zip(unknown, effective, strict=True):
        guesses[place] = guess

    def totals(which: list[int], lrs: list[float]) -> list[float]:
        return _total_feedbacks([family[place] for place in which], spectrum, lrs)

    return searched_together(totals, [crossing_search(guess) for guess in guesses])


def estimates(
    conditions: Sequence[StabilityCondition],
    sampled: SampledSpectrum,
    *,
    near: Mapping[StabilityCondition, float] | None = None,
) -> list[Estimate]:
    """Thresholds of a sampled spectrum with their error bars.

    Sampling: the standard error of ``Σ w φ`` at the root, divided by its derivative in ``log lr`` (delta method).
    Quadrature: the error of that sum by the same derivative.

    Args:
        conditions: Conditions, of any rules.
        sampled: Spectrum with its sampled part.
        near: Guesses, as for ``thresholds``.

    Returns:
        One per condition, in param²/loss.
    """
    values = thresholds(conditions, sampled.fine, near=near)
    found = dict(zip(conditions, map(Estimate, values), strict=True))
    if sampled.is_exact:
        return list(found.values())
    for family in _families([condition for condition, value in found.items() if math.isfinite(value.value)]):
        lrs = [found[condition].value for condition in family]
        slopes = _slopes(family, sampled.fine, lrs)
        feedbacks = _feedbacks(family, sampled.error_nodes, lrs)
        for condition, lr, slope, feedback in zip(family, lrs, slopes, feedbacks, strict=True):
            at_root = _finite(feedback)
            scale = lr / slope if slope > 0 else 0.0
            found[condition] = Estimate(
                lr, scale * sampled.stderr_at(at_root), scale * sampled.quadrature_error_at(at_root)
            )
    return [found[condition] for condition in conditions]


def _slopes(family: Sequence[StabilityCondition], spectrum: Spectrum, lrs: Sequence[float]) -> list[float]:
    """Derivative of ``Σ w φ`` in ``log lr`` at the thresholds."""
    step = 1e-6  # relative error of the slope, which is an error bar's: about the same
    known = spectrum.known
    missing = {c: lr * math.exp(step) for c, lr in zip(family, lrs, strict=True) if (c, "slope") not in known}
    totals = _total_feedbacks(list(missing), spectrum, list(missing.values()))
    known.update({(c, "slope"): (total - 1) / step for c, total in zip(missing, totals, strict=True)})
    return [known[c, "slope"] for c in family]


def _families(conditions: Sequence[StabilityCondition]) -> list[list[StabilityCondition]]:
    """Conditions whose feedback is computed together: of one rule and one estimator, finite horizons or not."""
    families: dict[Hashable, list[StabilityCondition]] = {}
    for condition in conditions:
        families.setdefault((condition.rule, condition.moments, condition.steps is None), []).append(condition)
    return list(families.values())


def _feedbacks(family: Sequence[StabilityCondition], nodes: Array, lrs: Sequence[float]) -> Array:
    """``φ_lr`` of each condition at its own step size, ``(conditions, n)``."""
    first = family[0]
    if not first.rule.is_linear:
        return np.zeros((len(family), nodes.size))
    positive = np.array([[condition.version == "positive"] for condition in family])
    eta = first.rule.lr_scale * np.array(lrs)[:, None]
    z = eta * nodes
    z = np.where(positive, np.maximum(z, 0.0), z)
    drift = z + eta * first.rule.weight_decay if first.rule.weight_decay else None
    if first.steps is None:
        return infinite_feedback(z, momentum=first.rule.momentum, moments=first.moments, drift=drift)
    steps = np.array([[condition.steps] for condition in family], dtype=np.int64)
    return horizon_feedback(z, steps, momentum=first.rule.momentum, moments=first.moments, drift=drift)


def _total_feedbacks(family: Sequence[StabilityCondition], spectrum: Spectrum, lrs: Sequence[float]) -> list[float]:
    """``Σ_j w_j φ_lr(λ_j)`` of each condition at its own step size; ``inf`` where a mode's feedback is."""
    if not family:
        return []
    widest = next((condition for condition in family if condition.version == "full"), family[0])
    part = widest._part(spectrum)
    feedbacks = _feedbacks(family, part.nodes, lrs)
    overflown = np.isinf(feedbacks)
    totals = np.where(overflown, 0.0, feedbacks) @ part.weights  # a weight may be negative
    return [math.inf if row.any() else float(total) for row, total in zip(overflown, totals, strict=True)]


def _finite(values: Array) -> Array:
    """Replace what only a node of zero weight can have beyond its pole, so that ``0·inf`` does not become a NaN."""
    return np.where(np.isfinite(values), values, 0.0)


@dataclass(frozen=True)
class Interval:
    """A closed interval of step sizes, param²/loss; an end may be ``inf``."""

    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class ModeCoupling:
    """``P^-½ H P^-½ = V diag(λ) Vᵀ`` of a preconditioner that does not commute with H.

    Noise is isotropic in the parameters, ``b Tr(HΣH) I``, and so ``P⁻¹`` in the coordinates ``P^½ x``, which couples
    pairs of modes: ``Tr(HΣH) = Σ_ij λ_i λ_j (VᵀPV)_ij Y_ij``, and one unit of noise puts ``(VᵀP⁻¹V)_ij`` into ``Y_ij``.

    Args:
        eigenvalues: ``(n,)`` λ of the modes with positive curvature, loss/param² times the unit of P.
        coupling: ``(n, n)`` ``(VᵀP⁻¹V)_ij (VᵀPV)_ij``; the identity where P and H commute.
    """

    eigenvalues: Array
    coupling: Array

    def total_feedback(self, lr: float, *, rule: UpdateRule, moments: EstimatorMoments) -> float:
        """Feedback of a step: ``b Σ_ij z_i z_j coupling_ij / D_ij``, z = ηλ, D the inverse response of a pair.

        ``D = (1-β)(z_i+z_j) - β/(1-β) (2 z_i z_j - (z_i+z_j)²/(1+β)) - a z_i z_j``; ``inf`` where one is not positive.
        """
        z, beta = rule.lr_scale * lr * self.eigenvalues, rule.momentum
        products, sums = np.outer(z, z), z[:, None] + z
        inverse = (1 - beta) * sums - moments.a * products
        if beta:
            inverse -= beta / (1 - beta) * (2 * products - sums**2 / (1 + beta))
        if (inverse <= 0).any():
            return math.inf
        return moments.b * float((products * self.coupling / inverse).sum())

    def threshold(self, *, rule: UpdateRule, moments: EstimatorMoments) -> float:
        """Exact infinite-time threshold, in the unit of the learning rate; at most that of a P that commutes.

        Source: derived in the guide's page on theory.
        """
        commuting = StabilityCondition(rule, moments).threshold(Spectrum.of(self.eigenvalues))
        if not math.isfinite(commuting):
            return commuting
        return first_crossing(lambda lr: self.total_feedback(lr, rule=rule, moments=moments), guess=commuting)


def fo_threshold(lambda_max: float, *, rule: UpdateRule) -> float:
    """Largest step size at which the first-order method is stable: ``2(1+β) / (lr_scale·(λ_max + w))``.

    Args:
        lambda_max: Largest eigenvalue of M, loss/param² for a Hessian.
        rule: Update rule.

    Returns:
        Threshold in param²/loss; ``inf`` when ``lambda_max <= 0``.

    Raises:
        ValueError: If ``lambda_max`` is not finite.

    Source: arXiv:2103.00065; for Adam arXiv:2207.14484.
    """
    require_finite(lambda_max=lambda_max)
    return _ratio(2 * (1 + rule.momentum) / rule.lr_scale, lambda_max + rule.weight_decay)


@dataclass(frozen=True)
class MomentBounds:
    """Bounds on η* from a few numbers of M.

    They rest on the equation of the exact threshold, ``Σ_i noise·ηλ_i / (damping - own·ηλ_i) = 1``. With
    ``A = damping/noise`` and ``c' = own/noise`` it is ``Σ_i ηλ_i / (A - c'ηλ_i) = 1``.

    Args:
        rule: Update rule.
        moments: Constants of the estimator.

    Source: ``paper`` arXiv:2604.14669; other (a, b) and the other bounds derived in the guide's page on theory.
    """

    rule: UpdateRule
    moments: EstimatorMoments = GAUSSIAN

    @property
    def noise(self) -> float:
        """``b(1+β)``."""
        return self.moments.b * (1 + self.rule.momentum)

    @property
    def own(self) -> float:
        """``c = (1-β) + (1+β)(a-1)``; negative only for sphere directions in one dimension."""
        beta = self.rule.momentum
        return (1 - beta) + (1 + beta) * (self.moments.a - 1)

    @property
    def damping(self) -> float:
        """``2(1-β²)/lr_scale``, so that η is the user's learning rate."""
        return 2 * (1 - self.rule.momentum**2) / self.rule.lr_scale

    def paper(self, trace: float, lambda_max: float) -> Interval:
        """The paper's interval ``A/(Tr M + c' λ_max) ≤ η* ≤ A/Tr M``, for any (a, b).

        With Gaussian directions and one query these are the paper's ``c₂/(Tr M + a λ_max)`` and ``c₂/Tr M``. It assumes
        ``M ⪰ 0``.

        Args:
            trace: ``Tr M``.
            lambda_max: Largest eigenvalue of M.

        Returns:
            Interval in param²/loss; an end is ``inf`` where its denominator is not positive.

        Raises:
            ValueError: If an argument is not finite.
        """
        require_finite(trace=trace, lambda_max=lambda_max)
        ends = (
            _ratio(self.damping, self.noise * trace + self.own * lambda_max),
            _ratio(self.damping, self.noise * trace),
        )
        return Interval(min(ends), max(ends))  # their order turns around when own < 0

    def tight(self, trace: float, frobenius_sq: float, lambda_max: float) -> Interval:
        """Bounds from ``p₁ = Tr M``, ``p₂ = ‖M‖_F²`` and ``λ_max`` of ``M ⪰ 0``; inside the paper's interval.

        The trace-weighted mean of the convex ``x ↦ 1/(A - c'ηx)`` lies above its value at the mean eigenvalue ``p₂/p₁``
        (Jensen), which gives ``η* ≤ A/(p₁ + c' p₂/p₁)``, and below its chord on ``[0, λ_max]``, which gives as lower
        bound the smaller root of ``c'(p₁λ_max - p₂) y² - (p₁ + c'λ_max) y + 1 = 0``, ``y = η/A``.

        Args:
            trace: ``p₁``, of the positive part when M is indefinite.
            frobenius_sq: ``p₂``, of the positive part when M is indefinite.
            lambda_max: Largest eigenvalue of M, or anything above it.

        Returns:
            Interval in param²/loss; ``inf`` at both ends when ``trace <= 0``.

        Raises:
            ValueError: If an argument is not finite or ``frobenius_sq`` is negative.
        """
        require_finite(trace=trace, lambda_max=lambda_max)
        require_finite(">= 0", frobenius_sq=frobenius_sq)
        if trace <= 0:
            return Interval(math.inf, math.inf)
        noise, own = self.noise * trace, self.own * lambda_max
        root = math.sqrt(max((noise - own) ** 2 + 4 * self.own * self.noise * frobenius_sq, 0.0))
        return Interval(
            lower=_ratio(2 * self.damping, noise + own + root),
            upper=_ratio(self.damping, noise + self.own * frobenius_sq / trace),
        )

    def forward_only(self, trace: float, frobenius_sq: float) -> Interval:
        """Bounds from two numbers that forward passes can estimate, ``p₁ = Tr M``, signed, and ``p₂ = ‖M‖_F²``.

        Lower end: the chord bound of ``tight`` with ``λ_max ≤ ‖M‖_F``; it needs ``M ⪰ 0``. Upper end:
        ``A / (p₁ + min(c' p₂/p₁, min(c', 1) √p₂))``, which bounds the threshold of the positive part of *any* symmetric
        M: negative eigenvalues of sum ``-n`` leave ``p₁ + n`` and at least ``p₂ - n²`` to the positive part, and the
        two-moment bound of that part is largest at one of the two ends ``n = 0`` and ``n = √p₂``. Units, exceptions and
        an indefinite trace are those of ``tight``.
        """
        require_finite(">= 0", frobenius_sq=frobenius_sq)
        norm = math.sqrt(frobenius_sq)
        lower = self.tight(trace, frobenius_sq, norm).lower
        if trace <= 0:
            return Interval(math.inf, math.inf)
        extra = min(self.own * frobenius_sq / trace, min(self.own, self.noise) * norm)
        return Interval(lower, _ratio(self.damping, self.noise * trace + extra))

    def forward_only_batches(self, trace: float, frobenius_sq: float, spread_sq: float) -> float:
        """Upper bound on the infinite-time threshold with mini-batches: ``A/(p₁ + s₂/√p₂)``, or that of all examples.

        Noise feeds itself through ``Tr(C H⁻¹)/2`` at least, ``C = E H_B² = H² + E(H_B - H)²``, and
        ``Tr(E(H_B - H)² H⁻¹) ≥ s₂/λ_max`` on the range of H; beyond it noise adds up for ever. ``λ_max ≤ √p₂``.

        Args:
            trace: ``p₁ = Tr H``, signed.
            frobenius_sq: ``p₂ = ‖H‖_F²``.
            spread_sq: ``s₂ = E‖H_B - H‖_F²``.

        Returns:
            Threshold in param²/loss; ``inf`` when ``trace <= 0``.

        Raises:
            ValueError: If an argument is not finite, or ``frobenius_sq`` or ``spread_sq`` is negative.
        """
        require_finite(">= 0", spread_sq=spread_sq)
        whole = self.forward_only(trace, frobenius_sq).upper
        if trace <= 0 or frobenius_sq == 0:
            return whole
        return min(whole, _ratio(self.damping, self.noise * (trace + spread_sq / math.sqrt(frobenius_sq))))

    def forward_only_horizon(self, squares: float, steps: int) -> float:
        """Lower bound on η*(N), positive ones, with mini-batches: ``(1-β)/√(b N E‖H_B‖_F²)``.

        Noise that is fed in at one step is there for N steps at most, and moves no mode further than a flat one, by
        ``η/(1-β)``. The feedback of N steps is then ``b N Tr(C) η²/(1-β)²`` at most, ``Tr C = E‖H_B‖_F²``. No spectrum
        is needed; modes near ``η λ = 1``, whose own noise makes them grow, are left out.

        Args:
            squares: ``E‖H_B‖_F²``.
            steps: N.

        Returns:
            Threshold in param²/loss; ``inf`` without curvature.

        Raises:
            ValueError: If ``squares`` is not finite or negative, or ``steps`` no positive integer.
        """
        require_finite(">= 0", squares=squares)
        require_count("steps", steps)
        rule = self.rule
        return _ratio((1 - rule.momentum) / rule.lr_scale, math.sqrt(self.moments.b * steps * squares))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.inf


STEP = 1e-6
"""Relative step of the derivatives by a moment; they are an error bar's, so that more digits say nothing."""

OfMoments = Callable[[float, float, float], Interval]
"""An interval from ``Tr M``, ``‖M‖_F²`` and ``λ_max``."""


def interval_ci95(
    bounds: OfMoments, sampled: SampledSpectrum, *, largest: float, residual: float, positive: bool
) -> tuple[float, float]:
    """From the lower 95 % end of the lower bound to the upper 95 % end of the upper one.

    To first order a bound changes with its moments as ``∂₁ δTr M + ∂₂ δ‖M‖_F² = δTr h(M)``, ``h(x) = ∂₁x + ∂₂x²``, a
    trace whose error the spectrum knows. That of λ_max is at most its residual.

    Args:
        bounds: The interval as a function of its moments.
        sampled: Spectrum with its errors.
        largest: λ_max.
        residual: Of that eigenvalue.
        positive: Whether the moments are those of the positive part.

    Returns:
        Two step sizes in param²/loss, the lower one cut at 0; ``inf`` where a bound is.
    """

    def part(x: Array) -> Array:
        return np.maximum(x, 0.0) if positive else x

    point = (sampled.fine.trace_of(part), sampled.fine.trace_of(lambda x: part(x) ** 2), largest)
    found = bounds(*point)

    def half_width(end: str) -> float:
        by_trace, by_square, by_largest = (_derivative(bounds, point, place, end) for place in range(3))
        change = sampled.trace_of(lambda x: by_trace * part(x) + by_square * part(x) ** 2)
        return change.half_width + abs(by_largest) * residual

    lower, upper = (
        math.inf if math.isinf(value) else value + sign * half_width(end)
        for value, sign, end in ((found.lower, -1, "lower"), (found.upper, 1, "upper"))
    )
    return max(lower, 0.0), upper


def _derivative(bounds: OfMoments, point: tuple[float, float, float], place: int, end: str) -> float:
    step = STEP * abs(point[place])
    if step == 0:
        return 0.0
    ends = [
        getattr(bounds(*(x + sign * step * (i == place) for i, x in enumerate(point))), end) for sign in (-1.0, 1.0)
    ]
    slope = float(ends[1] - ends[0]) / (2 * step)
    return slope if math.isfinite(slope) else 0.0


LONGEST_RUN = 2**50
"""Steps beyond which a blow-up counts as never."""


@dataclass(frozen=True)
class HorizonPoint:
    """Thresholds for a number of steps.

    Args:
        steps: Horizon T.
        lower: η*(T) of the full spectrum, param²/loss.
        upper: η*(T) of the positive part, param²/loss.
    """

    steps: int
    lower: Estimate
    upper: Estimate


def horizon_curve(
    sampled: SampledSpectrum, steps: Sequence[int], *, rule: UpdateRule, moments: EstimatorMoments = GAUSSIAN
) -> tuple[HorizonPoint, ...]:
    """η*(T), full and positive, for every T of ``steps``.

    Args:
        sampled: Spectrum with its error information.
        steps: Horizons, positive integers.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        One point per horizon, in the order given.

    Raises:
        ValueError: If a horizon is not a positive integer.

    Source: derived in the guide's page on theory.
    """
    conditions = [
        StabilityCondition(rule, moments, horizon, version) for horizon in steps for version in ("full", "positive")
    ]
    found = iter(estimates(conditions, sampled))
    return tuple(HorizonPoint(horizon, lower=next(found), upper=next(found)) for horizon in steps)


def excess_rate(
    spectrum: Spectrum,
    lr: float,
    *,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    least: float = -1.0,
    xtol: float = 0.0,
) -> float:
    """``ρ - 1``, to relative precision when positive.

    Args:
        spectrum: Nodes ``(n,)`` in loss/param², of any sign, weights ``(n,)``.
        lr: Step size in param²/loss.
        rule: Update rule.
        moments: Constants of the estimator.
        least: Value for everything below it: that a run does not grow is known long before how fast it decays.
        xtol: Absolute error allowed.

    Raises:
        ValueError: If ``lr`` is not positive.
    """
    require_finite("> 0", lr=lr)
    counted = spectrum.weights != 0
    nodes, weights = spectrum.nodes[counted], spectrum.weights[counted]
    moving = nodes != 0
    flat = -1.0 if moving.any() and moving.all() else 0.0  # a flat direction neither grows nor decays: its ρ is 1
    if not moving.any():
        return flat
    z, weights = rule.lr_scale * lr * nodes[moving], weights[moving]
    decay = rule.lr_scale * lr * rule.weight_decay
    if np.abs(z).max() > 1e50:
        return math.inf

    def margin(excess: float) -> float:
        """Inverse feedback at ρ less 1: negative below the growth rate, positive above."""
        return _inverse_feedback(excess, z, weights, rule.momentum, moments, decay) - 1

    if margin(0.0) > 0:
        return max(flat, least, root(margin, -1.0, 0.0, xtol=max(xtol, 1e-15)) if least < 0 else least)
    low, high = 0.0, 1e-3  # most growth is slow
    while margin(high) <= 0:
        low, high = high, 8 * high
    return max(flat, least, root(margin, low, high, xtol=max(xtol, 1e-300)))


def _inverse_feedback(
    excess: float, z: Array, weights: Array, beta: float, moments: EstimatorMoments, decay: float
) -> float:
    """``1 / Σ_i w_i b z_i² ρ(ρ+β)/χ_i(ρ)``, at most 2; 0 when ρ does not exceed the radius of every single mode.

    A mode's largest root is real, because its response to noise is never negative; ρ lies above it exactly when χ
    and its derivatives are positive at ρ.
    """
    rho, noise = 1 + excess, (moments.a - 1) * z**2
    linear, drift = 1 - beta + excess, (z + decay) * (2 * (1 + beta) - z - decay)
    quadratic = drift + (drift + 1 - beta**2) * excess + excess**2
    quadratic_slope = drift + 1 - beta**2 + 2 * excess
    chi = linear * quadratic - noise * rho * (rho + beta)
    slope = quadratic + linear * quadratic_slope - noise * (2 * rho + beta)
    bend = 2 * quadratic_slope + 2 * linear - 2 * noise
    if chi.min() <= 0 or slope.min() <= 0 or bend.min() <= 0:
        return 0.0
    feedback = float(weights @ (moments.b * z**2 * rho * (rho + beta) / chi))
    return min(1 / feedback, 2.0) if feedback > 0 else 2.0
