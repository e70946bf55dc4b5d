"""``zoscope.bounds`` from forward passes alone: what two moments and a slope say of the thresholds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoscope.analysis import forward_notices, notices
from zoscope.analysis.forward_batches import ForwardBatches, noisy_square
from zoscope.analysis.measured import ProblemInfo
from zoscope.analysis.measuring import batch_size_of
from zoscope.analysis.optimizer_bounds import Binding, ForwardBounds, OptimizerBounds, Verdict
from zoscope.analysis.precision import relative_half_width
from zoscope.analysis.propagation import propagated
from zoscope.analysis.recommend import MARGIN, forward_limit, recommended_by_forward, stand
from zoscope.analysis.results import BoundsResult, Estimator
from zoscope.curvature.forward import measure_forward
from zoscope.errors import NumericalError, UsageError
from zoscope.theory.descent import descent_threshold
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Estimate
from zoscope.theory.thresholds import forward_only_bounds

if TYPE_CHECKING:
    from zoscope.analysis.recommend import Limit
    from zoscope.analysis.request import Request
    from zoscope.curvature.results import ForwardCurvature
    from zoscope.problem import Objective
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule


def forward_bounds(objective: Objective, request: Request, *, spec: str | None, started: float) -> BoundsResult:
    """Measure a prepared problem by forward passes and derive what they can say.

    Args:
        objective: Prepared with ``differentiable=False``.
        request: What is asked.
        spec: Name of the problem in the result.
        started: When the work began, on the clock of ``time.perf_counter``.

    Raises:
        UsageError: If nothing that was asked for can be known this way.
        NumericalError: If the loss is not finite around the parameters, or, with ``strict``, for a missed precision.
    """
    rules = _rules(request)
    moments = request.moments(dimension=objective.num_params)
    size = batch_size_of(objective, request)
    batches = None if size is None else ForwardBatches.of(objective, size)

    def precision(result: ForwardCurvature) -> float:
        return max(_precision(result, batches, moments))

    found = measure_forward(
        objective,
        precision=precision,
        rtol=request.rtol,
        max_hvps=request.max_hvps,
        seed=request.seed,
        noise=batches is not None,
        on_progress=request.on_progress,
    )
    grad_norm = math.sqrt(found.gradient_sq.value)
    info = ProblemInfo(objective.num_params, objective.num_examples, found.loss, grad_norm)
    rows = {
        name: _row(found, batches, request, rule=rule, settings=request.settings(name), moments=moments)
        for name, rule in rules.items()
    }
    missed = forward_notices.precision(*_precision(found, batches, moments), request, found)
    if missed is not None and request.strict:
        raise NumericalError(missed.message)
    told = [*forward_notices.of(found, request, objective, rows), *objective.warnings]
    return BoundsResult(
        spec=spec,
        device=str(objective.device),
        dtype=str(objective.dtype).removeprefix("torch."),
        seed=request.seed,
        steps=request.steps,
        rtol=request.rtol,
        problem=info,
        curvature={},
        optimizers=rows,
        estimator=Estimator(request.directions, request.queries),
        num_hvps=found.num_hvps,
        seconds=time.perf_counter() - started,
        warnings=notices.without_repeats(told if missed is None else [missed, *told]),
        forward=found,
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
    if batches is not None:
        noisy = noisy_square(found, batches)
        noisy_scale = preconditioner_scale(noisy, request, moments) if rule.preconditioned else 1.0
        minibatch = batches.bounds(found, rule=rule, moments=moments, scale=noisy_scale, steps=request.steps)

    def ends(trace: float, frobenius_sq: float) -> tuple[float, float]:
        interval = forward_only_bounds(trace / scale, frobenius_sq / scale**2, rule=rule, moments=moments)
        return interval.lower, interval.upper

    def descent(trace: float, rayleigh: float) -> float:
        return scale * descent_threshold(trace, rayleigh, moments=moments, rule=rule)

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
    return reached, 0.0 if descent is None else relative_half_width(descent) / forward_notices.BATCHES


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
