"""The expected loss of a run, predicted from the spectrum before any training, and the step size that minimises it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.modes import NOISE, transition
from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.scalar import lowest
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.transform import is_long, mean_path, noise_loss
from zoscope.theory.validate import require_count, require_finite, require_positive

Array = NDArray[np.float64]

TIE = 1e-6
"""Part of the decrease of the loss that does not tell two step sizes apart: runs that have converged to rounding."""


@dataclass(frozen=True)
class GradientMeasure:
    """Spectral measure of the gradient: ``Σ_k weights_k f(nodes_k) = gᵀ f(H) g``.

    Args:
        nodes: ``(k,)`` eigenvalues or quadrature nodes, loss/param².
        weights: ``(k,)``, non-negative, of sum ``‖g‖²``, loss²/param².

    Raises:
        ValueError: If the shapes differ, a value is not finite, or a weight is negative.
    """

    nodes: Array
    weights: Array

    def __post_init__(self) -> None:
        checked = Spectrum(self.nodes, self.weights)
        if (checked.weights < 0).any():
            raise ValueError("nodes and weights of a gradient's measure: weights must be non-negative")
        object.__setattr__(self, "nodes", checked.nodes)
        object.__setattr__(self, "weights", checked.weights)


@dataclass(frozen=True)
class MeanPath:
    """The path of the mean, known otherwise than from the quadratic model.

    Args:
        losses: ``(steps + 1,)`` loss on it after 0, 1, … steps.
        squares: ``(steps + 1,)`` squared norm of the gradient there (of ``P^-1/2 g`` when preconditioned).

    Raises:
        ValueError: If the shapes differ, or a value is not finite.
    """

    losses: Array
    squares: Array

    def __post_init__(self) -> None:
        if self.losses.ndim != 1 or self.losses.shape != self.squares.shape:
            raise ValueError(
                f"losses and squares must be vectors of one length, got {self.losses.shape}, {self.squares.shape}"
            )
        if not (np.isfinite(self.losses).all() and np.isfinite(self.squares).all()):
            raise ValueError("losses and squares of a mean path must be finite")


def predicted_loss(
    spectrum: Spectrum,
    gradient: GradientMeasure,
    *,
    loss: float,
    lr: float,
    steps: int,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    path: MeanPath | None = None,
) -> Array:
    """Expected loss of the quadratic model after 0, 1, …, ``steps`` steps of the zeroth-order optimizer.

    The mean path follows the exact gradient: along a node θ of the gradient measure, in units of the gradient there,
    ``m ← βm + γ; y ← y - ηm; γ = 1 + θy``, with loss ``Σ c (y + ½θy²)`` and squared gradient ``G = Σ c γ²``. Around it
    the estimate has covariance ``(a-1)(ḡḡᵀ + HΔH) + b(G + S) I``, Δ being the covariance of the iterate and
    ``S = Tr HΔH``, which drives the second moment of every mode. With an exact spectrum and gradient measure the result
    is exact for any symmetric H; with a preconditioned rule as far as P is a multiple of the identity.

    Args:
        spectrum: All of M, of any sign; nodes ``(n,)`` in loss/param², weights ``(n,)``.
        gradient: Spectral measure of the gradient in M (of ``P^-1/2 g`` when preconditioned).
        loss: Loss at the start.
        lr: Step size in param²/loss.
        steps: Number of steps, ≥ 0.
        rule: Update rule.
        moments: Constants of the estimator.
        path: Mean path in place of the model's own: its gradients drive the noise, its loss is what the noise adds to.

    Returns:
        ``(steps + 1,)`` losses; ``inf`` from where the model overflows.

    Raises:
        ValueError: If ``loss`` is not finite, ``lr`` not positive, ``steps`` not a whole number ≥ 0, or ``path`` of
            another length.

    Source: derived in the README's theory section.
    """
    require_finite("loss", loss)
    require_positive("lr", lr)
    require_count("steps", steps, least=0)
    if path is not None and path.losses.size != steps + 1:
        raise ValueError(f"path must have steps + 1 = {steps + 1} points, got {path.losses.size}")
    eta, beta = rule.lr_scale * lr, rule.momentum
    theta, c = gradient.nodes, gradient.weights
    nodes = np.concatenate([spectrum.nodes, theta])  # modes under isotropic noise, then the noise along the gradient
    counts = np.concatenate([spectrum.weights, np.ones_like(theta)])
    size = 1 if beta == 0 else 3  # without momentum E x² is the whole state
    state, entry = np.zeros((size, nodes.size)), eta**2 * NOISE[:size, None]
    loss_of, signal_of = 0.5 * counts * nodes, counts * nodes**2
    y, velocity = np.zeros_like(theta), np.zeros_like(theta)
    losses = np.full(steps + 1, float(loss))
    with np.errstate(over="ignore", invalid="ignore"):  # a run that blows up overflows; what follows reads as inf
        matrices = transition(eta * nodes, momentum=beta, a=moments.a)[:size, :size]
        for step in range(1, steps + 1):
            slope = 1 + theta * y
            mean_sq = c * slope**2
            if path is not None:
                mean_sq *= path.squares[step - 1] / max(mean_sq.sum(), np.finfo(np.float64).tiny)
            isotropic = moments.b * (mean_sq.sum() + signal_of @ state[0])
            noise = np.concatenate([np.full_like(spectrum.nodes, isotropic), (moments.a - 1) * mean_sq])
            state = np.einsum("ijn,jn->in", matrices, state) + entry * noise
            velocity = beta * velocity + slope
            y = y - eta * velocity
            mean = loss + c @ (y + 0.5 * theta * y**2) if path is None else path.losses[step]
            losses[step] = mean + loss_of @ state[0]
            if not math.isfinite(losses[step]):
                losses[step:] = math.inf
                break
    return losses


def final_loss(
    spectrum: Spectrum,
    gradient: GradientMeasure,
    *,
    loss: float,
    lr: float,
    steps: int,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
) -> float:
    """The last value of ``predicted_loss``, at a cost that does not grow with the number of steps.

    Args:
        spectrum: As in ``predicted_loss``.
        gradient: As in ``predicted_loss``.
        loss: Loss at the start.
        lr: Step size in param²/loss.
        steps: Number of steps, ≥ 0.
        rule: Update rule.
        moments: Constants of the estimator.

    Returns:
        Expected loss after ``steps`` steps, to about 1e-8 of its terms; ``inf`` when the model overflows.

    Raises:
        ValueError: As ``predicted_loss``.

    Source: derived in the README's theory section.
    """
    if not is_long(steps, momentum=rule.momentum):
        curve = predicted_loss(spectrum, gradient, loss=loss, lr=lr, steps=steps, rule=rule, moments=moments)
        return float(curve[-1])
    require_finite("loss", loss)
    require_positive("lr", lr)
    eta, theta, c = rule.lr_scale * lr, gradient.nodes, gradient.weights
    noise = noise_loss(spectrum, theta, c, eta=eta, beta=rule.momentum, steps=steps, moments=moments)
    y = eta * mean_path(eta * theta, beta=rule.momentum, steps=steps)
    with np.errstate(over="ignore", invalid="ignore"):  # as in the mean path
        total = loss + float(c @ (y + 0.5 * theta * y**2)) + noise
    return total if math.isfinite(total) else math.inf


def best_lr(
    spectrum: Spectrum,
    gradient: GradientMeasure,
    *,
    loss: float,
    steps: int,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    upper: float,
) -> float | None:
    """Step size up to ``upper`` with the smallest predicted loss after ``steps`` steps.

    Args:
        spectrum: As in ``predicted_loss``.
        gradient: As in ``predicted_loss``.
        loss: Loss at the start.
        steps: Number of steps, ≥ 1.
        rule: Update rule.
        moments: Constants of the estimator.
        upper: Largest step size considered, param²/loss.

    Returns:
        Step size in param²/loss, to about 1 %; ``upper`` itself when the loss still falls there; ``None`` when no step
        size lowers the loss, or step sizes far apart lower it equally well.

    Raises:
        ValueError: If ``loss`` is not finite, ``upper`` not positive and finite, or ``steps`` not a positive integer.

    Source: derived in the README's theory section.
    """
    require_positive("upper", upper)
    require_count("steps", steps)

    def final(log_lr: float) -> float:
        lr = math.exp(log_lr)
        return final_loss(spectrum, gradient, loss=loss, lr=lr, steps=steps, rule=rule, moments=moments)

    grid = math.log(upper) + np.linspace(-8, 0, 17)
    values = [final(x) for x in grid]
    best = int(np.argmin(values))
    tied = np.asarray(values) <= values[best] + TIE * (loss - values[best])
    if values[best] >= loss or tied.sum() > 1:
        return None
    ends = grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)]
    place, value = lowest(final, *ends, xtol=5e-3)
    return min(upper, math.exp(place if value < values[best] else grid[best]))
