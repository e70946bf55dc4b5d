"""What a probe expects of its runs, from one measurement at the start."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.analysis.measurement import MeasuredOperator, ThresholdQuery, curvature_operator, optimizer_row
from zoscope.analysis.probe_results import ProbedThreshold
from zoscope.analysis.thresholds import ci95, outer_ci95
from zoscope.curvature.lanczos import Chain
from zoscope.curvature.operators import gradient
from zoscope.curvature.slq import averaged_rule
from zoscope.errors import NumericalError
from zoscope.optim.perturbation import QuadraticSurface
from zoscope.theory.quadratic import FEW_MODES, GradientMeasure, MeanPath, QuadraticModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.analysis.probe_results import ProbeRequest
    from zoscope.analysis.thresholds import OptimizerBounds
    from zoscope.curvature.operators import LinearOperator
    from zoscope.problem import Objective
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Estimate, Spectrum

DENSE_LIMIT = 4096
"""Largest dimension in which the quadratic model is held as a matrix."""

MOST_MODES = 1 << 16
"""Most eigenvalues that are followed; those next to 0 are left out."""


def matrix_model(objective: Objective, request: ProbeRequest, origin: Tensor) -> QuadraticSurface:
    """The quadratic model at the current parameters, with all of H."""
    loss, g = gradient(objective)
    matrix = curvature_operator(objective, request.measure).dense().double()
    symmetric = 0.5 * (matrix + matrix.T)
    return QuadraticSurface(
        origin, loss=loss, gradient=g, matmat=lambda rows: (rows.double() @ symmetric).to(rows.dtype)
    )


def eigenbasis_model(forecast: Prediction, *, device: torch.device) -> tuple[QuadraticSurface, Tensor]:
    """The quadratic model with the measured spectrum, one coordinate an eigenvalue, and where its runs start.

    Isotropic directions are the same in every basis, so that this loses nothing but what the measurement of the
    spectrum does. Adam's is that of ``P^-1/2 H P^-1/2``, where P is 1.
    """
    eigenvalues = modes(forecast.model.spectrum)
    squares = np.zeros_like(eigenvalues)
    if forecast.model.gradient is not None:
        nearest = np.abs(eigenvalues[None, :] - forecast.model.gradient.nodes[:, None]).argmin(axis=1)
        np.add.at(squares, nearest, forecast.model.gradient.weights)
    scale = torch.from_numpy(eigenvalues).to(device)
    start = torch.zeros_like(scale)
    slope = torch.from_numpy(np.sqrt(squares)).to(device)
    return QuadraticSurface(start, loss=forecast.model.loss, gradient=slope, matmat=lambda rows: rows * scale), start


def modes(spectrum: Spectrum) -> NDArray[np.float64]:
    """A spectrum as a list of eigenvalues, largest in magnitude first."""
    parts = []
    for sign in (1.0, -1.0):
        inside = sign * spectrum.nodes > 0
        order = np.argsort(-np.abs(spectrum.nodes[inside]))
        nodes, weights = spectrum.nodes[inside][order], spectrum.weights[inside][order]
        # Extrapolated quadrature rules have negative weights here and there; their running sum is what counts.
        ends = np.maximum.accumulate(np.rint(np.cumsum(weights)).astype(int)).clip(0, MOST_MODES)
        parts.append(np.repeat(nodes, np.diff(ends, prepend=0)))
    found = np.concatenate(parts)
    return found[np.argsort(-np.abs(found))][:MOST_MODES]


MOST_GRADIENTS = 10_000
"""A longer path is cut off there. Stable zeroth-order runs have steps below 1/λ_max: it takes fewer than they do."""


@dataclass(frozen=True)
class GradientFlow:
    """``dθ/ds = -P⁻¹ g(θ)`` from the start, in the time ``s`` that a step of size η takes η of.

    Args:
        times: ``(n,)`` from 0, param²/loss.
        losses: ``(n,)``.
        squares: ``(n,)``, ``gᵀ P⁻¹ g``.
    """

    times: NDArray[np.float64]
    losses: NDArray[np.float64]
    squares: NDArray[np.float64]

    def mean_path(self, *, lr: float, steps: int, rule: UpdateRule) -> MeanPath | None:
        """As the steps of an optimizer see it; ``None`` where it is not known that far."""
        times = flow_times(lr=lr, steps=steps, rule=rule)
        if times[-1] > self.times[-1] * (1 + 1e-9):
            return None
        return MeanPath(np.interp(times, self.times, self.losses), np.interp(times, self.times, self.squares))


def flow_times(*, lr: float, steps: int, rule: UpdateRule) -> NDArray[np.float64]:
    """Time after 0, 1, …, ``steps`` steps along a constant gradient: momentum takes its time to build up."""
    beta = rule.momentum
    velocity = (1.0 - beta ** np.arange(1, steps + 1)) / (1.0 - beta)
    return np.concatenate([[0.0], rule.lr_scale * lr * np.cumsum(velocity)])


@torch.no_grad()
def follow_gradient(
    objective: Objective, *, until: float, sharpness: float, diagonal: Tensor | None = None
) -> GradientFlow:
    """Follow the gradient from the current parameters, which come back, in steps that the sharpest mode stands.

    Args:
        objective: The prepared problem.
        until: Time to follow it for.
        sharpness: Largest eigenvalue of ``P^-1/2 H P^-1/2``.
        diagonal: P; ``None`` for the identity.
    """
    origin = objective.read()
    count = min(max(math.ceil(until * sharpness), 20), MOST_GRADIENTS)
    step = min(until / count, 1.0 / sharpness)
    theta, losses, squares = origin.clone(), [], []
    try:
        for _ in range(count + 1):
            objective.write(theta)
            loss, g = gradient(objective)
            velocity = g if diagonal is None else g / diagonal
            losses.append(loss)
            squares.append(float(g.double() @ velocity.double()))
            if not math.isfinite(losses[-1] + squares[-1]):
                break
            theta.sub_(velocity, alpha=step)
    finally:
        objective.write(origin)
    known = len(losses) if math.isfinite(losses[-1] + squares[-1]) else len(losses) - 1
    return GradientFlow(step * np.arange(known, dtype=np.float64), np.array(losses[:known]), np.array(squares[:known]))


LEFT = 4.0
"""A replica has left the valley when its loss is this many times that at the start."""

LEFT_FIRST_ORDER = 2.0
"""The same without noise, where a loss below the threshold does not rise at all."""

TYPICAL_SHARE = 0.85
"""Share of the model's replicas that should have left by the end of a run above."""

