"""``zoscope.bounds``: curvature and step-size bounds of a problem."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from zoscope.analysis import notices
from zoscope.analysis.measurement import Measurement, ThresholdQuery, measure_problem, optimizer_row
from zoscope.analysis.notices import Growth, growth_notices, measure_growth
from zoscope.analysis.request import Progress, Request, rule_names, sharded_basis, subject_of
from zoscope.analysis.thresholds import BoundsResult, Estimator, OptimizerBounds
from zoscope.errors import NumericalError
from zoscope.problem import OWN_DTYPE, Notice
from zoscope.registry import DEFAULT_FAMILIES
from zoscope.result import ProblemInfo
from zoscope.theory.quadratic import one_sided_mu
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from zoscope.analysis.advice import Threshold
    from zoscope.problem import Objective, Problem
    from zoscope.registry import Differences, Directions


def bounds(
    problem: Problem,
    *,
    optimizers: Sequence[str] = DEFAULT_FAMILIES,
    steps: int = 1000,
    rtol: float = 0.02,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_hvps: int = 600,
    directions: Directions = "gaussian",
    differences: Differences = "central",
    queries: int = 1,
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    curvature: Literal["hessian", "ggn", "forward"] = "hessian",
    preconditioner: str = "expected",
    method: Literal["auto", "dense", "deflated-slq"] = "auto",
    micro_batch: int | None = None,
    max_memory: int | None = None,
    shard_basis: bool = False,
    hvp: str = "auto",
    threshold: Threshold = "binding",
    lr: float | None = None,
    batch_size: int | None = None,
    strict: bool = False,
    params: str | None = None,
    spec: str | None = None,
    on_progress: Progress | None = None,
) -> BoundsResult:
    """First- and zeroth-order step-size bounds of a problem, from the curvature where its model stands.

    The problem comes back as it was: parameters, buffers, modes, ``.grad`` and the global generators.

    Args:
        problem: Model, batches and loss.
        optimizers: Names of optimizers, with ``zo-`` or without; first- and zeroth-order bounds come together.
        steps: Planned number of training steps N, the horizon of η*(N).
        rtol: Relative 95 % half-width wanted for η*(N), and for the infinite-time threshold where it is asked for or
            close to binding.
        seed: Seed of the probe vectors.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        dtype: ``"auto"``, ``"float32"``, ``"float64"`` or ``"bfloat16"``; derivatives are taken in float32 at least.
        max_hvps: Most Hessian-vector products per operator; with ``curvature="forward"`` most directions, two forward
            passes each.
        directions: Law of the zeroth-order perturbations, ``"gaussian"`` or ``"sphere"``.
        differences: Loss differences: ``central``, or ``one-sided``, whose noise has a part of order μ.
        queries: Two-point queries averaged per step.
        beta: Momentum of ``"gdm"``, in the convention of ``torch.optim.SGD``.
        betas: Adam's ``(β₁, β₂)``.
        eps: Adam's ε.
        dampening: τ of GDM's ``m ← βm + (1−τ)g``.
        weight_decay: w of GD and GDM.
        curvature: ``"hessian"``; ``"ggn"`` for the Gauss-Newton matrix in its place; or ``"forward"`` for what forward
            passes alone say of H, in the memory of inference, and without derivatives of the loss.
        preconditioner: Adam's P: ``"expected"`` from the gradient here, or ``"state:FILE"``.
        method: ``"dense"``, ``"deflated-slq"``, or what is cheaper.
        micro_batch: Examples per forward and backward pass; the batches as they are by default.
        max_memory: Bytes that the process may hold in all: batches are cut, and vectors kept, accordingly.
        shard_basis: Spread the Lanczos vectors over the processes of a job; there have to be several.
        hvp: How products are computed.
        threshold: What the recommendation and the verdict go by: ``"binding"`` is the smaller one of ``"horizon"`` and
            ``"descent"``; ``"exact"`` is the infinite-time threshold.
        lr: A step size to judge.
        batch_size: Examples per training step, drawn at random; all of them by default. Adds the thresholds with such
            mini-batches, which the recommendation and the verdict then go by.
        strict: Raise where the precision asked for is not reached.
        params: Regular expression that selects parameters by name.
        spec: Name of the problem in the result; the problem's own by default.
        on_progress: Called as ``on_progress(stage, num_hvps, precision)`` during the measurement.

    Returns:
        Bounds that print themselves, with the JSON document as ``to_dict()``.

    Raises:
        ValueError: If an argument is outside of its range.
        UsageError: If the curvature or the preconditioner asked for cannot be had.
        SpecError: If the problem cannot be measured.
        NumericalError: For values that are not finite, exhausted memory, or, with ``strict``, a precision not reached.
    """
    started = time.perf_counter()
    request = Request(
        optimizers=rule_names(optimizers),
        steps=steps,
        rtol=rtol,
        seed=seed,
        max_hvps=max_hvps,
        directions=directions,
        differences=differences,
        queries=queries,
        beta=beta,
        betas=betas,
        eps=eps,
        dampening=dampening,
        weight_decay=weight_decay,
        curvature=curvature,
        preconditioner=preconditioner,
        method=method,
        hvp=hvp,
        threshold=threshold,
        lr=lr,
        strict=strict,
        on_progress=on_progress,
        batch_size=batch_size,
    )
    subject = subject_of(problem, params)
    name = spec if spec is not None else problem.name
    options: dict[str, Any] = {"device": device, "micro_batch": micro_batch, "max_memory": max_memory}
    if request.curvature == "forward":
        # Here, so that the other kinds of curvature do not wait for the optimizers that it brings along.
        from zoscope.analysis.forward import forward_bounds

        own = OWN_DTYPE if dtype == "auto" else dtype  # a wider copy would cost more memory than inference
        with sharded_basis(shard_basis), subject.prepare(dtype=own, differentiable=False, **options) as objective:
            return forward_bounds(objective, request, spec=name, started=started)
    with sharded_basis(shard_basis), subject.prepare(dtype=dtype, **options) as objective:
        measurement = measure_problem(objective, request)
        return _result(objective, request, measurement, spec=name, started=started)


def _result(
    objective: Objective, request: Request, measurement: Measurement, *, spec: str | None, started: float
) -> BoundsResult:
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
    dtype = str(objective.dtype).removeprefix("torch.")
    warnings = notices.without_repeats(_notices(objective, request, measurement, rows, seen, info))
    return BoundsResult(
        spec=spec,
        device=str(objective.device),
        dtype=dtype,
        seed=request.seed,
        steps=request.steps,
        rtol=request.rtol,
        problem=info,
        curvature={entry.operator: entry.curvature for entry in measurement.operators.values()},
        optimizers=rows,
        estimator=Estimator(request.directions, request.queries, _one_sided_mu(request, measurement)),
        num_hvps=measurement.num_hvps + (0 if growth is None else growth.num_hvps),
        seconds=time.perf_counter() - started,
        warnings=warnings,
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
    yield from notices.nonsmooth_notices(entry.curvature, nonsmooth)


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
    objective: Objective,
    request: Request,
    measurement: Measurement,
    rows: dict[str, OptimizerBounds],
    seen: Iterable[Notice],
    info: ProblemInfo,
) -> Iterable[Notice]:
    first = next(iter(rows.values()))
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
    nonsmooth = tuple(
        notices.precision_notices(reached, rtol=request.rtol, max_hvps=request.max_hvps, dimension=info.num_params)
    )
    if nonsmooth and request.strict:
        raise NumericalError(nonsmooth[0].message)
    yield from nonsmooth
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
