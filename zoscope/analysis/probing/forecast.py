"""What a probe expects, from one measurement at the start and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.analysis.optimizer_bounds import ci95
from zoscope.analysis.probing.length import LONGEST_CURVE, descent_steps, left_above, steps_needed
from zoscope.analysis.probing.results import ProbedThreshold
from zoscope.analysis.rows import Measured, Question, optimizer_row
from zoscope.curvature.lanczos import Chain
from zoscope.curvature.slq import averaged_rule
from zoscope.errors import NumericalError
from zoscope.theory.curve import GradientMeasure, predicted_loss
from zoscope.theory.growth import growth_rate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.analysis.optimizer_bounds import OptimizerBounds
    from zoscope.analysis.probing.path import GradientFlow
    from zoscope.analysis.probing.request import ProbeRequest
    from zoscope.curvature.operators import LinearOperator
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.spectrum import Estimate, Spectrum

GRADIENT_STEPS = 40
"""Lanczos steps from the gradient: the mean path of a short run needs no more."""

FEW_MODES = 3.0
"""Effective rank below which typical runs and the mean square part ways."""


@dataclass(frozen=True)
class Forecast:
    """The model's word on every step size.

    Args:
        rule: Update rule.
        moments: Constants of what it is fed with; a = 1, b = 0 for the gradient itself.
        spectrum: Of the operator that the rule acts through.
        gradient: Spectral measure of the gradient there; ``None`` for a zero gradient.
        loss: Loss at the start.
        row: All thresholds, with the horizon at the steps of the runs.
        steps: Steps of a run.
        wanted_steps: Steps that the growth asked for would take.
        threshold: The threshold under test.
        true_value: The model's own value of it, where another was assumed.
        effective_rank: ``p₁²/p₂`` of the positive part.
        left: Loss at which a replica has left the valley.
        typical_survives: Whether typical runs of the quadratic model stay in the valley above the threshold.
    """

    rule: UpdateRule
    moments: EstimatorMoments
    spectrum: Spectrum
    gradient: GradientMeasure | None
    loss: float
    row: OptimizerBounds
    steps: int
    wanted_steps: int
    threshold: ProbedThreshold
    true_value: float
    effective_rank: float
    left: float
    typical_survives: bool = False

    @property
    def few_modes(self) -> bool:
        """Whether surviving above the threshold says nothing against it."""
        return self.moments.b > 0 and (self.effective_rank < FEW_MODES or self.typical_survives)

    @property
    def limit(self) -> float:
        """The model's own infinite-time threshold of the rule, whichever is under test."""
        exact = self.threshold.exact
        return self.true_value if self.moments.b == 0 or exact is None else exact

    @property
    def scale(self) -> float:
        """The size of a loss here: that at the start."""
        return abs(self.loss) if self.loss != 0 else 1.0

    def rate(self, lr: float) -> float:
        """Growth rate ρ of the mean square on the positive part, if the threshold under test is right."""
        return growth_rate(self.spectrum.positive, self._meant(lr), rule=self.rule, moments=self.moments)

    def growth(self, lr: float, steps: int) -> float:
        """``ρ^steps``; ``inf`` where it overflows."""
        exponent = steps * math.log(max(self.rate(lr), 1e-300))
        return math.exp(exponent) if exponent < 700 else math.inf

    def curve(self, lr: float, steps: int, *, flow: GradientFlow | None = None) -> NDArray[np.float64] | None:
        """The predicted mean loss, ``(steps + 1,)``; around the measured mean path where that is known."""
        if self.gradient is None or steps > LONGEST_CURVE or self.row.minibatch is not None:
            return None  # the noise of mini-batches is not in it
        return predicted_loss(
            self.spectrum,
            self.gradient,
            loss=self.loss,
            lr=lr,
            steps=steps,
            rule=self.rule,
            moments=self.moments,
            path=None if flow is None else flow.mean_path(lr=lr, steps=steps, rule=self.rule),
        )

    def _meant(self, lr: float) -> float:
        return lr * self.true_value / self.threshold.value


def forecast(
    measured: Measured,
    gradient: GradientMeasure | None,
    request: ProbeRequest,
    *,
    loss: float,
    dimension: int,
    descent: Estimate | None,
) -> Forecast:
    """Thresholds, and how long a run has to be.

    Raises:
        NumericalError: If nothing limits the step size, so that there is nothing to probe.
    """
    rule, moments = request.rule, request.moments(dimension=dimension)
    spectrum = measured.curvature.spectrum.fine
    zeroth = request.measure.moments(dimension=dimension)

    def row_for(steps: int) -> OptimizerBounds:
        question = Question(steps, request.measure.threshold, None, loss, zeroth)
        settings = request.measure.settings(request.family)
        return optimizer_row(measured, question, rule=rule, settings=settings, descent=descent)

    row = row_for(request.steps or 1000)
    infinite = (row.fo if request.first_order else row.exact.value if row.exact else None) or math.inf
    if not math.isfinite(infinite):
        raise NumericalError(
            "There is nothing to probe: no positive curvature was found here, so that every step size is stable on the "
            "quadratic model. Expected a point with positive curvature; train a little first."
        )
    ratio = _ratio_above(request, infinite)

    left = left_above(spectrum, gradient, 0.9 * infinite, rule=rule, moments=moments, loss=loss)

    def needed(lr: float) -> tuple[int, bool]:
        return steps_needed(
            spectrum, gradient, lr, request, growth=request.growth, left=left, rule=rule, moments=moments, loss=loss
        )

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
        horizon, horizon_ci95 = (point.lower.value, point.upper.value), (ci95(point.lower)[0], ci95(point.upper)[1])
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
    return Forecast(
        rule,
        moments,
        spectrum,
        gradient,
        loss,
        row,
        steps,
        wanted,
        threshold,
        value,
        measured.curvature.effective_rank,
        left,
        survives,
    )


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