SURVIVAL = 0.75
"""Share of them that has to leave for a surviving run to mean anything."""

CREST = 200
"""Steps in which an overshoot shows."""

LONGEST_CURVE = 20_000
"""Steps up to which a loss curve is predicted."""


def steps_needed(
    model: QuadraticModel, lr: float, request: ProbeRequest, *, growth: float, left: float
) -> tuple[int, bool]:
    """Steps for the growth asked for, and for it to show in a typical run; and whether typical runs survive.

    Growth starts from the noise of the gradient, not from the loss, and a typical run grows more slowly than the mean.
    """
    positive = model.positive
    grown = positive.steps_to_grow(lr, growth)
    if not math.isfinite(grown):
        return request.max_steps, False
    steps = math.ceil(grown)
    longest = min(20 * steps, request.max_steps, LONGEST_CURVE)
    if model.gradient is None or longest <= steps:
        return steps, False
    if model.moments.b == 0:
        exits = np.append(np.flatnonzero(positive.loss_curve(lr, longest) > left), math.inf)[:1]
    else:
        exits = positive.exit_times(lr, longest, rise=left - model.loss, seed=request.measure.seed)
    shows = float(np.quantile(exits, TYPICAL_SHARE, method="higher"))
    survives = bool(np.isfinite(exits).mean() < SURVIVAL)
    return max(steps, math.ceil(1.25 * min(shows, longest))), survives


def left_above(model: QuadraticModel, lr: float) -> float:
    """Loss above which a replica has left the valley.

    A multiple of the loss at the start, or twice the crest of the predicted curve at a stable ``lr`` if that is higher:
    far from a minimum momentum overshoots before it settles.
    """
    loss = model.loss
    limit = loss + ((LEFT_FIRST_ORDER if model.moments.b == 0 else LEFT) - 1.0) * (abs(loss) or 1.0)
    if model.gradient is None:
        return limit
    curve = model.positive.loss_curve(lr, CREST)
    crest = float(curve[np.isfinite(curve)].max())
    return max(limit, loss + 2.0 * (crest - loss))


def descent_steps(request: ProbeRequest) -> int:
    """Steps after which the mean change of the loss stands out of its noise by about four standard errors.

    In one step it is ``-η‖g‖²(1 - ratio)`` with a spread of about ``√2 η‖g‖²``, doubled here for the second-order part.
    """
    gap = min((abs(1.0 - ratio) for ratio in request.ratios if ratio != 1.0), default=0.2)
    return math.ceil((4.0 * 2.0 * math.sqrt(2.0) / gap) ** 2 / request.replicas)


