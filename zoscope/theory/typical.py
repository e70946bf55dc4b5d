"""What a typical run does: the quadratic model simulated on the nodes of a spectrum."""

import math

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.curve import GradientMeasure
from zoscope.theory.modes import NOISE, transition
from zoscope.theory.moments import GAUSSIAN, EstimatorMoments
from zoscope.theory.rules import UpdateRule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.validate import require_count, require_finite, require_positive

Array = NDArray[np.float64]

OUTLIERS = 64
"""Single eigenvalues that are followed one by one; the others average themselves out."""

MANY_QUERIES = 8
"""Queries from which their average is drawn at once."""

BULK = 128
"""Nodes into which the other eigenvalues are gathered."""


def exit_times(
    spectrum: Spectrum,
    gradient: GradientMeasure,
    *,
    rise: float,
    lr: float,
    steps: int,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    runs: int = 64,
    share: float = 1.0,
    seed: int = 0,
) -> Array:
    """Steps after which single runs of the quadratic model have risen by ``rise``.

    The mean of the loss over all runs (``predicted_loss``) is carried by rare ones where few eigenvalues dominate: a
    typical run stays in the valley for longer. Here the large eigenvalues are followed singly, each with its own random
    projection ``u_i``, and share the scalar ``s = uᵀ(ḡ + Hδ)`` of the step; the bulk, whose many projections average
    themselves out, enters by its second moments. The mean path is that of ``predicted_loss``, taken as independent of
    the ``u_i``; so are the fluctuations of ``ḡᵀδ``, which the loss leaves out.

    Args:
        spectrum: All of M or its positive part; nodes ``(n,)`` in loss/param², weights ``(n,)``.
        gradient: Spectral measure of the gradient in M.
        rise: How far its loss has to rise above that at the start for a run to have left, > 0.
        lr: Step size in param²/loss.
        steps: Longest run, ≥ 1.
        rule: Update rule.
        moments: Constants of the estimator.
        runs: Number of simulated runs.
        share: Stop as soon as this share of them has left.
        seed: Of the simulation.

    Returns:
        ``(runs,)`` ascending; ``inf`` for runs that had not left at the end.

    Raises:
        ValueError: If an argument is out of range.

    Source: derived in the README's theory section.
    """
    require_positive("rise", rise)
    require_positive("lr", lr)
    require_count("steps", steps)
    simulation = _Simulation(
        spectrum, gradient, eta=rule.lr_scale * lr, rule=rule, moments=moments, runs=runs, seed=seed
    )
    times = np.full(runs, math.inf)
    with np.errstate(over="ignore", invalid="ignore"):  # a run that blows up overflows; not finite counts as risen
        for step in range(1, steps + 1):
            risen = ~(simulation.step() < rise)
            times[risen] = np.minimum(times[risen], step)
            if np.isfinite(times).sum() >= share * runs:
                break
    return np.sort(times)


