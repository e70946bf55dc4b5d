"""Mean-square stability: step sizes with a bounded second moment, for ever or for a number of steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.modes import horizon_feedback, infinite_feedback
from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.scalar import root
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum
from zoscope.theory.thresholds import Gains, fo_threshold, tight_bounds
from zoscope.theory.validate import require_count, require_positive

Array = NDArray[np.float64]
Version = Literal["positive", "full"]

LONGEST_RUN = 2**50
"""Steps beyond which a blow-up counts as never."""


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
        z = self.rule.lr_scale * lr * np.asarray(nodes, dtype=np.float64)
        if self.version == "positive":
            z = np.maximum(z, 0.0)
        if self.steps is None:
            return infinite_feedback(z, momentum=self.rule.momentum, moments=self.moments)
        return horizon_feedback(z, self.steps, momentum=self.rule.momentum, moments=self.moments)

    def total_feedback(self, spectrum: Spectrum, lr: float) -> float:
        """``Σ_j w_j φ_lr(λ_j)``; below 1 exactly when ``lr`` is stable."""
        part = self._part(spectrum)
        feedback = self.feedback(part.nodes, lr)
        return math.inf if np.isinf(feedback).any() else float(part.weights @ feedback)  # a weight may be negative

    def threshold(self, spectrum: Spectrum) -> float:
        """Largest stable step size.

        Args:
            spectrum: Nodes ``(n,)`` in loss/param², weights ``(n,)``.

        Returns:
            Root of ``Σ w φ = 1`` in param²/loss, to about 1e-13 relative; ``inf`` for a spectrum without feedback.
            In infinite time, where noise alone never reaches 1, the step size at which a single mode is unstable.
        """
        return self._threshold(self._part(spectrum))

    def estimate(self, sampled: SampledSpectrum) -> Estimate:
        """Threshold of a sampled spectrum with its error bar.

        Sampling: the standard error of ``Σ w φ`` at the root, divided by its derivative in ``log lr`` (delta method).
        Quadrature: the error of that sum by the same derivative.

        Args:
            sampled: Spectrum with its sampled part.

        Returns:
            Threshold in param²/loss.
        """
        value = self.threshold(sampled.fine)
        if sampled.is_exact:
            return Estimate(value)
        if math.isinf(value):
            return Estimate(value)
        step = 1e-6  # relative error of the slope, which is an error bar's: about the same
        slope = (self.total_feedback(sampled.fine, value * math.exp(step)) - 1) / step

        def at_root(nodes: Array) -> Array:
            return _finite(self.feedback(nodes, value))

        scale = value / slope if slope > 0 else 0.0
        return Estimate(value, scale * sampled.stderr_of(at_root), scale * sampled.quadrature_error_of(at_root))

    def _part(self, spectrum: Spectrum) -> Spectrum:
        if self.version == "positive":
            return spectrum.positive
        keep = spectrum.weights != 0
        return spectrum if keep.all() else Spectrum(spectrum.nodes[keep], spectrum.weights[keep])

    def _threshold(self, part: Spectrum) -> float:
        """Threshold of a part already selected."""
        if self.steps is None:
            return self._infinite_threshold(part)
        if self.moments.b == 0 or part.frobenius_sq <= 0:
            return math.inf
        return first_crossing(lambda lr: self.total_feedback(part, lr), guess=self._guess(part))

    def _infinite_threshold(self, part: Spectrum) -> float:
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
        return min(limit, first_crossing(lambda lr: self.total_feedback(part, lr), guess=lower))

    def _guess(self, part: Spectrum) -> float:
        """A step size near the threshold: that without momentum, where the effective step is ``lr_scale·lr/(1-β)``."""
        if self.rule.momentum > 0:
            plain = StabilityCondition(UpdateRule("gd"), self.moments, self.steps, self.version)
            return plain.threshold(part) * (1 - self.rule.momentum) / self.rule.lr_scale
        positive = part.positive
        early = 1 / math.sqrt(self.moments.b * part.frobenius_sq * float(self.steps or 1)) / self.rule.lr_scale
        if min(positive.trace, positive.frobenius_sq) <= 0:
            return early
        late = tight_bounds(
            positive.trace, positive.frobenius_sq, positive.lambda_max, rule=self.rule, moments=self.moments
        )
        return max(early, late.lower)


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

    Source: derived in the README's theory section.
    """
    return tuple(
        HorizonPoint(
            steps=horizon,
            lower=StabilityCondition(rule, moments, horizon, "full").estimate(sampled),
            upper=StabilityCondition(rule, moments, horizon, "positive").estimate(sampled),
        )
        for horizon in steps
    )


def time_to_blow_up(
    spectrum: Spectrum,
    lr: float,
    *,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    version: Version = "positive",
) -> float:
    """Number of steps after which ``lr`` is no longer stable: the smallest T with ``Σ w φ_lr ≥ 1``.

    Args:
        spectrum: Nodes ``(n,)`` in loss/param², weights ``(n,)``.
        lr: Step size in param²/loss.
        rule: Update rule.
        moments: Constants of the estimator.
        version: As in ``StabilityCondition``.

    Returns:
        A whole number ≥ 1; ``inf`` when the feedback never reaches 1, or not within 2^50 steps.

    Raises:
        ValueError: If ``lr`` is not positive or the version unknown.

    Source: derived in the README's theory section.
    """

    def unstable_at(steps: int) -> bool:
        return StabilityCondition(rule, moments, steps, version).total_feedback(spectrum, lr) >= 1

    escapes = version == "full" and bool((spectrum.nodes[spectrum.weights != 0] < 0).any())
    if not escapes and StabilityCondition(rule, moments).total_feedback(spectrum, lr) <= 1:
        return math.inf
    late = 1
    while not unstable_at(late):
        late *= 2
        if late > LONGEST_RUN:
            return math.inf
    early = late // 2  # stable for `early` steps, not for `late`
    while late - early > 1:
        middle = (early + late) // 2
        early, late = (early, middle) if unstable_at(middle) else (middle, late)
    return float(late)


def first_crossing(total: Callable[[float], float], *, guess: float) -> float:
    """Root of ``total(lr) = 1``, from a guess; ``inf`` when there is none below the largest float.

    Secant steps on ``log total`` in ``log lr``, kept inside the bracket seen so far. That curve is nearly a straight
    line: its slope lies between 1 (every mode in its steady state) and 2 (none yet), more where a mode is unstable.
    Stops at a relative error of about 1e-14.
    """
    cap = 50.0  # feedback overflows far above the root; a finite ceiling keeps the secant slopes sane

    def excess(log_lr: float) -> float:
        value = total(math.exp(log_lr))
        if value < -1.0:  # far above the root, where a signed quadrature weight of an unstable mode takes over
            return cap
        return min(max(math.log(value), -cap), cap) if value > 0 else -cap

    x = math.log(guess)
    slope, reach, last = 1.5, 1.0, 1.0
    low, high = -math.inf, math.inf
    value = excess(x)
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
        previous, value = value, excess(x)
        slope = max((value - previous) / step, 1e-2)
    return math.exp(root(excess, low, high, xtol=2e-14))


def _finite(values: Array) -> Array:
    """Replace what only a node of zero weight can have beyond its pole, so that ``0·inf`` does not become a NaN."""
    return np.where(np.isfinite(values), values, 0.0)