GRADIENT_STEPS = 40
"""Lanczos steps from the gradient: the mean path of a short run needs no more."""


@dataclass(frozen=True)
class Prediction:
    """The model's word on every step size.

    Args:
        model: The quadratic model at the start; a = 1, b = 0 where the rule is fed with the gradient itself.
        row: All thresholds, with the horizon at the steps of the runs.
        steps: Steps of a run.
        wanted_steps: Steps that the growth asked for would take.
        threshold: The threshold under test.
        true_value: The model's own value of it, where another was assumed.
        left: Loss at which a replica has left the valley.
        few_modes: Whether surviving above the threshold says nothing against it: few modes carry the positive part, or
            typical runs of the quadratic model stay in the valley.
    """

    model: QuadraticModel
    row: OptimizerBounds
    steps: int
    wanted_steps: int
    threshold: ProbedThreshold
    true_value: float
    left: float
    few_modes: bool

    @property
    def limit(self) -> float:
        """The model's own infinite-time threshold of the rule, whichever is under test."""
        exact = self.threshold.exact
        return self.true_value if self.model.moments.b == 0 or exact is None else exact

    @property
    def grows(self) -> bool:
        """Whether the model knows how fast noise grows: not with mini-batches, nor with steps of a fixed size."""
        return self.row.minibatch is None and self.model.rule.is_linear

    @property
    def scale(self) -> float:
        """The size of a loss here: that at the start."""
        return abs(self.model.loss) or 1.0

    def rate(self, lr: float) -> float:
        """Growth rate ρ of the mean square on the positive part, if the threshold under test is right."""
        return self.model.positive.growth_rate(self._meant(lr))

    def growth(self, lr: float, steps: int) -> float:
        """``ρ^steps``; ``inf`` where it overflows."""
        exponent = steps * math.log(max(self.rate(lr), 1e-300))
        return math.exp(exponent) if exponent < 700 else math.inf

    def curve(self, lr: float, steps: int, *, flow: GradientFlow | None = None) -> NDArray[np.float64] | None:
        """The predicted mean loss, ``(steps + 1,)``; around the measured mean path where that is known."""
        if self.model.gradient is None or steps > LONGEST_CURVE or not self.grows:
            return None  # the noise of mini-batches is not in it
        path = None if flow is None else flow.mean_path(lr=lr, steps=steps, rule=self.model.rule)
        return self.model.loss_curve(lr, steps, path=path)

    def _meant(self, lr: float) -> float:
        return lr * self.true_value / self.threshold.value


def forecast(
    measured: MeasuredOperator,
    gradient: GradientMeasure | None,
    request: ProbeRequest,
    *,
    loss: float,
    dimension: int,
    descent: Estimate | None,
) -> Prediction:
    """Thresholds, and how long a run has to be.

    Raises:
        NumericalError: If nothing limits the step size, so that there is nothing to probe.
    """
    rule, moments = request.rule, request.moments(dimension=dimension)
    model = QuadraticModel(measured.curvature.spectrum.fine, rule, moments, gradient, loss)
    zeroth = request.measure.moments(dimension=dimension)

    def row_for(steps: int) -> OptimizerBounds:
        question = ThresholdQuery(steps, request.measure.threshold, None, loss, zeroth)
        settings = request.measure.settings(request.family)
        return optimizer_row(measured, question, rule=rule, settings=settings, descent=descent)

    row = row_for(request.steps or 1000)
    if not rule.is_linear:
        return _floor_forecast(model, row, request, rank=measured.curvature.effective_rank)
    infinite = (row.fo if request.first_order else row.exact.value if row.exact else None) or math.inf
    if not math.isfinite(infinite):
        raise NumericalError(
            "There is nothing to probe: no positive curvature was found here, so that every step size is stable on the "
            "quadratic model. Expected a point with positive curvature; train a little first."
        )
    ratio = _ratio_above(request, infinite)

    left = left_above(model, 0.9 * infinite)

    def needed(lr: float) -> tuple[int, bool]:
        return steps_needed(model, lr, request, growth=request.growth, left=left)

    wanted, survives = needed(ratio * infinite)
    name, value = _probed(row, request, infinite)
    if row.minibatch is not None:  # growth by the spectrum of all examples says nothing of these runs
        wanted, survives = row.minibatch.horizon.steps, False
        steps = min(wanted, request.max_steps)
    elif request.steps is None:
        row = row_for(min(wanted, request.max_steps))
        name, value = _probed(row, request, infinite)
        if name == "descent":
            wanted = descent_steps(request)
        elif name == "horizon":
            wanted, survives = needed(ratio * value)
        steps = min(wanted, request.max_steps)
    else:
        steps = min(request.steps, request.max_steps)
    exact, descent_value = row.exact, row.descent
    horizon, horizon_ci95 = None, None
    if not request.first_order and row.horizon is not None:
        horizon, horizon_ci95 = (row.horizon.lower, row.horizon.upper), row.horizon.ci95
    if row.minibatch is not None:
        point, exact = row.minibatch.horizon, row.minibatch.exact
        horizon, horizon_ci95 = (point.lower.value, point.upper.value), outer_ci95(point)
        descent_value = None if row.minibatch.descent is None else row.minibatch.descent.value
    threshold = ProbedThreshold(
        name="assumed" if request.assume_threshold else name,
        value=request.assume_threshold or value,
        exact=exact.value if exact else None,
        exact_ci95=None if exact is None else ci95(exact),
        horizon=horizon,
        horizon_ci95=horizon_ci95,
        descent=descent_value,
    )
    few = moments.b > 0 and (measured.curvature.effective_rank < FEW_MODES or survives)
    return Prediction(model, row, steps, wanted, threshold, value, left, few)


