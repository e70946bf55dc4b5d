"""Mean-square stability: step sizes with a bounded second moment, for ever or for a number of steps."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.modes import horizon_feedback, infinite_feedback
from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.scalar import crossing_search, first_crossing, searched_together
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum
from zoscope.theory.thresholds import Gains, fo_threshold, tight_bounds
from zoscope.theory.validate import require_count, require_positive

Array = NDArray[np.float64]
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

    Source: infinite time arXiv:2604.14669, Theorems 1-3; other (a, b) and the horizon derived in the README's theory
    section.
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
        require_positive("lr", lr)
        feedback: Array = _feedbacks([self], np.asarray(nodes, dtype=np.float64), [lr])[0]
        return feedback

    def total_feedback(self, spectrum: Spectrum, lr: float) -> float:
        """``Σ_j w_j φ_lr(λ_j)``; below 1 exactly when ``lr`` is stable."""
        require_positive("lr", lr)
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
        gains = Gains.of(self.rule, self.moments)
        largest = float(part.nodes.max())
        limit = fo_threshold(largest, rule=self.rule)
        if gains.own > 0:
            limit = gains.damping / (gains.own * largest)  # a pole: the feedback passes 1 below it
        if self.moments.b == 0 or (gains.own <= 0 and self.total_feedback(part, limit) < 1):
            return limit
        lower = tight_bounds(part.trace, part.frobenius_sq, largest, rule=self.rule, moments=self.moments).lower
        guess = near if near is not None and near < limit else lower
        return min(limit, first_crossing(lambda lr: self.total_feedback(part, lr), guess=guess))

    def _guess(self, part: Spectrum) -> float:
        """A step size near the threshold of a finite horizon."""
        positive = part.positive
        early = 1 / math.sqrt(self.moments.b * part.frobenius_sq * float(self.steps or 1)) / self.rule.lr_scale
        if min(positive.trace, positive.frobenius_sq) <= 0:
            return early
        late = tight_bounds(
            positive.trace, positive.frobenius_sq, positive.lambda_max, rule=self.rule, moments=self.moments
        )
        return max(early, late.lower)


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
        if condition.steps is None:
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
        plain = [replace(family[place], rule=UpdateRule("gd")) for place in unknown]
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
    positive = np.array([[condition.version == "positive"] for condition in family])
    z = first.rule.lr_scale * np.array(lrs)[:, None] * nodes
    z = np.where(positive, np.maximum(z, 0.0), z)
    if first.steps is None:
        return infinite_feedback(z, momentum=first.rule.momentum, moments=first.moments)
    steps = np.array([[condition.steps] for condition in family], dtype=np.int64)
    return horizon_feedback(z, steps, momentum=first.rule.momentum, moments=first.moments)


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
