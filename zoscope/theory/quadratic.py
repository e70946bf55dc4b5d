"""Runs on the quadratic model: expected and typical loss curves, and where the expected loss goes down."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zoscope.theory.rules import GAUSSIAN, EstimatorMoments, UpdateRule, update_rule
from zoscope.theory.spectrum import Spectrum, lowest, require_count, require_finite
from zoscope.theory.stability import LONGEST_RUN, NOISE, StabilityCondition, Version, excess_rate, transition

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

POINTS = 24
"""Points on the contour; its error is about 3.9^-24 = 1e-14, and half of them follow from symmetry."""

NEAR = 1e-3
"""How near to the fastest growth the contour is put, in units of 1/N: far less than its own distance from there."""

SHORTEST = 200
"""Steps from which the contour, whose height is 20/N, keeps clear of the branch at ±π."""


def is_long(steps: int, *, momentum: float) -> bool:
    """Whether a run is long enough: oscillations that momentum causes, which the contour leaves out, have died out."""
    return steps >= SHORTEST and (momentum == 0 or -steps * math.log(momentum) > 30)


def noise_loss(
    spectrum: Spectrum, theta: Array, c: Array, *, eta: float, beta: float, steps: int, moments: EstimatorMoments
) -> float:
    """Expected loss above that of the mean path after ``steps`` steps.

    Args:
        spectrum: All of M; nodes ``(n,)``.
        theta: ``(k,)`` nodes of the gradient measure.
        c: ``(k,)`` its weights.
        eta: Step along the momentum, param²/loss.
        beta: Momentum.
        steps: Number of steps, for which ``is_long`` holds.
        moments: Constants of the estimator.

    Returns:
        The part of the loss that noise causes, to about 1e-8 relative; ``inf`` when it overflows.

    Source: contour from Weideman, Optimizing Talbot's contours, SIAM J. Numer. Anal. 44 (2006).
    """
    fastest = _fastest_growth(spectrum, theta, eta=eta, beta=beta, moments=moments, xtol=NEAR / steps)
    if fastest * steps > 600:
        return math.inf
    s, ds = _contour(steps + 1, shift=fastest)
    values = _transform(np.expm1(s), spectrum, theta, c, eta, beta, moments)
    return float(2 / POINTS * (values * np.exp(s * (steps + 1)) * ds).imag.sum())


def mean_path(z: Array, *, beta: float, steps: int) -> Array:
    """``y/η`` after ``steps`` steps of ``m ← βm + 1 + zy/η; y ← y - ηm`` from rest. Shape ``(k,)``."""
    one, zero = np.ones_like(z), np.zeros_like(z)
    momentum = np.array([z, beta * one, one])
    step = np.array([np.array([one, zero, zero]) - momentum, momentum, np.array([zero, zero, one])])
    with np.errstate(over="ignore", invalid="ignore"):  # escape along negative curvature overflows on a long run
        return np.asarray(np.linalg.matrix_power(np.moveaxis(step, 2, 0), steps)[:, 0, 2])


def _transform(
    e: Complex, spectrum: Spectrum, theta: Array, c: Array, eta: float, beta: float, moments: EstimatorMoments
) -> Complex:
    """The transform of the noise loss at ``ρ = 1 + e``, ``(p,)`` from ``(p,)``."""
    extra = (moments.a - 1) * c
    k, _ = _mode(e[:, None], eta * spectrum.nodes, beta, moments)
    k_path, square = _mode(e[:, None], eta * theta, beta, moments)
    feedback = k @ (moments.b * spectrum.weights * (eta * spectrum.nodes) ** 2)
    variance = (square @ c + (k_path * square) @ (extra * (eta * theta) ** 2)) / (1 - feedback)
    return (
        0.5
        * eta**2
        * (moments.b * variance * (k @ (spectrum.weights * spectrum.nodes)) + (k_path * square) @ (extra * theta))
    )


def _mode(e: Complex, z: Array, beta: float, moments: EstimatorMoments) -> tuple[Complex, Complex]:
    """``k̂`` and ``γ̂²`` at ``ρ = 1 + e``, each ``(p, n)`` from ``(p, 1)`` and ``(n,)``."""
    rho, drift = 1 + e, z * (2 * (1 + beta) - z)
    silent = (1 - beta + e) * (drift + (drift + 1 - beta**2) * e + e**2)  # χ without the noise of the mode itself
    k = rho * (rho + beta) / (silent - (moments.a - 1) * z**2 * rho * (rho + beta))
    square = ((1 - beta) ** 2 * (1 + beta) + 2 * beta * z * rho + (2 - beta - beta**2) * e + e**2) / silent
    return k, square


def _contour(time: float, *, shift: float) -> tuple[Complex, Complex]:
    """Upper half of Talbot's contour around ``s ≤ shift`` for ``exp(s·time)``: points and derivative, each ``(p,)``."""
    angle = (2 * np.arange(POINTS // 2) + 1) * np.pi / POINTS
    cot = 1 / np.tan(0.6407 * angle)
    scale = POINTS / time
    points = np.asarray(shift + scale * (0.5017 * angle * cot - 0.6122 + 0.2645j * angle), dtype=np.complex128)
    slopes = np.asarray(scale * (0.5017 * (cot - 0.6407 * angle * (1 + cot**2)) + 0.2645j), dtype=np.complex128)
    return points, slopes


def _fastest_growth(
    spectrum: Spectrum, theta: Array, *, eta: float, beta: float, moments: EstimatorMoments, xtol: float
) -> float:
    """Logarithm of the largest rate in the recursion, at least 0; the path's nodes count by their own growth alone."""
    nodes = np.concatenate([spectrum.nodes, theta])
    weights = np.concatenate([spectrum.weights, np.full_like(theta, np.finfo(np.float64).tiny)])
    whole, rule = Spectrum(nodes, weights), UpdateRule("", beta)
    return math.log1p(excess_rate(whole, eta, rule=rule, moments=moments, least=0.0, xtol=xtol))


PLAIN = update_rule("gd")


def descent_threshold(
    trace: float,
    rayleigh: float,
    *,
    alignment: float = 1.0,
    noise_curvature: float = 0.0,
    noise: float = 0.0,
    moments: EstimatorMoments = GAUSSIAN,
    rule: UpdateRule = PLAIN,
) -> float:
    """Step size below which the expected loss falls: ``2 / (b Tr H + a r_g)`` without momentum.

    That is exact for one step of the quadratic model, whatever the sign of H:
    ``E f(x⁺) - f = -η‖g‖² + ½η²(a gᵀHg + b Tr(H) ‖g‖²)``. Momentum makes it a statement about the steps after the
    average has filled: modes slow against ``1/(1-β)`` steps move, and diffuse, as if by ``η̃ = η s/(1-β)`` (s = 1, or
    1-β for an average with unit gain), while the deterministic part is stable up to ``η̃ r_g = 2(1+β)/(1-β)``:
    ``η̃ = 2 / (b Tr H + (a - 1 + (1-β)/(1+β)) r_g)``. It joins the first-order threshold, ``a = 1`` and ``b = 0``,
    to that of noise in slow modes. With Adam's frozen P it is ``2 gᵀP⁻¹g / (a gᵀP⁻¹HP⁻¹g + b Tr(P⁻¹HP⁻¹) ‖g‖²)``. With
    mini-batches ``E g_BᵀP⁻¹HP⁻¹g_B`` and ``E‖g_B‖²`` take the place of what they are for g.

    Args:
        trace: ``Tr H``, signed, loss/param²; ``Tr P⁻¹HP⁻¹`` with a preconditioner.
        rayleigh: ``gᵀHg/‖g‖²``, signed; ``gᵀP⁻¹HP⁻¹g/‖g‖²``.
        alignment: ``gᵀP⁻¹g/‖g‖²``.
        noise_curvature: ``E (g_B-g)ᵀP⁻¹HP⁻¹(g_B-g)/‖g‖²`` of mini-batches.
        noise: ``E‖g_B-g‖²/‖g‖²`` of mini-batches.
        moments: Constants of the estimator.
        rule: Update rule.

    Returns:
        Threshold in param²/loss; ``inf`` when the denominator is not positive.

    Raises:
        ValueError: If an argument is not finite, or ``alignment`` or ``noise`` is negative.

    Source: derived in the guide's page on theory.
    """
    require_finite(trace=trace, rayleigh=rayleigh, noise_curvature=noise_curvature)
    require_finite(">= 0", alignment=alignment, noise=noise)
    curvature = along_gradient(moments, rule) * rayleigh + moments.b * trace * (1 + noise) + moments.a * noise_curvature
    return 2 * alignment * (1 - rule.momentum) / (rule.lr_scale * curvature) if curvature > 0 else math.inf


def along_gradient(moments: EstimatorMoments, rule: UpdateRule) -> float:
    """Weight of the curvature along the gradient: noise, and the deterministic path under momentum."""
    return moments.a - 1 + (1 - rule.momentum) / (1 + rule.momentum)


def one_sided_mu(grad_norm: float, trace: float, frobenius_sq: float) -> float:
    """μ at which the noise that one-sided differences add is as large as that of the directions.

    ``(f(θ+μu) - f(θ))/μ = uᵀg + ½ μ uᵀHu``. To the noise ``‖g‖² I`` of Gaussian directions it adds
    ``(μ²/4)[((Tr H)² + 2‖H‖²) I + 4 Tr(H) H + 8 H²]``, of which the first term counts where many modes have curvature.
    On a quadratic thresholds stay what they are. μ has to be well below the result; at a tenth the noise is 1 % larger.

    Args:
        grad_norm: ``‖g‖``, loss/param.
        trace: ``Tr H``, loss/param².
        frobenius_sq: ``‖H‖_F²``.

    Returns:
        ``2‖g‖/√((Tr H)² + 2‖H‖_F²)``, in the parameters' unit; ``inf`` without curvature.

    Source: derived in the guide's page on theory.
    """
    require_finite(">= 0", grad_norm=grad_norm)
    square = trace**2 + 2 * frobenius_sq
    return 2 * grad_norm / math.sqrt(square) if square > 0 else math.inf


def gradient_floor(pull: float, *, noise_sq: float = 0.0) -> float:
    """Gradient norm at which steps that do not shrink with the gradient gain nothing any more.

    Such a step gains ``s ‖g‖`` times ``‖g‖/√(‖g‖² + E‖g_B-g‖²)``, and its noise costs ``½ s² Tr H`` wherever the run
    is: the two are equal at the floor. ``pull = κ·lr·Tr(H)/2`` is the floor without mini-batches.

    Args:
        pull: As above, with κ of `floor_factor`, loss/param.
        noise_sq: ``E‖g_B-g‖²`` of mini-batches, loss²/param².

    Returns:
        ``‖g‖`` in loss/param; 0 where the curvature does not hold a run up.

    Source: derived in the guide's page on theory.
    """
    square = max(pull, 0.0) ** 2
    return math.sqrt(0.5 * (square + math.sqrt(square * (square + 4 * noise_sq))))


TIE = 1e-6
"""Part of the decrease of the loss that does not tell two step sizes apart: runs that have converged to rounding."""


@dataclass(frozen=True)
class GradientMeasure(Spectrum):
    """Spectral measure of the gradient: ``Σ_k weights_k f(nodes_k) = gᵀ f(H) g``.

    Args:
        nodes: ``(k,)`` eigenvalues or quadrature nodes, loss/param².
        weights: ``(k,)``, non-negative, of sum ``‖g‖²``, loss²/param².

    Raises:
        ValueError: If the shapes differ, a value is not finite, or a weight is negative.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights < 0).any():
            raise ValueError("nodes and weights of a gradient's measure: weights must be non-negative")


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


FEW_MODES = 5.0
"""Effective rank below which typical runs and the mean square part ways."""

OUTLIERS = 64
"""Single eigenvalues that are followed one by one; the others average themselves out."""

MANY_QUERIES = 8
"""Queries from which their average is drawn at once."""

BULK = 128
"""Nodes into which the other eigenvalues are gathered."""


@dataclass(frozen=True)
class QuadraticModel:
    """A zeroth-order optimizer on the quadratic model of a loss around the point where it was measured.

    The mean path follows the exact gradient: along a node θ of the gradient measure, in units of the gradient there,
    ``m ← βm + γ; y ← y - ηm; γ = 1 + θy``, with loss ``Σ c (y + ½θy²)`` and squared gradient ``G = Σ c γ²``. Around it
    the estimate has covariance ``(a-1)(ḡḡᵀ + HΔH) + b(G + S) I``, Δ being the covariance of the iterate and
    ``S = Tr HΔH``, which drives the second moment of every mode. With an exact spectrum and gradient measure the
    expected loss is exact for any symmetric H; with a preconditioned rule as far as P is a multiple of the identity.

    Args:
        spectrum: All of M, of any sign; nodes ``(n,)`` in loss/param², weights ``(n,)``.
        rule: Update rule.
        moments: Constants of the estimator.
        gradient: Spectral measure of the gradient in M (of ``P^-1/2 g`` when preconditioned); ``None`` where it is 0.
        loss: Loss at the start.

    Raises:
        ValueError: If ``loss`` is not finite. Every method raises it for an argument out of range.

    Source: derived in the guide's page on theory.
    """

    spectrum: Spectrum
    rule: UpdateRule
    moments: EstimatorMoments = GAUSSIAN
    gradient: GradientMeasure | None = None
    loss: float = 0.0

    def __post_init__(self) -> None:
        require_finite(loss=self.loss)

    @property
    def path_nodes(self) -> tuple[Array, Array]:
        """``(k,)`` nodes and weights of the gradient's measure, of which the mean path consists."""
        if self.gradient is None:
            return np.empty(0), np.empty(0)
        return self.gradient.nodes, self.gradient.weights

    @property
    def positive(self) -> "QuadraticModel":
        """The same without eigenvalues ≤ 0."""
        return replace(self, spectrum=self.spectrum.positive)

    def loss_curve(self, lr: float, steps: int, *, path: MeanPath | None = None) -> Array:
        """Expected loss after 0, 1, …, ``steps`` steps.

        Args:
            lr: Step size in param²/loss.
            steps: Number of steps, ≥ 0.
            path: Mean path in place of the model's own: its gradients drive the noise, its loss is what the noise adds
                to.

        Returns:
            ``(steps + 1,)`` losses; ``inf`` from where the model overflows.
        """
        require_finite("> 0", lr=lr)
        require_count("steps", steps, least=0)
        if path is not None and path.losses.size != steps + 1:
            raise ValueError(f"path must have steps + 1 = {steps + 1} points, got {path.losses.size}")
        eta, beta = self.rule.lr_scale * lr, self.rule.momentum
        theta, c = self.path_nodes
        nodes = np.concatenate([self.spectrum.nodes, theta])  # under isotropic noise, and that along the gradient
        counts = np.concatenate([self.spectrum.weights, np.ones_like(theta)])
        size = 1 if beta == 0 else 3  # without momentum E x² is the whole state
        state, entry = np.zeros((size, nodes.size)), eta**2 * NOISE[:size, None]
        loss_of, signal_of = 0.5 * counts * nodes, counts * nodes**2
        y, velocity = np.zeros_like(theta), np.zeros_like(theta)
        losses = np.full(steps + 1, float(self.loss))
        with np.errstate(over="ignore", invalid="ignore"):  # a run that blows up overflows; what follows reads as inf
            matrices = transition(eta * nodes, momentum=beta, a=self.moments.a)[:size, :size]
            for step in range(1, steps + 1):
                slope = 1 + theta * y
                mean_sq = c * slope**2
                if path is not None:
                    mean_sq *= path.squares[step - 1] / max(mean_sq.sum(), np.finfo(np.float64).tiny)
                isotropic = self.moments.b * (mean_sq.sum() + signal_of @ state[0])
                noise = np.concatenate([np.full_like(self.spectrum.nodes, isotropic), (self.moments.a - 1) * mean_sq])
                state = np.einsum("ijn,jn->in", matrices, state) + entry * noise
                velocity = beta * velocity + slope
                y = y - eta * velocity
                mean = self.loss + c @ (y + 0.5 * theta * y**2) if path is None else path.losses[step]
                losses[step] = mean + loss_of @ state[0]
                if not math.isfinite(losses[step]):
                    losses[step:] = math.inf
                    break
        return losses

    def final_loss(self, lr: float, steps: int) -> float:
        """The last value of ``loss_curve``, at a cost that does not grow with the number of steps.

        Args:
            lr: Step size in param²/loss.
            steps: Number of steps, ≥ 0.

        Returns:
            Expected loss after ``steps`` steps, to about 1e-8 of its terms; ``inf`` when the model overflows.
        """
        if not is_long(steps, momentum=self.rule.momentum):
            return float(self.loss_curve(lr, steps)[-1])
        require_finite("> 0", lr=lr)
        eta, (theta, c) = self.rule.lr_scale * lr, self.path_nodes
        noise = noise_loss(self.spectrum, theta, c, eta=eta, beta=self.rule.momentum, steps=steps, moments=self.moments)
        y = eta * mean_path(eta * theta, beta=self.rule.momentum, steps=steps)
        with np.errstate(over="ignore", invalid="ignore"):  # as in the mean path
            total = self.loss + float(c @ (y + 0.5 * theta * y**2)) + noise
        return total if math.isfinite(total) else math.inf

    def best_lr(self, steps: int, *, upper: float) -> float | None:
        """Step size up to ``upper`` with the smallest expected loss after ``steps`` steps.

        Args:
            steps: Number of steps, ≥ 1.
            upper: Largest step size considered, param²/loss.

        Returns:
            Step size in param²/loss, to about 1 %; ``upper`` itself when the loss still falls there; ``None`` when no
            step size lowers the loss, or step sizes far apart lower it equally well.
        """
        require_finite("> 0", upper=upper)
        require_count("steps", steps)

        def final(log_lr: float) -> float:
            return self.final_loss(math.exp(log_lr), steps)

        grid = math.log(upper) + np.linspace(-8, 0, 17)
        values = [final(x) for x in grid]
        best = int(np.argmin(values))
        tied = np.asarray(values) <= values[best] + TIE * (self.loss - values[best])
        if values[best] >= self.loss or tied.sum() > 1:
            return None
        ends = grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)]
        place, value = lowest(final, *ends, xtol=5e-3)
        return min(upper, math.exp(place if value < values[best] else grid[best]))

    def exit_times(
        self, lr: float, steps: int, *, rise: float, runs: int = 64, share: float = 1.0, seed: int = 0
    ) -> Array:
        """Steps after which single runs have risen by ``rise``.

        The mean of the loss over all runs (``loss_curve``) is carried by rare ones where few eigenvalues dominate: a
        typical run stays in the valley for longer. Here the large eigenvalues are followed singly, each with its own
        random projection ``u_i``, and share the scalar ``s = uᵀ(ḡ + Hδ)`` of the step; the bulk, whose many
        projections average themselves out, enters by its second moments. The mean path is that of ``loss_curve``,
        taken as independent of the ``u_i``; so are the fluctuations of ``ḡᵀδ``, which the loss leaves out.

        Args:
            lr: Step size in param²/loss.
            steps: Longest run, ≥ 1.
            rise: How far its loss has to rise above that at the start for a run to have left, > 0.
            runs: Number of simulated runs.
            share: Stop as soon as this share of them has left.
            seed: Of the simulation.

        Returns:
            ``(runs,)`` ascending; ``inf`` for runs that had not left at the end.
        """
        require_finite("> 0", rise=rise, lr=lr)
        require_count("steps", steps)
        simulation = _Simulation(self, eta=self.rule.lr_scale * lr, runs=runs, seed=seed)
        times = np.full(runs, math.inf)
        with np.errstate(over="ignore", invalid="ignore"):  # a run that blows up overflows; not finite counts as risen
            for step in range(1, steps + 1):
                risen = ~(simulation.step() < rise)
                times[risen] = np.minimum(times[risen], step)
                if np.isfinite(times).sum() >= share * runs:
                    break
        return np.sort(times)

    def doubling_time(self, lr: float, steps: int, *, runs: int = 64, seed: int = 0) -> float:
        """Median step after which the loss of a run, not 0 at the start, has risen by its own size.

        Args:
            lr: Step size in param²/loss.
            steps: Longest run, ≥ 1.
            runs: Number of simulated runs.
            seed: Of the simulation.

        Returns:
            A whole number of steps; ``inf`` when fewer than half of the runs double within ``steps``. The standard
            error is about 1.25 standard deviations over √runs.
        """
        times = self.exit_times(lr, steps, rise=abs(self.loss), runs=runs, share=0.5, seed=seed)
        return float(times[(runs + 1) // 2 - 1])

    def doubling_times(self, lr: float, steps: int) -> tuple[float, float]:
        """When the loss, not 0 at the start, has risen by its own size: in the mean over runs, and in a typical run.

        This is when a blow-up shows. Feedback passes 1 long before where the gradient, which starts the noise, is
        small. The mean counts all eigenvalues and is led by the unluckiest runs; the typical run the positive ones.

        Args:
            lr: Step size in param²/loss.
            steps: Steps to look ahead.

        Returns:
            The earlier and the later one; ``inf`` for not within ``steps``.
        """
        risen = np.flatnonzero(self.loss_curve(lr, steps) - self.loss >= abs(self.loss))
        mean = float(risen[0]) if risen.size else math.inf
        typical = self.positive.doubling_time(lr, steps)
        return min(mean, typical), max(mean, typical)

    def growth_rate(self, lr: float) -> float:
        """Spectral radius ρ of the second-moment operator: ``E‖x_t‖²`` grows like ``ρ^t``.

        The largest ρ with ``Σ_i λ_i² [(ρI - A_i)⁻¹ w]₁ = 1``, and at least the radius of every mode by itself. In
        closed form, with ``z = ηλ`` and ``D = z(2(1+β) - z)``,

            η² b⁻¹ [(ρI - A)⁻¹ w]₁ = ρ(ρ+β) / χ(ρ),
            χ(1+e) = (1-β+e)(D + (D+1-β²)e + e²) - (a-1) z² (1+e)(1+e+β).

        Args:
            lr: Step size in param²/loss.

        Returns:
            ρ per step, dimensionless, to about 1e-12; 1 for a zero spectrum; ``inf`` where ``ηλ`` passes 1e50.
        """
        return 1.0 + excess_rate(self.spectrum, lr, rule=self.rule, moments=self.moments)

    def steps_to_grow(self, lr: float, factor: float) -> float:
        """Steps, not rounded, in which ``E‖x‖²`` grows by ``factor > 1``: ``ln F / ln ρ``; ``inf`` when ``ρ ≤ 1``."""
        if not (math.isfinite(factor) and factor > 1):
            raise ValueError(f"factor must be finite and > 1, got {factor!r}")
        excess = excess_rate(self.spectrum, lr, rule=self.rule, moments=self.moments, least=0.0)
        return math.log(factor) / math.log1p(excess) if excess > 0 else math.inf

    def time_to_blow_up(self, lr: float, version: Version = "positive") -> float:
        """Number of steps after which ``lr`` is no longer stable: the smallest T with ``Σ w φ_lr ≥ 1``.

        Args:
            lr: Step size in param²/loss.
            version: As in ``StabilityCondition``.

        Returns:
            A whole number ≥ 1; ``inf`` when the feedback never reaches 1, or not within 2^50 steps.
        """

        def unstable_at(steps: int) -> bool:
            return StabilityCondition(self.rule, self.moments, steps, version).total_feedback(self.spectrum, lr) >= 1

        escapes = version == "full" and bool((self.spectrum.nodes[self.spectrum.weights != 0] < 0).any())
        if not escapes and StabilityCondition(self.rule, self.moments).total_feedback(self.spectrum, lr) <= 1:
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


class _Simulation:
    """State of all runs: ``(runs, outliers)`` deviations and velocities, ``(runs, 1 or 3, bulk)`` second moments."""

    def __init__(self, model: QuadraticModel, *, eta: float, runs: int, seed: int) -> None:
        self.single, bulk = _separate(model.spectrum)
        self.eta, self.beta = eta, model.rule.momentum
        self.theta, self.c = model.path_nodes
        self.queries = max(1, round(1 / model.moments.b)) if model.moments.b > 0 else 1
        self.random = np.random.default_rng(seed)
        size = 1 if self.beta == 0 else 3  # without momentum E x² is the whole state
        self.matrices = transition(eta * bulk.nodes, momentum=self.beta, a=model.moments.a)[:size, :size]
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