def _floor_forecast(model: QuadraticModel, row: OptimizerBounds, request: ProbeRequest, *, rank: float) -> Prediction:
    """For a rule whose steps do not shrink with the gradient: below its floor the loss rises, above it falls.

    Raises:
        NumericalError: If the floor is not what was asked for, or there is none.
    """
    if request.measure.threshold in ("exact", "horizon") or request.edge:
        raise NumericalError(
            f"There is nothing to probe: no step size makes {request.optimizer} blow up on the quadratic model, so "
            "it has neither an edge nor a threshold of the mean square. Its floor can be probed: --threshold descent."
        )
    descent = None if row.floor is None else row.floor.lr.value
    if descent is None or not math.isfinite(descent):
        raise NumericalError(
            "There is nothing to probe: the gradient is zero here, or Tr H is not positive, so that no floor is known."
        )
    wanted = request.steps or descent_steps(request)
    threshold = ProbedThreshold(
        name="assumed" if request.assume_threshold else "descent",
        value=request.assume_threshold or descent,
        exact=None,
        exact_ci95=None,
        horizon=None,
        horizon_ci95=None,
        descent=descent,
    )
    left = left_above(replace(model, gradient=None), descent)
    few = model.moments.b > 0 and rank < FEW_MODES
    return Prediction(model, row, min(wanted, request.max_steps), wanted, threshold, descent, left, few)


def _probed(row: OptimizerBounds, request: ProbeRequest, infinite: float) -> tuple[str, float]:
    if request.first_order:
        return "first-order", infinite
    if row.minibatch is not None and request.measure.threshold == "binding":
        return "horizon", row.minibatch.horizon.upper.value  # above its descent threshold a run only gets noisy
    if row.binding is None or not math.isfinite(row.binding.value):
        return "exact", infinite
    return row.binding.name, row.binding.value


def _ratio_above(request: ProbeRequest, threshold: float) -> float:
    """The smallest ratio above 1 among the step sizes: the slowest growth that has to be seen."""
    ratios = [*request.ratios, *(lr / threshold for lr in request.lrs)]
    return min((r for r in ratios if r > 1.0), default=1.25)


def gradient_measure(operator: LinearOperator, g: Tensor) -> GradientMeasure | None:
    """Spectral measure of a vector, from a Lanczos chain started at it; ``None`` for a zero vector."""
    squared = float(g.double().square().sum())
    if squared == 0:
        return None
    steps = min(GRADIENT_STEPS, operator.dim)
    chain = Chain(operator, g, capacity=steps + 1)
    chain.extend(steps)
    rule = averaged_rule(chain.jacobi)
    return GradientMeasure(rule.nodes, rule.weights * squared)


def preconditioned_gradient(g: Tensor, diagonal: Tensor | None) -> Tensor:
    """The gradient in the coordinates ``y = P^½ x`` of the operator."""
    return g if diagonal is None else (g.double() / torch.sqrt(diagonal.double())).to(g.dtype)
