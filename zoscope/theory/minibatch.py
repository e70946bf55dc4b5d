"""Mean-square stability with mini-batches: every step sees the Hessian ``H_B`` of B examples drawn at random.

The second moment obeys ``Σ' = Σ - η(HΣ+ΣH) + η²(a E[H_B Σ H_B] + b Tr(CΣ) I)``, ``C = E H_B² = H² + s D``, with
``D = n⁻¹Σ_e H_e² - H²`` the spread of the examples' Hessians. The trace term is a feedback of rank one, so η is stable
iff ``b η² Tr(C X) < 1`` for the response X to isotropic noise. X is taken diagonal in the eigenvectors of H.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.rules import GAUSSIAN, EstimatorMoments, UpdateRule
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum, first_crossing, require_count, widening
from zoscope.theory.stability import StabilityCondition, Version, coupled_response, horizon_response, infinite_response

Array = NDArray[np.float64]

JACKKNIFE = 8
"""Groups of samples left out in turn for the error of the modes that are followed one by one."""

FLAT = 1e-6
"""Eigenvalues up to this share of the largest one count as zero where time is infinite."""

FLAT_SPREAD = 0.01
"""Share of the spread at eigenvalues that are not positive from which no step size is called stable for ever."""


def spread_of_batches(examples: int, batch_size: int) -> float:
    """``s = (n-B)/(B(n-1))``: variance of a mean over B of n examples without replacement, in units of one example's.

    Args:
        examples: n.
        batch_size: B; n or more means all of them.

    Returns:
        In [0, 1]; 0 for the full batch.

    Raises:
        ValueError: If one is not a positive integer.
    """
    require_count("examples", examples)
    require_count("batch_size", batch_size)
    if batch_size >= examples:
        return 0.0
    return (examples - batch_size) / (batch_size * (examples - 1))


@dataclass(frozen=True)
class HessianNoise:
    """How the Hessians of single examples spread around their mean H, seen from the eigenvectors of H.

    Args:
        nodes: ``(q,)`` eigenvalues λ_i of eigenvectors v_i that are followed one by one, loss/param².
        coupling: ``(k, q, q)`` k samples of ``V_ij = E(v_iᵀ(H_e - H)v_j)²``.
        spread: ``(k, q)`` samples of ``v_iᵀDv_i``.
        rest: One quadrature rule per random probe vector, and a shorter one for its error: ``Σ w f(θ)`` estimates
            ``Tr(P D P f(H))``, P the projection onto the complement of the v_i. Empty where nothing is left.
        complete: Whether every example was seen by itself, so that ``coupling`` and ``spread`` are exact in the mean.
    """

    nodes: Array
    coupling: Array
    spread: Array
    rest: tuple[tuple[Spectrum, Spectrum], ...]
    complete: bool

    @property
    def total(self) -> float:
        """``Tr D``, loss²/param⁴."""
        rest = float(np.mean([rule.weights.sum() for rule, _ in self.rest])) if self.rest else 0.0
        return float(self.spread.mean(axis=0).sum()) + rest

    def share_up_to(self, limit: float) -> float:
        """Share of ``Tr D`` that sits at eigenvalues up to ``limit``."""
        below = float(self.spread.mean(axis=0)[self.nodes <= limit].sum())
        if self.rest:
            below += float(np.mean([rule.weights[rule.nodes <= limit].sum() for rule, _ in self.rest]))
        return below / self.total if self.total > 0 else 0.0

    def above(self, limit: float) -> "HessianNoise":
        """What sits at eigenvalues above ``limit``."""
        keep = self.nodes > limit
        return replace(
            self,
            nodes=self.nodes[keep],
            coupling=self.coupling[:, keep][:, :, keep],
            spread=self.spread[:, keep],
            rest=tuple((_above(rule, limit), _above(coarse, limit)) for rule, coarse in self.rest),
        )


def _above(rule: Spectrum, limit: float) -> Spectrum:
    return Spectrum(rule.nodes[rule.nodes > limit], rule.weights[rule.nodes > limit])


@dataclass(frozen=True)
class MiniBatchCondition:
    """``b η² Σ_j C_jj x_j = 1``: the feedback of a step through all modes, with mini-batches.

    Modes followed one by one feed one another through ``M_ij = E(v_iᵀH_B v_j)² = λ_i²δ_ij + s V_ij``; the others feel
    their own curvature and the spread of the examples along them. With s = 0 this is ``StabilityCondition``.

    Args:
        rule: Update rule.
        spread: s of ``spread_of_batches``.
        moments: Constants of the estimator.
        steps: Horizon T; ``None`` for infinite time.
        version: ``"full"`` keeps negative eigenvalues; ``"positive"`` takes them as zero: no escape along them, though
            the examples' noise there accumulates.

    Source: derived in the guide's page on theory.
    """

    rule: UpdateRule
    spread: float
    moments: EstimatorMoments = GAUSSIAN
    steps: int | None = None
    version: Version = "positive"

    @property
    def full_batch(self) -> StabilityCondition:
        """The condition with s = 0."""
        return StabilityCondition(self.rule, self.moments, self.steps, self.version)

    def total_feedback(self, spectrum: Spectrum, noise: HessianNoise, lr: float) -> float:
        """Feedback of a step size; below 1 exactly when it is stable in the model.

        Args:
            spectrum: Of H; it contains the ``nodes`` of the noise.
            noise: Spread of the examples' Hessians.
            lr: Step size in param²/loss.
        """
        whole = self.full_batch.total_feedback(spectrum, lr)
        if self.spread == 0 or not math.isfinite(whole) or not self.rule.is_linear:
            return whole
        rest = [self._of_rule(rule, lr) for rule, _ in noise.rest]
        total = whole + self._excess(noise.nodes, noise.coupling.mean(0), noise.spread.mean(0), lr)
        return total + (float(np.mean(rest)) if rest else 0.0)

    def threshold(self, spectrum: Spectrum, noise: HessianNoise) -> float:
        """Largest stable step size, param²/loss; ``inf`` where nothing limits it."""
        if self.moments.b == 0 or not self.rule.is_linear:
            return math.inf
        sources = spectrum.positive.frobenius_sq if self.version == "positive" else spectrum.frobenius_sq
        sources += self.spread * max(noise.total, 0.0)
        if sources <= 0:
            return math.inf
        reach = 1 / math.sqrt(self.moments.b * sources * (self.steps or 1)) * (1 - self.rule.momentum)
        whole = self.full_batch.threshold(spectrum)
        if self.spread == 0:
            return whole
        guess = min(whole, reach / self.rule.lr_scale) if self.steps or math.isinf(whole) else whole
        return first_crossing(lambda lr: self.total_feedback(spectrum, noise, lr), guess=guess)

    def estimate(self, sampled: SampledSpectrum, noise: HessianNoise) -> Estimate | None:
        """Threshold with its error bar: that of the spectrum, of the random examples, and of the probe vectors.

        Args:
            sampled: Spectrum of H with its errors.
            noise: Spread of the examples' Hessians.

        Returns:
            ``None`` in infinite time where the examples spread along directions without positive curvature: there noise
            accumulates for ever, and no step size is stable.
        """
        if self.spread == 0 or not self.rule.is_linear:
            return self.full_batch.estimate(sampled)
        if self.steps is None:
            limit = FLAT * sampled.fine.lambda_max
            if noise.share_up_to(limit) > FLAT_SPREAD:
                return None
            noise = noise.above(limit)
        value = self.threshold(sampled.fine, noise)
        if not 0 < value < math.inf:
            return Estimate(value)
        step = 1e-4
        change = self.total_feedback(sampled.fine, noise, value * math.exp(step)) - 1
        slope = change / step if math.isfinite(change) else math.inf
        scale = value / slope if slope > 0 else 0.0
        stderr, quadrature = self._errors(sampled, noise, value)
        return Estimate(value, scale * stderr, scale * quadrature)

    def _errors(self, sampled: SampledSpectrum, noise: HessianNoise, lr: float) -> tuple[float, float]:
        """Of the feedback at a step size: standard error and quadrature."""

        def feedback(nodes: Array) -> Array:
            found = self.full_batch.feedback(nodes, lr)
            return np.where(np.isfinite(found), found, 0.0)

        rest, coarse = ([self._of_rule(pair[which], lr) for pair in noise.rest] for which in (0, 1))
        parts = [sampled.stderr_of(feedback), _stderr(rest), self._jackknife(noise, lr)]
        quadrature = sampled.quadrature_error_of(feedback)
        if rest:
            quadrature += abs(float(np.mean(rest) - np.mean(coarse)))
        return math.sqrt(sum(part**2 for part in parts)), quadrature

    def _jackknife(self, noise: HessianNoise, lr: float) -> float:
        count = len(noise.spread)
        if noise.complete or count < 2 or not noise.nodes.size:
            return 0.0
        parts = np.array_split(np.arange(count), min(JACKKNIFE, count))
        values = [
            self._excess(
                noise.nodes, np.delete(noise.coupling, p, 0).mean(0), np.delete(noise.spread, p, 0).mean(0), lr
            )
            for p in parts
        ]
        scatter = float(np.std(values))  # (g-1)/g times the sum of squares, as a variance over g
        return math.sqrt(len(parts) - 1) * scatter * widening(len(parts) - 1)

    def _excess(self, nodes: Array, coupling: Array, spread: Array, lr: float) -> float:
        """What the spread adds to the feedback through the modes that are followed one by one."""
        if not nodes.size:
            return 0.0
        a, eta = self.moments.a, self.rule.lr_scale * lr
        z = eta * (np.maximum(nodes, 0.0) if self.version == "positive" else nodes)
        gains = np.diag(z**2) + eta**2 * self.spread * coupling
        response = coupled_response(z, gains, self.steps, momentum=self.rule.momentum, a=a, drift=self._drift(z, eta))
        if not np.isfinite(response).all():
            return math.inf
        sources = z**2 + eta**2 * self.spread * spread
        return self.moments.b * float(sources @ response) - float(self.full_batch.feedback(nodes, lr).sum())

    def _drift(self, z: Array, eta: float) -> Array | None:
        return z + eta * self.rule.weight_decay if self.rule.weight_decay else None

    def _of_rule(self, rule: Spectrum, lr: float) -> float:
        """What the spread adds through the other modes, by the rule of a probe vector."""
        eta, beta, a = self.rule.lr_scale * lr, self.rule.momentum, self.moments.a
        z = eta * (np.maximum(rule.nodes, 0.0) if self.version == "positive" else rule.nodes)
        drift = self._drift(z, eta)
        if self.steps is None:
            response = infinite_response(z, momentum=beta, a=a, drift=drift)
        else:
            response = horizon_response(z, self.steps, momentum=beta, a=a, drift=drift)
        keep = rule.weights != 0
        if np.isinf(response[keep]).any():
            return math.inf
        return self.moments.b * eta**2 * self.spread * float(rule.weights[keep] @ response[keep])


def _stderr(values: list[float]) -> float:
    """Of a mean over few probe vectors, widened by Student's factor so that ±1.96 of it is a 95 % interval."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.inf if values and not np.isfinite(values).all() else 0.0
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) * widening(len(values) - 1)