def typical_doubling_time(
    spectrum: Spectrum,
    gradient: GradientMeasure,
    *,
    loss: float,
    lr: float,
    steps: int,
    rule: UpdateRule,
    moments: EstimatorMoments = GAUSSIAN,
    runs: int = 64,
    seed: int = 0,
) -> float:
    """Median step after which the loss of the quadratic model has risen by its own size.

    Args:
        spectrum: As in ``exit_times``.
        gradient: As in ``exit_times``.
        loss: Loss at the start, not 0.
        lr: Step size in param²/loss.
        steps: Longest run, ≥ 1.
        rule: Update rule.
        moments: Constants of the estimator.
        runs: Number of simulated runs.
        seed: Of the simulation.

    Returns:
        A whole number of steps; ``inf`` when fewer than half of the runs double within ``steps``. The standard error is
        about 1.25 standard deviations over √runs.

    Raises:
        ValueError: If an argument is out of range.

    Source: derived in the README's theory section.
    """
    require_finite("loss", loss)
    times = exit_times(
        spectrum,
        gradient,
        rise=abs(loss),
        lr=lr,
        steps=steps,
        rule=rule,
        moments=moments,
        runs=runs,
        share=0.5,
        seed=seed,
    )
    return float(times[(runs + 1) // 2 - 1])


class _Simulation:
    """State of all runs: ``(runs, outliers)`` deviations and velocities, ``(runs, 1 or 3, bulk)`` second moments."""

    def __init__(
        self,
        spectrum: Spectrum,
        gradient: GradientMeasure,
        *,
        eta: float,
        rule: UpdateRule,
        moments: EstimatorMoments,
        runs: int,
        seed: int,
    ) -> None:
        self.single, bulk = _separate(spectrum)
        self.eta, self.beta = eta, rule.momentum
        self.theta, self.c = gradient.nodes, gradient.weights
        self.queries = max(1, round(1 / moments.b)) if moments.b > 0 else 1
        self.random = np.random.default_rng(seed)
        size = 1 if self.beta == 0 else 3  # without momentum E x² is the whole state
        self.matrices = transition(eta * bulk.nodes, momentum=self.beta, a=moments.a)[:size, :size]
        self.entry = eta**2 * NOISE[:size]
        self.loss_of, self.signal_of = 0.5 * bulk.weights * bulk.nodes, bulk.weights * bulk.nodes**2
        self.delta, self.velocity = (np.zeros((runs, self.single.size)) for _ in range(2))
        self.state = np.zeros((runs, size, bulk.nodes.size))
        self.y, self.mean_velocity = np.zeros_like(self.theta), np.zeros_like(self.theta)

    def step(self) -> Array:
        """Advance all runs and return how far each loss has risen."""
        slope = 1 + self.theta * self.y
        scatter = np.sqrt(np.maximum(self.c @ slope**2 + self.state[:, 0] @ self.signal_of, 0.0))
        estimate, noise = self._estimate(scatter)
        self.velocity = self.beta * self.velocity + estimate
        self.delta = self.delta - self.eta * self.velocity
        self.state = np.einsum("ijn,rjn->rin", self.matrices, self.state) + noise[:, None, None] * self.entry[:, None]
        self.mean_velocity = self.beta * self.mean_velocity + slope
        self.y = self.y - self.eta * self.mean_velocity
        mean = self.c @ (self.y + 0.5 * self.theta * self.y**2)
        rise: Array = mean + 0.5 * self.delta**2 @ self.single + self.state[:, 0] @ self.loss_of
        return rise

    def _estimate(self, scatter: Array) -> tuple[Array, Array]:
        """The gradient estimate along the single modes, and the variance that it brings to every mode of the bulk."""
        exact = self.single * self.delta
        if self.queries > MANY_QUERIES:  # an average of many is Gaussian, with the moments of the estimator
            total = (exact**2).sum(axis=1) + scatter**2
            spread = np.sqrt((exact**2 + total[:, None]) / self.queries)
            return exact + spread * self.random.standard_normal(exact.shape), total / self.queries
        u = self.random.standard_normal((self.queries, *exact.shape))
        other = self.random.standard_normal((self.queries, len(exact)))
        s = (u * exact).sum(axis=2) + other * scatter
        return (u * s[:, :, None]).mean(axis=0), (s**2).sum(axis=0) / self.queries**2


def _separate(spectrum: Spectrum) -> tuple[Array, Spectrum]:
    """The largest single eigenvalues ``(k,)``, and the rest gathered into few nodes."""
    alone = np.flatnonzero(spectrum.weights == 1)
    alone = alone[np.argsort(-np.abs(spectrum.nodes[alone]))][:OUTLIERS]
    others = np.delete(np.arange(spectrum.nodes.size), alone)
    others = others[np.argsort(spectrum.nodes[others])]
    nodes, weights = spectrum.nodes[others], spectrum.weights[others]
    groups = np.array_split(np.arange(nodes.size), min(BULK, nodes.size)) if nodes.size else []
    gathered = [
        (float(np.average(nodes[g], weights=np.abs(weights[g]))), float(weights[g].sum()))
        for g in groups
        if np.abs(weights[g]).sum() > 0
    ]
    return spectrum.nodes[alone], Spectrum(np.array([n for n, _ in gathered]), np.array([w for _, w in gathered]))
