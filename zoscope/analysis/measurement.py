"""What is measured of a problem, and the thresholds that follow for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoscope.analysis.advice import Advisor, judge
from zoscope.analysis.notices import LARGE_COMMUTATOR, nonsmooth_notices
from zoscope.analysis.thresholds import Floor, Horizon, OptimizerBounds, Pair, Verdict, ci95, outer_ci95
from zoscope.curvature.lanczos import rounding
from zoscope.curvature.nonsmooth import NOTHING, PROBES, Jump, Nonsmooth, jump_of, nonsmooth_curvature
from zoscope.curvature.operators import HessianOperator, LinearOperator, Preconditioned, gradient
from zoscope.curvature.preconditioner import (
    Preconditioner,
    divided,
    expected_preconditioner,
    nearly_scalar,
    probe_preconditioner,
)
from zoscope.curvature.slq import OnProgress, measure
from zoscope.errors import NumericalError, UsageError
from zoscope.runtime import spawn_generators
from zoscope.theory.quadratic import GradientMeasure, QuadraticModel, descent_threshold, gradient_floor
from zoscope.theory.rules import floor_factor
from zoscope.theory.spectrum import Estimate, widening
from zoscope.theory.stability import (
    ModeCoupling,
    MomentBounds,
    OfMoments,
    StabilityCondition,
    fo_threshold,
    horizon_curve,
    interval_ci95,
)

if TYPE_CHECKING:
    from zoscope.analysis.advice import Advice
    from zoscope.analysis.minibatch import Batches, BatchSpread, MiniBatchBounds
    from zoscope.analysis.request import MeasureRequest, Request
    from zoscope.curvature.slq import Curvature
    from zoscope.options import Threshold
    from zoscope.problem import Objective
    from zoscope.theory.rules import EstimatorMoments, UpdateRule


@dataclass(frozen=True)
class Slope:
    """What the descent threshold depends on, P being the identity for gradient descent.

    Args:
        gPg: ``gᵀP⁻¹g``.
        gPHPg: ``gᵀP⁻¹HP⁻¹g``.
        trace: ``Tr P⁻¹HP⁻¹``.
        grad_sq: ``‖g‖²``.
        trace_error: 95 % half-width of ``trace``; the other numbers are as exact as the gradient.
    """

    gPg: float  # noqa: N815 - as in the formula
    gPHPg: float  # noqa: N815
    trace: float
    grad_sq: float
    trace_error: float = 0.0

    def estimate(self, rule: UpdateRule, moments: EstimatorMoments) -> Estimate:
        """The descent threshold with its error bar; it falls as the trace rises."""
        value, low, high = (
            replace(self, trace=self.trace + sign * self.trace_error).threshold(rule, moments) for sign in (0, 1, -1)
        )
        if math.isinf(low) or not self.trace_error:
            return Estimate(value)
        # The inverse is what has a symmetric error; where it may be 0, nothing limits the step size from above.
        return Estimate(value, quadrature=value - low if math.isfinite(high) else math.inf, ends=(low, high))

    def threshold(
        self, rule: UpdateRule, moments: EstimatorMoments, *, noise_curvature: float = 0.0, noise_sq: float = 0.0
    ) -> float:
        """The descent threshold, with the noise of mini-batches if there is any; that of the floor is the same."""
        if not rule.is_linear:
            return self.floor_lr(rule, moments, noise_sq=noise_sq)
        return descent_threshold(
            self.trace,
            self.gPHPg / self.grad_sq,
            alignment=self.gPg / self.grad_sq,
            noise_curvature=noise_curvature / self.grad_sq,
            noise=noise_sq / self.grad_sq,
            moments=moments,
            rule=rule,
        )

    def pull(self, rule: UpdateRule, moments: EstimatorMoments) -> float:
        """Gradient norm at which an adaptive run stalls, over its step size: ``κ Tr(H)/2``; Adam's P follows g."""
        assert rule.adapts is not None
        if rule.preconditioned:
            return 0.5 * moments.b * self.trace * self.grad_sq * math.sqrt(self.grad_sq) / self.gPg
        return 0.5 * floor_factor(rule.adapts, moments) * self.trace

    def floor_lr(self, rule: UpdateRule, moments: EstimatorMoments, *, noise_sq: float = 0.0) -> float:
        """Step size whose floor is the present gradient; below it a run goes down from here."""
        pull = self.pull(rule, moments)
        return self.grad_sq / (pull * math.sqrt(self.grad_sq + noise_sq)) if pull > 0 else math.inf

    def floor(
        self, rule: UpdateRule, moments: EstimatorMoments, *, lr: float | None, noise_sq: float = 0.0
    ) -> Floor | None:
        """Where adaptive runs stall; ``None`` for a rule that does not adapt."""
        if rule.adapts is None:
            return None
        value = self.floor_lr(rule, moments, noise_sq=noise_sq)
        error = self.trace_error / abs(self.trace) if math.isfinite(value) else 0.0
        at_lr = None if lr is None else gradient_floor(lr * self.pull(rule, moments), noise_sq=noise_sq)
        return Floor(Estimate(value, quadrature=value * error if error else 0.0), math.sqrt(self.grad_sq), lr, at_lr)


