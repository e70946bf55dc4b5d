"""``zoscope.bounds`` from forward passes alone: what they bound, with all examples and with mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from zoscope.analysis.advice import MARGIN, forward_limit, recommended_by_forward, stand
from zoscope.analysis.measurement import batch_size_of
from zoscope.analysis.minibatch import ForwardMiniBatch, require_whole
from zoscope.analysis.notices import jump_notice
from zoscope.analysis.request import propagated, relative_half_width
from zoscope.analysis.thresholds import Binding, BoundsResult, Estimator, ForwardBounds, OptimizerBounds, Verdict
from zoscope.curvature.forward import ROUGH, mean_of, measure_forward, ratio_of
from zoscope.errors import NumericalError, UsageError
from zoscope.problem import Notice
from zoscope.problem.objective import Examples
from zoscope.theory.minibatch import spread_of_batches
from zoscope.theory.quadratic import along_gradient, descent_threshold
from zoscope.theory.rules import floor_factor, update_rule
from zoscope.theory.spectrum import Estimate
from zoscope.theory.stability import MomentBounds

if TYPE_CHECKING:
    from zoscope.analysis.advice import Limit
    from zoscope.analysis.request import CurvatureSession, Request
    from zoscope.curvature.slq import ForwardCurvature
    from zoscope.problem import Objective
    from zoscope.theory.rules import EstimatorMoments, UpdateRule

DISAGREEMENT = ROUGH
"""Relative error of the trace from truncation and rounding from which the reader is told."""

BATCHES = 5.0
"""Precision wanted of what mini-batches add, in units of that of the rest: it takes thousands of directions to know
``‖g‖²`` alone to a few percent."""

KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Hardswish, nn.MaxPool1d, nn.MaxPool2d)
"""Layers whose slope jumps."""


def precision_notices(reached: float, of_batches: float, request: Request, found: ForwardCurvature) -> Iterable[Notice]:
    """On a precision asked for and not reached.

    Args:
        reached: Relative half-width of the descent threshold.
        of_batches: That of mini-batches, in units of what is wanted of it; 0 without.
        request: What is asked.
        found: What was measured.
    """
    if max(reached, of_batches) <= request.rtol:
        return
    worst, whose, wanted = reached, "the descent threshold", ""
    if of_batches > reached:
        worst, whose = BATCHES * of_batches, "the descent threshold of mini-batches"
        wanted = f", of which {BATCHES:g} times as much would do"
    value = f"± {100 * worst:.1f} %" if math.isfinite(worst) else "no finite error bar"
    yield Notice(
        "precision",
        f"The precision asked for (--rtol {request.rtol:g}) was not reached: {value} on {whose}{wanted}, after "
        f"{found.num_hvps} directions of {request.max_hvps} at most. The intervals shown are honest, only wider; raise "
        "--max-hvps or --rtol.",
    )


def forward_notices(
    found: ForwardCurvature, request: Request, objective: Objective, rows: Mapping[str, OptimizerBounds]
) -> Iterable[Notice]:
    """Everything else."""
    yield Notice(
        "forward-only",
        "Forward passes see Tr H and ‖H‖_F² but no spectrum: the lower bound assumes H ⪰ 0, the upper bound and the "
        "descent threshold assume nothing. First-order bounds, λ_max and η*(N) need --curvature hessian.",
    )
    if found.indefinite or (found.rayleigh is not None and found.rayleigh.interval[1] < 0):
        yield Notice(
            "indefinite-hessian",
            "Negative curvature was seen along a direction, so H is indefinite and the lower bounds do not hold.",
        )
    if found.trace.value <= 0:
        yield Notice(
            "trace-not-positive",
            "Tr H is not positive here, so two moments bound no mean-square threshold. Use --curvature hessian.",
        )
    yield from _of_batches(rows)
    yield from _differences(found, objective)
    if "adam" in rows:
        yield Notice(
            "adam-forward",
            "Adam's preconditioner is taken as √b‖g‖ + ε for every parameter, which its expected value is up to the "
            "share of a single parameter in the gradient.",
        )
    elif "adam" in request.optimizers:
        yield Notice(
            "adam-forward",
            "Adam is left out: its bounds with a stored preconditioner need --curvature hessian.",
        )
    for note in found.notes:
        yield Notice("measurement", note)


def _of_batches(rows: Mapping[str, OptimizerBounds]) -> Iterable[Notice]:
    row = next(iter(rows.values()))
    found = None if row.forward is None else row.forward.minibatch
    if found is None:
        return
    yield Notice(
        "forward-minibatch",
        f"Of mini-batches of {found.batch_size:,} of {found.examples:,} examples forward passes know how much "
        "gradients and Hessians spread, not along which eigenvectors. The descent threshold is that of mini-batches; "
        "the threshold of the mean square is only known to lie between a lower bound, which the recommendation goes by "
        "and which may be far too low, and an upper one. --curvature hessian knows it, and zoscope probe --batch-size "
        "tries.",
    )


def _differences(found: ForwardCurvature, objective: Objective) -> Iterable[Notice]:
    if found.jump is not None:
        yield jump_notice(found.jump)
    elif found.disagreement > DISAGREEMENT:
        percent = 100 * found.disagreement
        size = f"{percent:.0f} % of the trace" if math.isfinite(percent) else "more than the trace"
        yield Notice(
            "step-size-check",
            f"Differences with steps of h/2 and h (h = {found.step:.2g}) disagree along single directions by about "
            f"{size}. The error bars are as wide as that; where the loss bends on a scale far below h, the Hessian may "
            "lie outside. The loss is rounded too coarsely, has kinks, or is smooth over short distances only: a loss "
            "that ends in float32 (logits.float()) or a wider --dtype lets steps be shorter.",
        )
    kinked = {type(module).__name__ for module in objective.model.modules() if isinstance(module, KINKED)}
    if kinked:
        yield Notice(
            "kinks",
            f"The model has layers with kinks ({', '.join(sorted(kinked))}). Forward passes measure the mean curvature "
            f"over steps of h = {found.step:.2g} along random directions, with the kinks crossed on the way, as a "
            "zeroth-order run with a smoothing radius of that size does. It depends on h; --curvature hessian sees no "
            "kinks and may give less or more.",
        )


@dataclass(frozen=True)
class ForwardBatches:
    """Mini-batches of a size, as forward passes see them.

    Args:
        batch_size: B.
        examples: n, what they are drawn from.
        spread: Variance of a mini-batch in units of that of one example.
    """

    batch_size: int
    examples: int
    spread: float

    @classmethod
    def of(cls, objective: Objective, batch_size: int) -> ForwardBatches:
        """Of a prepared problem.

        Raises:
            UsageError: If its batches cannot be cut into examples and are not of that size.
        """
        examples, size = Examples(objective), batch_size
        if examples.whole:
            require_whole(objective, batch_size)
            size = 1
        return cls(batch_size, objective.num_examples, spread_of_batches(examples.count, size))

    def noise_sq(self, found: ForwardCurvature) -> Estimate:
        """``E‖g_B − g‖²``."""
        assert found.noise is not None
        mean = mean_of(found.noise.gradient_sq)
        return replace(mean, quadrature=found.noise.gradient_error).scaled(self.spread)

    def hessian_sq(self, found: ForwardCurvature) -> Estimate:
        """``E‖H_B − H‖_F²``."""
        assert found.noise is not None
        return found.noise.hessian_sq.scaled(self.spread)

    def descent(self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments) -> Estimate | None:
        """Step size below which the expected loss falls, ``E g_BᵀHg_B`` and ``E‖g_B‖²`` in the place of those of g.

        Both noises are taken in units of ``‖g‖²``, from the same directions: what is uncertain of it is so in both.
        """
        if found.rayleigh is None:
            return None
        trace, rayleigh, noise = found.trace, found.rayleigh, self._noise(found, moments)
        along = along_gradient(moments, rule)
        of_trace = moments.b * (1 + noise.relative)
        curvature = of_trace * trace.value + along * rayleigh.value + noise.curvature.value
        if curvature <= 0:
            return Estimate(math.inf)
        value = 2 * (1 - rule.momentum) / (rule.lr_scale * curvature)
        error = math.hypot(abs(along) * rayleigh.half_width, noise.curvature.half_width)
        # The two noises are of the same directions, and the trace of more of them.
        error += abs(moments.b * trace.value) * noise.relative_half_width
        return Estimate(value, value * math.hypot(of_trace * trace.half_width, error) / curvature / 1.96)

    def upper(self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments) -> Estimate:
        """Upper bound of the infinite-time threshold."""
        frobenius_sq, bounds = max(found.frobenius_sq.value, 0.0), MomentBounds(rule, moments)

        def bound(p1: float, spread_sq: float) -> float:
            return bounds.forward_only_batches(p1, frobenius_sq, max(spread_sq, 0.0))

        def of_norm(p1: float, p2: float) -> float:
            spread_sq = max(self.hessian_sq(found).value, 0.0)
            return bounds.forward_only_batches(p1, max(p2, 0.0), spread_sq)

        first = propagated(bound, found.trace, self.hessian_sq(found), independent=False)
        second = propagated(of_norm, found.trace, found.frobenius_sq, independent=False)
        return Estimate(first.value, math.hypot(first.half_width, second.half_width) / 1.96)

    def lower(self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments, steps: int) -> Estimate:
        """Lower bound of η*(N): from the number of steps, or, where it is larger, that of all examples times B/n."""
        spread, bounds = self.hessian_sq(found), MomentBounds(rule, moments)

        def in_steps(p2: float, spread_sq: float) -> float:
            return bounds.forward_only_horizon(max(p2, 0.0) + max(spread_sq, 0.0), steps)

        def for_ever(p1: float, p2: float) -> float:
            share = min(self.batch_size / self.examples, 1.0)
            return share * bounds.forward_only(p1, max(p2, 0.0)).lower

        first = propagated(in_steps, found.frobenius_sq, spread, independent=False)
        if found.indefinite or found.trace.value <= 0:
            return first
        second = propagated(for_ever, found.trace, found.frobenius_sq, independent=False)
        return max(first, second, key=lambda estimate: estimate.value)

    def bounds(
        self, found: ForwardCurvature, *, rule: UpdateRule, moments: EstimatorMoments, scale: float, steps: int
    ) -> ForwardMiniBatch:
        """What can be said of one update rule.

        Args:
            found: What was measured.
            rule: Update rule.
            moments: Constants of the estimator.
            scale: Adam's P, with the noise of mini-batches in it; 1 for other rules.
            steps: Planned.
        """
        descent = self.descent(found, rule=rule, moments=moments)
        return ForwardMiniBatch(
            batch_size=self.batch_size,
            examples=self.examples,
            steps=steps,
            descent=None if descent is None else descent.scaled(scale),
            lower=self.lower(found, rule=rule, moments=moments, steps=steps).scaled(scale),
            upper=self.upper(found, rule=rule, moments=moments).scaled(scale),
            noise_sq=self.noise_sq(found),
            hessian_spread_sq=self.hessian_sq(found),
            num_hvps=found.num_hvps,
        )

    def _noise(self, found: ForwardCurvature, moments: EstimatorMoments) -> _RelativeNoise:
        noise = found.noise
        assert noise is not None
        relative = ratio_of(self.spread * noise.gradient_sq, noise.slopes_sq)
        curved = ratio_of(self.spread * moments.a * noise.curvature, noise.slopes_sq)
        square = float(noise.slopes_sq.mean())
        rough = (self.spread * noise.gradient_error + relative.value * noise.slopes_error) / square
        return _RelativeNoise(relative.value, relative.half_width + rough, curved)


@dataclass(frozen=True)
class _RelativeNoise:
    """Noise of gradients in units of ``‖g‖²``: its square, and a times the curvature that it meets."""

    relative: float
    relative_half_width: float
    curvature: Estimate


def noisy_square(found: ForwardCurvature, batches: ForwardBatches | None) -> float:
    """``E‖g_B‖²``."""
    return found.gradient_sq.value + (0.0 if batches is None else float(np.maximum(batches.noise_sq(found).value, 0.0)))


def forward_bounds(session: CurvatureSession, request: Request) -> BoundsResult:
    """Measure a prepared problem by forward passes and derive what they can say.

    Args:
        session: Prepared with ``differentiable=False``.
        request: What is asked.

    Raises:
        UsageError: If nothing that was asked for can be known this way.
        NumericalError: If the loss is not finite around the parameters, or, with ``strict``, for a missed precision.
    """
    rules, objective = _rules(request), session.objective
    moments = request.moments(dimension=objective.num_params)
    size = batch_size_of(objective, request)
    batches = None if size is None else ForwardBatches.of(objective, size)

    def precision(result: ForwardCurvature) -> float:
        return max(_precision(result, batches, moments))

    found = measure_forward(objective, precision=precision, noise=batches is not None, **request.budget)
    rows = {
        name: _row(found, batches, request, rule=rule, settings=request.settings(name), moments=moments)
        for name, rule in rules.items()
    }
    missed = session.missed(precision_notices(*_precision(found, batches, moments), request, found))
    return BoundsResult(
        steps=request.steps,
        rtol=request.rtol,
        curvature={},
        optimizers=rows,
        estimator=Estimator(request.directions, request.queries),
        forward=found,
        **session.header(
            loss=found.loss,
            grad_norm=math.sqrt(found.gradient_sq.value),
            num_hvps=found.num_hvps,
            warnings=(*missed, *forward_notices(found, request, objective, rows), *objective.warnings),
        ),
    )


def _rules(request: Request) -> Mapping[str, UpdateRule]:
    """Rules whose bounds can be known: a stored preconditioner would have to scale every direction."""
    rules = dict(request.rules)
    if request.state_file is not None:
        rules = {name: rule for name, rule in rules.items() if not rule.preconditioned}
    if not rules:
        raise UsageError(
            f"--preconditioner {request.preconditioner}: --curvature forward knows Adam's preconditioner only as its "
            "expected value. Leave --preconditioner out, or use --curvature hessian."
        )
    if request.threshold in ("horizon", "exact"):
        raise UsageError(
            f"--threshold {request.threshold} needs the spectrum of the Hessian, which --curvature forward cannot see: "
            "expected binding or descent."
        )
    return rules


def _row(
    found: ForwardCurvature,
    batches: ForwardBatches | None,
    request: Request,
    *,
    rule: UpdateRule,
    settings: Mapping[str, Any],
    moments: EstimatorMoments,
) -> OptimizerBounds:
    scale = preconditioner_scale(found.gradient_sq.value, request, moments) if rule.preconditioned else 1.0
    minibatch = None
    if batches is not None and rule.is_linear:
        noisy = noisy_square(found, batches)
        noisy_scale = preconditioner_scale(noisy, request, moments) if rule.preconditioned else 1.0
        minibatch = batches.bounds(found, rule=rule, moments=moments, scale=noisy_scale, steps=request.steps)

    def ends(trace: float, frobenius_sq: float) -> tuple[float, float]:
        if not rule.is_linear:
            return math.inf, math.inf
        interval = MomentBounds(rule, moments).forward_only(trace / scale, frobenius_sq / scale**2)
        return interval.lower, interval.upper

    def descent(trace: float, rayleigh: float) -> float:
        if rule.is_linear:
            return scale * descent_threshold(trace, rayleigh, moments=moments, rule=rule)
        pull = 0.5 * floor_factor(rule.adapts or "slopes", moments) * trace
        return math.sqrt(max(found.gradient_sq.value, 0.0)) / pull if pull > 0 else math.inf

    moved = found.trace, found.frobenius_sq
    bounds = ForwardBounds(
        lower=propagated(lambda p1, p2: ends(p1, max(p2, 0.0))[0], *moved, independent=False),
        upper=propagated(lambda p1, p2: ends(p1, max(p2, 0.0))[1], *moved, independent=False),
        descent=propagated(descent, found.trace, found.rayleigh or Estimate(0.0), independent=True),
        minibatch=minibatch,
    )
    limit = forward_limit(request.threshold, bounds)
    recommended = recommended_by_forward(limit, bounds)
    reason = _reason(bounds)
    if recommended is None:
        reason = "forward passes found nothing that limits the step size"
        if math.isfinite(limit.value):
            reason = "the interval of the threshold reaches down to 0, which forward passes cannot narrow"
    return OptimizerBounds(
        name=rule.name,
        rule=rule,
        operator="hessian",  # Adam's P is a number here
        settings=settings,
        fo=None,
        zo_lower=bounds.lower.value,
        zo_upper=bounds.upper.value,
        lower_tight=None,
        upper_tight=None,
        exact=None,
        horizon=None,
        descent=bounds.descent.value if found.rayleigh is not None else None,
        binding=Binding("descent" if limit.name == "descent" else "forward", limit.value),
        recommended=recommended,
        recommended_reason=reason,
        verdict=None if request.lr is None else _verdict(request.lr, request.steps, bounds, limit),
        forward=bounds,
        limit=limit,
    )


def _reason(bounds: ForwardBounds) -> str:
    end = "lower end of the interval"
    if bounds.minibatch is not None:
        end = "lower bound for the planned steps, both with mini-batches"
    return (
        f"{MARGIN:g} × the smaller of the descent threshold and the {end}, because the threshold may be there, and "
        "because curvature usually rises while a network trains"
    )


def preconditioner_scale(gradient_sq: float, request: Request, moments: EstimatorMoments) -> float:
    """Adam's expected ``P = √(a g_i² + b‖g‖²) + ε`` with the first part, about 1/d of the second, left out.

    Args:
        gradient_sq: ``‖g‖²``, or its mean over mini-batches.
        request: What is asked.
        moments: Constants of the estimator.

    Raises:
        NumericalError: If P is zero.
    """
    scale = math.sqrt(moments.b * gradient_sq) + request.eps
    if scale == 0:
        raise NumericalError(
            "Adam's preconditioner is zero, since the gradient and --eps are: expected √v + ε > 0. Raise --eps, or "
            "choose other optimizers."
        )
    return scale


def _precision(
    found: ForwardCurvature, batches: ForwardBatches | None, moments: EstimatorMoments
) -> tuple[float, float]:
    """The error of the descent threshold, and that of mini-batches in units of what is wanted of it."""
    reached = relative_half_width(_descent_curvature(found, moments))
    if batches is None:
        return reached, 0.0
    descent = batches.descent(found, rule=update_rule("gd"), moments=moments)
    return reached, 0.0 if descent is None else relative_half_width(descent) / BATCHES


def _descent_curvature(found: ForwardCurvature, moments: EstimatorMoments) -> Estimate:
    """``b Tr H + a r_g``, of which the descent threshold is twice the inverse; its error is the one to bring down."""
    rayleigh = found.rayleigh or Estimate(0.0)
    return propagated(lambda p1, r: moments.b * p1 + moments.a * r, found.trace, rayleigh, independent=True)


def _verdict(lr: float, steps: int, bounds: ForwardBounds, limit: Limit) -> Verdict:
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=limit.ratio(lr),
        outlook=stand(lr, limit),
        blow_up=None,
        doubling=None,
        descends=lr < bounds.met[2].value,
    )
