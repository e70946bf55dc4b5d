"""``zoscope.bounds`` from forward passes alone: what two moments and a slope say of the thresholds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zoscope.analysis import forward_notices, notices
from zoscope.analysis.measured import ProblemInfo
from zoscope.analysis.optimizer_bounds import Binding, ForwardBounds, OptimizerBounds, Outlook, Verdict
from zoscope.analysis.precision import relative_half_width
from zoscope.analysis.recommend import MARGIN
from zoscope.analysis.results import BoundsResult, Estimator
from zoscope.curvature.forward import measure_forward
from zoscope.errors import NumericalError, UsageError
from zoscope.theory.descent import descent_threshold
from zoscope.theory.spectrum import Estimate
from zoscope.theory.thresholds import forward_only_bounds

if TYPE_CHECKING:
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
    if request.batch_size is not None:
        raise UsageError(
            f"--batch-size {request.batch_size}: forward passes know no spectrum, which the thresholds with "
            "mini-batches need. Use --curvature hessian or ggn, or leave it out."
        )
    moments = request.moments(dimension=objective.num_params)
    found = measure_forward(
        objective,
        precision=lambda result: relative_half_width(_descent_curvature(result, moments)),
        rtol=request.rtol,
        max_hvps=request.max_hvps,
        seed=request.seed,
        on_progress=request.on_progress,
    )
    grad_norm = math.sqrt(found.gradient_sq.value)
    info = ProblemInfo(objective.num_params, objective.num_examples, found.loss, grad_norm)
    rows = {
        name: _row(found, request, rule=rule, settings=request.settings(name), moments=moments)
        for name, rule in rules.items()
    }
    reached = relative_half_width(_descent_curvature(found, moments))
    missed = forward_notices.precision(reached, request, found)
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
    request: Request,
    *,
    rule: UpdateRule,
    settings: Mapping[str, Any],
    moments: EstimatorMoments,
) -> OptimizerBounds:
    scale = preconditioner_scale(found, request, moments) if rule.preconditioned else 1.0

    def ends(trace: float, frobenius_sq: float) -> tuple[float, float]:
        interval = forward_only_bounds(trace / scale, frobenius_sq / scale**2, rule=rule, moments=moments)
        return interval.lower, interval.upper

    def descent(trace: float, rayleigh: float) -> float:
        return scale * descent_threshold(trace, rayleigh, moments=moments, rule=rule)

    moved = found.trace, found.frobenius_sq
    bounds = ForwardBounds(
        lower=_propagated(lambda p1, p2: ends(p1, max(p2, 0.0))[0], *moved, independent=False),
        upper=_propagated(lambda p1, p2: ends(p1, max(p2, 0.0))[1], *moved, independent=False),
        descent=_propagated(descent, found.trace, found.rayleigh or Estimate(0.0), independent=True),
    )
    binding = _binding(bounds, request)
    finite = math.isfinite(binding.value)
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
        binding=binding,
        recommended=MARGIN * min(binding.value, bounds.lower.value) if finite else None,
        recommended_reason=_REASON if finite else "forward passes found nothing that limits the step size",
        verdict=None if request.lr is None else _verdict(request.lr, request.steps, bounds, binding),
        forward=bounds,
    )


_REASON = (
    f"{MARGIN:g} × the smaller of the descent threshold and the lower end of the interval, because the threshold may "
    "be there, and because curvature usually rises while a network trains"
)


def preconditioner_scale(found: ForwardCurvature, request: Request, moments: EstimatorMoments) -> float:
    """Adam's expected ``P = √(a g_i² + b‖g‖²) + ε`` with the first part, about 1/d of the second, left out.

    Raises:
        NumericalError: If P is zero.
    """
    scale = math.sqrt(moments.b * found.gradient_sq.value) + request.eps
    if scale == 0:
        raise NumericalError(
            "Adam's preconditioner is zero, since the gradient and --eps are: expected √v + ε > 0. Raise --eps, or "
            "choose other optimizers."
        )
    return scale


def _descent_curvature(found: ForwardCurvature, moments: EstimatorMoments) -> Estimate:
    """``b Tr H + a r_g``, of which the descent threshold is twice the inverse; its error is the one to bring down."""
    rayleigh = found.rayleigh or Estimate(0.0)
    return _propagated(lambda p1, r: moments.b * p1 + moments.a * r, found.trace, rayleigh, independent=True)


def _propagated(
    function: Callable[[float, float], float], first: Estimate, second: Estimate, *, independent: bool
) -> Estimate:
    """A function of two estimates; its error is how far it moves over their 95 % intervals, one after the other.

    The errors add up where they may go together, and add in squares where they are independent.
    """
    value = function(first.value, second.value)
    if not math.isfinite(value):
        return Estimate(value)
    moves = (
        max(abs(function(end, second.value) - value) for end in first.interval),
        max(abs(function(first.value, end) - value) for end in second.interval),
    )
    return Estimate(value, (math.hypot(*moves) if independent else sum(moves)) / 1.96)


def _binding(bounds: ForwardBounds, request: Request) -> Binding:
    """The smaller one of the descent threshold and the upper bound of the infinite-time one."""
    if request.threshold == "descent" or bounds.descent.value <= bounds.upper.value:
        return Binding("descent", bounds.descent.value)
    return Binding("forward", bounds.upper.value)


def _verdict(lr: float, steps: int, bounds: ForwardBounds, binding: Binding) -> Verdict:
    outlook: Outlook = "uncertain"
    if lr > bounds.upper.value:
        outlook = "unstable"
    elif lr <= bounds.lower.value:
        outlook = "stable"
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=lr / binding.value,
        outlook=outlook,
        blow_up=None,
        doubling=None,
        descends=lr < bounds.descent.value,
    )
