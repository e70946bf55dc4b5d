"""``zoscope.bounds``: curvature and step-size bounds of a problem."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from zoscope.analysis import notices
from zoscope.analysis.measurement import Measurement, ThresholdQuery, measure_problem, optimizer_row
from zoscope.analysis.notices import Growth, growth_notices, measure_growth
from zoscope.analysis.request import CurvatureSession, Progress, Request, curvature_session
from zoscope.analysis.thresholds import BoundsResult, Estimator, OptimizerBounds
from zoscope.options import BoundsOptions
from zoscope.problem import OWN_DTYPE, Notice
from zoscope.result import ProblemInfo
from zoscope.theory.quadratic import one_sided_mu
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from zoscope.analysis.request import ProblemLike
    from zoscope.problem import Objective


def bounds(
    problem: ProblemLike, *, on_progress: Progress | None = None, **options: Unpack[BoundsOptions]
) -> BoundsResult:
    """First- and zeroth-order step-size bounds of a problem, from the curvature where its model stands.

    The problem comes back as it was: parameters, buffers, modes, ``.grad`` and the global generators.

    Args:
        problem: Model, batches and loss; a function that returns them, or a spec, such as ``"model.py"``.
        on_progress: Called as ``on_progress(stage, num_hvps, precision)`` during the measurement.
        **options: Those of ``zoscope bounds``: ``examples/guide/options.md`` has types, defaults and ranges. With
            ``curvature="forward"`` derivatives of the loss are not taken, the memory is that of inference, and
            ``max_hvps`` counts directions of two forward passes each.

    Returns:
        Bounds that print themselves, with the JSON document as ``to_dict()``.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range.
        UsageError: If the curvature or the preconditioner asked for cannot be had.
        SpecError: If the problem cannot be measured.
        NumericalError: For values that are not finite, exhausted memory, or, with ``strict``, a precision not reached.
    """
    request = Request.of(on_progress=on_progress, **options)
    if request.curvature == "forward":
        # Here, so that the other kinds of curvature do not wait for the optimizers that it brings along.
        from zoscope.analysis.forward import forward_bounds

        own = OWN_DTYPE if request.dtype == "auto" else None  # a wider copy would cost more memory than inference
        with curvature_session(problem, request, dtype=own, differentiable=False) as session:
            return _with_mu(forward_bounds(session, request), session, request)
    with curvature_session(problem, request) as session:
        result = _result(session, request, measure_problem(session.objective, request))
        return _with_mu(result, session, request)


def _with_mu(result: BoundsResult, session: CurvatureSession, request: Request) -> BoundsResult:
    """The result with a judgement of the μ asked about."""
    if request.mu is None:
        return result
    from zoscope.planning.mu import measure_trained_scale, perturbation_notices  # late: with --mu only

    how = {"batch_size": request.batch_size, "one_sided": request.differences == "one-sided", "seed": request.seed}
    scale = measure_trained_scale(session.subject, session.objective, vars(request), **how)
    told = (*result.warnings, *perturbation_notices(scale, request.mu))
    seconds = time.perf_counter() - session.started
    return replace(result, mu=request.mu, perturbation=scale, warnings=told, seconds=seconds)


def _result(session: CurvatureSession, request: Request, measurement: Measurement) -> BoundsResult:
    objective = session.objective
    info = ProblemInfo(objective.num_params, objective.num_examples, measurement.loss, measurement.grad_norm)
    seen = tuple(_missed_notices(measurement))
    question = ThresholdQuery(
        request.steps,
        request.threshold,
        request.lr,
        info.loss,
        request.moments(dimension=info.num_params),
        tuple(dict.fromkeys(notice.code for notice in seen)),
    )
    rows = _rows(request, measurement, question)
    growth = _growth(objective, request, measurement, rows)
    if growth is not None and growth.significant:
        seen = (*seen, *growth_notices(growth))
        rows = _rows(request, measurement, replace(question, doubts=(*question.doubts, "little-curvature")))
    return BoundsResult(
        steps=request.steps,
        rtol=request.rtol,
        curvature={entry.operator: entry.curvature for entry in measurement.operators.values()},
        optimizers=rows,
        estimator=Estimator(request.directions, request.queries, _one_sided_mu(request, measurement)),
        **session.header(
            loss=info.loss,
            grad_norm=info.grad_norm,
            num_hvps=measurement.num_hvps + (0 if growth is None else growth.num_hvps),
            warnings=_notices(session, request, measurement, rows, seen, info),
        ),
    )


def _one_sided_mu(request: Request, measurement: Measurement) -> float | None:
    """μ at which one-sided differences double the noise, by the trace of H; ``None`` for central ones, or without H."""
    plain = [m for m in measurement.operators.values() if not m.operator.startswith("preconditioned")]
    if request.differences == "central" or not plain:
        return None
    found = plain[0].curvature
    return one_sided_mu(measurement.grad_norm, found.trace.value, found.frobenius_sq.value)


def _rows(request: Request, measurement: Measurement, question: ThresholdQuery) -> dict[str, OptimizerBounds]:
    return {
        name: optimizer_row(
            measurement.operators[name],
            question,
            rule=rule,
            settings=request.settings(name),
            descent=measurement.descent[name],
        )
        for name, rule in request.rules.items()
    }


def _missed_notices(measurement: Measurement) -> Iterable[Notice]:
    """On curvature that second derivatives do not see; a loss that only jumps has a notice of its own."""
    if measurement.jump is not None:
        return
    entry, nonsmooth = next(iter(measurement.operators.values())), measurement.nonsmooth
    if entry.operator.startswith("preconditioned"):  # it has other units, in which only their ratio is known
        nonsmooth = replace(nonsmooth, trace=Estimate(0.0))
    found = entry.curvature
    yield from notices.nonsmooth_notices(nonsmooth, trace=found.trace.value, positive=found.trace_positive.value)


def _growth(
    objective: Objective, request: Request, measurement: Measurement, rows: dict[str, OptimizerBounds]
) -> Growth | None:
    """What the first steps of descent do to the trace, as far as the longest run among those planned goes."""
    shares = [
        math.inf if row.recommended is None else row.advisor.share(row.recommended, request.steps)
        for row in rows.values()
        if row.advisor is not None
    ]
    entry = next(iter(measurement.operators.values()))
    found, weights = entry.curvature.trace.interval[1], None
    if entry.operator.startswith("preconditioned") and measurement.preconditioner is not None:
        weights = measurement.preconditioner.diagonal.double().rsqrt()
        scale = float(weights.square().mean())
        weights, found = (weights / math.sqrt(scale)).to(objective.dtype), found / scale
    return measure_growth(
        objective,
        loss=measurement.loss,
        before=found + max(measurement.nonsmooth.significant, 0.0),
        share=max(shares),
        seed=request.seed,
        weights=weights,
    )


def _notices(
    session: CurvatureSession,
    request: Request,
    measurement: Measurement,
    rows: dict[str, OptimizerBounds],
    seen: Iterable[Notice],
    info: ProblemInfo,
) -> Iterable[Notice]:
    objective, first = session.objective, next(iter(rows.values()))
    # The preconditioned operator has the signs of the Hessian: one account of them is enough.
    yield from notices.curvature_notices(measurement.operators[first.name].curvature, first, jump=measurement.jump)
    yield from seen
    yield from notices.gradient_notices(rows.values())
    yield from notices.provisional_notices(rows.values())
    yield from _reach_notices(objective, request, rows, info)
    adam = next((row for row in rows.values() if row.commutator is not None), None)
    if measurement.preconditioner is not None and adam is not None and adam.commutator is not None:
        yield from notices.preconditioner_notices(measurement.preconditioner, adam.commutator, adam)
    reached = _precision_reached(request, measurement, dimension=info.num_params)
    yield from session.missed(
        notices.precision_notices(reached, rtol=request.rtol, max_hvps=request.max_hvps, dimension=info.num_params)
    )
    for entry in measurement.operators.values():
        for note in entry.curvature.notes:
            yield Notice("measurement", note)
    yield from objective.warnings


def _reach_notices(
    objective: Objective, request: Request, rows: dict[str, OptimizerBounds], info: ProblemInfo
) -> Iterable[Notice]:
    """Whether the noise of the step size asked about stays where the curvature was measured."""
    row = next((row for row in rows.values() if not row.rule.preconditioned and row.rule.is_linear), None)
    if request.lr is None or row is None or row.verdict is None or info.grad_norm == 0:
        return
    from zoscope.analysis.notices import measure_reach, noise_distance, reach_notices  # late: with --lr only

    end = math.inf if row.verdict.blow_up is None else max(row.verdict.blow_up[1], 1.0)
    steps = math.ceil(min(request.steps, end))  # what follows a blow-up is no question
    distance = noise_distance(request.lr, steps=steps, grad_norm=info.grad_norm, queries=request.queries, rule=row.rule)
    found = measure_reach(objective, loss=info.loss, distance=distance, steps=steps, seed=request.seed)
    yield from reach_notices(found, lr=request.lr)


def _precision_reached(request: Request, measurement: Measurement, *, dimension: int) -> dict[str, float]:
    """By operator: the largest relative half-width among the thresholds wanted from it."""
    moments = request.moments(dimension=dimension)
    reached = {}
    for operator in {entry.operator for entry in measurement.operators.values()}:
        names = [name for name, entry in measurement.operators.items() if entry.operator == operator]
        wanted = request.precision([request.rules[name] for name in names], moments=moments)
        reached[operator] = wanted(measurement.operators[names[0]].curvature.spectrum)
    return reached