HORIZONS = (30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""Numbers of steps of the printed curve η*(T)."""

LONGEST_LOOK = 5_000
"""Steps up to which the loss at a step size asked about is followed."""


@dataclass(frozen=True)
class MeasuredOperator:
    """One operator, measured, and the gradient seen through it.

    Args:
        operator: Its key in the result.
        curvature: What the measurement found.
        gradient: Spectral measure of the gradient in the operator's coordinates; ``None`` for a zero gradient.
        commutator: Of a preconditioner with the Hessian.
        batches: How mini-batches spread around it, where a batch size was asked for.
        slope: What the descent threshold and the floor depend on; ``None`` for a zero gradient.
        coupling: Of a preconditioner that does not commute with H, where all of it is known.
    """

    operator: str
    curvature: Curvature
    gradient: GradientMeasure | None
    commutator: Estimate | None = None
    batches: BatchSpread | None = None
    slope: Slope | None = None
    coupling: ModeCoupling | None = None


@dataclass(frozen=True)
class ThresholdQuery:
    """What the user wants to know of every optimizer.

    Args:
        steps: Planned number of steps N.
        threshold: Which threshold counts.
        lr: Step size to judge.
        loss: Loss where the curvature was measured.
        moments: Constants of the estimator.
        doubts: Codes of what speaks against the point, whatever the optimizer: ``kinks``, ``little-curvature``.
    """

    steps: int
    threshold: Threshold
    lr: float | None
    loss: float
    moments: EstimatorMoments
    doubts: tuple[str, ...] = ()

    def model(self, measured: MeasuredOperator, rule: UpdateRule) -> QuadraticModel:
        """The quadratic model of what was measured."""
        return QuadraticModel(measured.curvature.spectrum.fine, rule, self.moments, measured.gradient, self.loss)


def optimizer_row(
    measured: MeasuredOperator,
    question: ThresholdQuery,
    *,
    rule: UpdateRule,
    settings: Mapping[str, Any],
    descent: Estimate | None,
) -> OptimizerBounds:
    """All bounds of one update rule.

    Args:
        measured: The operator that the rule acts through.
        question: What is asked.
        rule: Update rule.
        settings: What identifies the rule in the result.
        descent: Its descent threshold; ``None`` for a zero gradient.
    """
    curvature, moments = measured.curvature, question.moments
    largest, positive = curvature.lambda_max.value, curvature.spectrum.fine.positive
    bounds = MomentBounds(rule, moments)
    paper = bounds.paper(curvature.trace.value, largest)
    tight = bounds.tight(positive.trace, positive.frobenius_sq, max(largest, 0.0))
    falling = None if descent is None else descent.value
    exact, commuting = StabilityCondition(rule, moments).estimate(curvature.spectrum), None
    if measured.coupling is not None:
        commuting, exact = exact.value, Estimate(measured.coupling.threshold(rule=rule, moments=moments))
    horizon = _horizon(curvature, question, rule=rule)
    minibatch = None
    if measured.batches is not None:
        minibatch = measured.batches.bounds(curvature.spectrum, steps=question.steps, rule=rule, moments=moments)
    advisor = Advisor(
        rule=rule,
        moments=moments,
        spectrum=curvature.spectrum,
        gradient=measured.gradient,
        loss=question.loss,
        # Training meets the thresholds of mini-batches where it uses them.
        descent=descent if minibatch is None else minibatch.descent,
        exact=exact if minibatch is None else minibatch.exact,
        batches=None if minibatch is None else minibatch.model,
        doubts=question.doubts,
        points=horizon.curve if minibatch is None else (minibatch.horizon,),
    )
    advice = advisor.at(question.steps, question.threshold)
    return OptimizerBounds(
        name=rule.name,
        rule=rule,
        operator=measured.operator,
        settings=settings,
        fo=fo_threshold(largest, rule=rule) if rule.is_linear else None,
        zo_lower=paper.lower if rule.is_linear else None,
        zo_upper=paper.upper if rule.is_linear else None,
        lower_tight=tight.lower if rule.is_linear else None,
        upper_tight=tight.upper if rule.is_linear else None,
        exact=exact,
        horizon=horizon,
        descent=falling,
        binding=advice.binding,
        recommended=advice.recommended,
        recommended_reason=advice.reason,
        predicted_lr=None if advice.doubts else _predicted_lr(measured, question, rule=rule, upper=horizon.upper),
        commutator=measured.commutator,
        verdict=_verdict(measured, question, advisor, advice=advice, minibatch=minibatch),
        minibatch=minibatch,
        zo_ci95=_interval_ci95(curvature, lambda p1, _, top: bounds.paper(p1, top)) if rule.is_linear else None,
        tight_ci95=_interval_ci95(curvature, bounds.tight, positive=True) if rule.is_linear else None,
        descent_ci95=None if descent is None else ci95(descent),
        limit=advice.limit,
        doubts=advice.doubts,
        advisor=advisor,
        exact_if_commuting=commuting,
        floor=_floor(measured, question, rule=rule, settings=settings),
    )


def _floor(
    measured: MeasuredOperator, question: ThresholdQuery, *, rule: UpdateRule, settings: Mapping[str, Any]
) -> Floor | None:
    if measured.slope is None or settings.get("preconditioner", "expected") != "expected":
        return None  # a stored P has seen other gradients
    noise_sq = 0.0 if measured.batches is None else float(measured.batches.noise_sq.mean())
    return measured.slope.floor(rule, question.moments, lr=question.lr, noise_sq=noise_sq)


def _interval_ci95(curvature: Curvature, bounds: OfMoments, *, positive: bool = False) -> Pair:
    largest = curvature.lambda_max
    top = max(largest.value, 0.0) if positive else largest.value
    return interval_ci95(bounds, curvature.spectrum, largest=top, residual=largest.residual, positive=positive)


def _verdict(
    measured: MeasuredOperator,
    question: ThresholdQuery,
    advisor: Advisor,
    *,
    advice: Advice,
    minibatch: MiniBatchBounds | None,
) -> Verdict | None:
    if question.lr is None:
        return None
    model, lr = question.model(measured, advisor.rule), question.lr
    doubling, momentum = None, advisor.rule.momentum
    descent = None if advisor.descent is None else advisor.descent.value
    if minibatch is not None:
        ends, steps = (lambda version: minibatch.model.blow_up(lr, version=version)), minibatch.horizon.steps
        return judge(lr, steps=steps, momentum=momentum, blow_up=ends, advice=advice, descent=descent)
    if measured.gradient is not None and question.loss != 0 and advisor.rule.is_linear:
        doubling = model.doubling_times(lr, min(question.steps, LONGEST_LOOK))
        if question.steps > LONGEST_LOOK and math.isinf(doubling[1]):
            doubling = None  # it may still come
    return judge(
        lr,
        steps=question.steps,
        momentum=momentum,
        blow_up=lambda version: model.time_to_blow_up(lr, version),
        advice=advice,
        descent=descent,
        doubling=doubling,
    )


def _horizon(curvature: Curvature, question: ThresholdQuery, *, rule: UpdateRule) -> Horizon:
    steps = sorted({*HORIZONS, question.steps})
    curve = horizon_curve(curvature.spectrum, steps, rule=rule, moments=question.moments)
    planned = next(point for point in curve if point.steps == question.steps)
    return Horizon(
        steps=question.steps,
        lower=planned.lower.value,
        upper=planned.upper.value,
        ci95=outer_ci95(planned),
        curve=curve,
    )


def _predicted_lr(
    measured: MeasuredOperator, question: ThresholdQuery, *, rule: UpdateRule, upper: float
) -> float | None:
    """Step size with the lowest predicted loss after N steps, on the positive part.

    Negative curvature is left out: over a whole run the quadratic model would promise a loss without lower bound.
    ``None`` where the loss still falls at the largest step size that is stable: then there is no lowest point to name.
    """
    if measured.gradient is None or not math.isfinite(upper) or measured.batches is not None:
        return None  # the noise of mini-batches is not in the predicted loss
    best = question.model(measured, rule).positive.best_lr(question.steps, upper=upper)
    return None if best is None or best >= 0.99 * upper else best


MOST_COUPLED = 4096
"""Largest dimension in which pairs of modes are followed."""

SCALAR = 0.25
"""Distance of Adam's P from a multiple of the identity that is let pass, in units of the precision wanted."""


NO_SPECTRUM = (
    "--curvature {curvature} knows no spectrum, which this needs: expected hessian or ggn. 'zoscope bounds' and "
    "'zoscope check' take it."
)


@dataclass(frozen=True)
class Measurement:
    """Everything that the bounds need to know of a problem; plain numbers, valid after the session.

    Args:
        loss: Mean loss.
        grad_norm: ``‖g‖``.
        operators: By optimizer: what it acts through.
        descent: By optimizer: its descent threshold, ``None`` for a zero gradient.
        preconditioner: Of Adam, where it was asked for.
        num_hvps: Hessian-vector products spent in all.
        nonsmooth: What differences of the loss see beside the Hessian.
        jump: Of a loss that is piecewise constant.
    """

    loss: float
    grad_norm: float
    operators: dict[str, MeasuredOperator]
    descent: dict[str, Estimate | None]
    preconditioner: Preconditioner | None
    num_hvps: int
    nonsmooth: Nonsmooth
    jump: Jump | None = None


def measure_problem(objective: Objective, request: Request) -> Measurement:
    """Measure the operators that the optimizers asked for need, each once.

    Raises:
        NumericalError: If the gradient is not finite, or a measurement fails.
        UsageError: If the curvature asked for cannot be had here.
    """
    loss, g = finite_gradient(objective)
    base = curvature_operator(objective, request)
    moments = request.moments(dimension=objective.num_params)
    nonsmooth = _nonsmooth(objective, base, request, reach=float(torch.linalg.vector_norm(g.double())) / moments.b**0.5)
    plain = [rule for rule in request.rules.values() if not rule.preconditioned]
    adam = [rule for rule in request.rules.values() if rule.preconditioned]
    preconditioner = _preconditioner(objective, g, request=request, moments=moments) if adam else None
    batches = _batches(objective, base, g, request)
    measuring = _Measuring(base, g, _counted(nonsmooth), batches, request, moments)
    scalar = plain and preconditioner is not None and batches is None and _is_scalar(preconditioner, request)
    operators: dict[str, MeasuredOperator] = {}
    if plain:
        # Of a spectrum that serves Adam too the same precision is wanted for Adam.
        found = measuring.plain([*plain, *adam] if scalar else plain)
        operators |= dict.fromkeys((rule.name for rule in plain), found)
    if preconditioner is not None:
        if scalar and not found.curvature.spectrum.is_exact:
            found = _adam_of(found, preconditioner, request=request)
        else:
            found = measuring.adam(preconditioner, adam)
        operators |= dict.fromkeys((rule.name for rule in adam), found)
    slopes = {rule: operators[rule.name].slope for rule in (*plain, *adam)}
    descent = {rule.name: None if slope is None else slope.estimate(rule, moments) for rule, slope in slopes.items()}
    norm = float(torch.linalg.vector_norm(g.double()))
    swept = sum({id(m.batches): m.batches.num_sweeps for m in operators.values() if m.batches is not None}.values())
    curved = any(entry.curvature.frobenius_sq.value for entry in operators.values())
    return Measurement(
        loss,
        norm,
        operators,
        descent,
        preconditioner,
        base.num_hvps + swept,
        nonsmooth,
        None if curved or norm else find_jump(objective, seed=request.seed),
    )


def find_jump(objective: Objective, *, seed: int) -> Jump | None:
    """Of a loss that has neither gradient nor curvature."""
    (generator,) = spawn_generators(seed, 1, objective.device)
    return jump_of(objective, generator=generator)


def finite_gradient(objective: Objective) -> tuple[float, Tensor]:
    """Loss and gradient ``(d,)``.

    Raises:
        NumericalError: If the gradient is not finite.
    """
    loss, g = gradient(objective)
    if not bool(torch.isfinite(g).all()):
        raise NumericalError(
            f"The gradient is not finite (the loss is {loss:.4g}): expected finite derivatives at the point where the "
            "curvature is measured. Look for 0/0, log(0) or an overflow in the loss."
        )
    return loss, g


def _nonsmooth(objective: Objective, base: LinearOperator, request: MeasureRequest, *, reach: float = 0.0) -> Nonsmooth:
    if not isinstance(base, HessianOperator):
        return NOTHING
    (generator,) = spawn_generators(request.seed, 1, base.device)
    return nonsmooth_curvature(objective, base.known(), generator=generator, reach=reach)


def notify_unseen(
    objective: Objective, operator: LinearOperator, request: MeasureRequest, *, trace: float, positive: float
) -> None:
    """Hold second derivatives against differences of the loss, and say where those bend otherwise.

    Args:
        objective: The prepared problem, which keeps the notice.
        operator: Its Hessian, once it has been measured; another matrix says nothing.
        request: With the seed.
        trace: Trace of the Hessian; not finite where it is not known.
        positive: Of its positive part.
    """
    found = _nonsmooth(objective, operator, request)
    if not math.isfinite(trace):  # only ratios are known
        found, trace, positive = replace(found, trace=Estimate(0.0)), 0.0, 0.0
    for notice in nonsmooth_notices(found, trace=trace, positive=positive):
        objective.notify(notice.code, notice.message)


def _counted(nonsmooth: Nonsmooth) -> Estimate:
    """What kinks add to the trace of the descent threshold, from a few directions; nothing, to rounding, if smooth."""
    return replace(nonsmooth.trace, stderr=nonsmooth.trace.stderr * widening(PROBES - 1))


def curvature_operator(objective: Objective, request: MeasureRequest) -> LinearOperator:
    """The curvature matrix asked for; the one place that knows which there are.

    Raises:
        UsageError: For a matrix that is not available.
    """
    if request.curvature == "hessian":
        return HessianOperator(objective, hvp=request.hvp)
    if request.curvature == "ggn":
        from zoscope.curvature.ggn import GGNOperator  # late, as what only some options need takes time to load

        return GGNOperator(objective)
    raise UsageError(NO_SPECTRUM.format(curvature=request.curvature))


def operator_name(request: Request, *, preconditioned: bool) -> str:
    """Key of an operator in the result."""
    return f"preconditioned_{request.curvature}" if preconditioned else request.curvature


@dataclass(frozen=True)
class _Measuring:
    """Measures what the optimizers of a request act through.

    Args:
        base: H.
        g: ``(d,)`` the gradient.
        kinks: What they add to the trace of the descent threshold.
        batches: What measures mini-batches.
        request: What is asked.
        moments: Constants of the estimator.
    """

    base: LinearOperator
    g: Tensor
    kinks: Estimate
    batches: Batches | None
    request: Request
    moments: EstimatorMoments

    def plain(self, rules: list[UpdateRule]) -> MeasuredOperator:
        """H itself."""
        name, kinks = operator_name(self.request, preconditioned=False), self.kinks
        curvature = self._measured(self.base, self.g, rules, name=name)
        measure, slope = gradient_measure(curvature), None
        if measure is not None:
            square, curved = float(measure.weights.sum()), float(measure.weights @ measure.nodes)
            trace = curvature.trace
            noise = rounding(self.g.dtype, abs(trace.value) + 2 * abs(curved) / square)
            error = trace.half_width + kinks.half_width + noise
            slope = Slope(square, curved, trace.value + kinks.value, square, error)
        spread = None if self.batches is None else self.batches.spread_of(slope, self.moments, diagonal=None)
        return MeasuredOperator(name, curvature, measure, batches=spread, slope=slope)

    def adam(self, preconditioner: Preconditioner, rules: list[UpdateRule]) -> MeasuredOperator:
        """``P^-½ H P^-½``."""
        base, g, p, kinks = self.base, self.g, preconditioner.diagonal, self.kinks
        scaled, name = Preconditioned(base, p), operator_name(self.request, preconditioned=True)
        # In the coordinates y = P^½ x of the operator the gradient is P^-½ g.
        scaled_g = (g.double() / p.double().sqrt()).to(g.dtype)
        curvature = self._measured(scaled, scaled_g, rules, name=name)
        (generator,) = spawn_generators(self.request.seed, 1, base.device)
        probes = probe_preconditioner(base.known(), p, generator=generator)
        alike = float(p.double().reciprocal().square().mean())  # kinks bend the loss in all directions alike
        measure, slope = gradient_measure(curvature), None
        if measure is not None:
            slope = Slope(
                gPg=float(measure.weights.sum()),
                gPHPg=float(measure.weights @ measure.nodes),
                trace=probes.shift * curvature.trace.value + probes.trace_correction.value + alike * kinks.value,
                grad_sq=float(g.double().square().sum()),
                trace_error=abs(probes.shift) * curvature.trace.half_width
                + probes.trace_correction.half_width
                + alike * kinks.half_width,
            )
        spread = None if self.batches is None else self.batches.spread_of(slope, self.moments, diagonal=p)
        coupling = None
        if curvature.method == "dense" and probes.commutator.value > LARGE_COMMUTATOR and base.dim <= MOST_COUPLED:
            coupling = mode_coupling(scaled, p)
        return MeasuredOperator(name, curvature, measure, probes.commutator, spread, slope, coupling)

    def _measured(self, operator: LinearOperator, g: Tensor, rules: list[UpdateRule], *, name: str) -> Curvature:
        request = self.request
        return measure(
            operator,
            method=request.method,
            precision=request.precision(rules, moments=self.moments),
            vector=g,
            on_pairs=None if self.batches is None else self.batches.keep,
            **request.budget | {"on_progress": _told(request.on_progress, name.replace("_", " "))},
        )


def mode_coupling(operator: LinearOperator, p: Tensor) -> ModeCoupling:
    """Of a dense ``P^-½ H P^-½`` and the diagonal of P."""
    eigenvalues, vectors = torch.linalg.eigh(operator.dense().double())
    positive = eigenvalues > 0
    vectors, scale = vectors[:, positive], p.double()[:, None]
    coupling = (vectors.T @ (vectors / scale)) * (vectors.T @ (vectors * scale))
    return ModeCoupling(eigenvalues[positive].cpu().numpy(), coupling.cpu().numpy())


def _is_scalar(preconditioner: Preconditioner, request: Request) -> bool:
    """Whether P is so nearly a multiple of the identity that the difference is small beside the precision wanted.

    That is the rule for the expected P of a large model, whose gradient has no entry near its norm.
    """
    return nearly_scalar(preconditioner.diagonal)[1] <= SCALAR * request.rtol


def _adam_of(plain: MeasuredOperator, preconditioner: Preconditioner, *, request: Request) -> MeasuredOperator:
    """Adam from the spectrum of H itself."""
    p, spread = nearly_scalar(preconditioner.diagonal)
    curvature = divided(plain.curvature, by=p, spread=spread)
    note = (
        f"Adam's P is {p:.3g} on every parameter to within {100 * spread:.1g} %: its spectrum is that of H divided by "
        "it, which cost no products of its own."
    )
    curvature, slope = replace(curvature, notes=(note,)), plain.slope
    if slope is not None:
        slope = replace(
            slope,
            gPg=slope.gPg / p,
            gPHPg=slope.gPHPg / p**2,
            trace=slope.trace / p**2,
            trace_error=slope.trace_error / p**2,
        )
    name = operator_name(request, preconditioned=True)
    return MeasuredOperator(name, curvature, gradient_measure(curvature), slope=slope)


def gradient_measure(curvature: Curvature) -> GradientMeasure | None:
    """Spectral measure of the gradient; ``None`` for a zero gradient."""
    measure = curvature.vector_measure
    if measure is None or not measure.nodes.size:
        return None
    return GradientMeasure(measure.nodes, measure.weights)


def _told(on_progress: OnProgress | None, operator: str) -> OnProgress | None:
    """Name the operator in front of the stage of its measurement."""
    if on_progress is None:
        return None
    return lambda stage, num_hvps, precision: on_progress(f"{operator}: {stage}", num_hvps, precision)


def _preconditioner(objective: Objective, g: Tensor, *, request: Request, moments: EstimatorMoments) -> Preconditioner:
    if request.state_file is not None:
        from zoscope.curvature.preconditioner import stored_preconditioner

        return stored_preconditioner(request.state_file, objective=objective, betas=request.betas, eps=request.eps)
    return expected_preconditioner(g, moments=moments, eps=request.eps)


def batch_size_of(objective: Objective, request: Request) -> int | None:
    """Examples per step; ``None`` where every step sees all of them, which the reader is told."""
    size = request.batch_size
    if size is None or size < objective.num_examples:
        return size
    if objective.num_examples > 1:
        objective.notify(
            "full-batch", f"A batch of {size} holds all {objective.num_examples} examples: no step is noisy."
        )
    return None


def _batches(objective: Objective, base: LinearOperator, g: Tensor, request: Request) -> Batches | None:
    """What measures mini-batches; ``None`` where every step sees all examples."""
    size = batch_size_of(objective, request)
    if size is None:
        return None
    from zoscope.analysis.minibatch import Batches

    return Batches(
        objective,
        base,
        g,
        batch_size=size,
        seed=request.seed,
        eps=request.eps if request.state_file is None else None,
    )
