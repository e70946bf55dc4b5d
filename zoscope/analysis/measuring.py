"""The measuring half of ``zoscope.bounds``: a prepared problem in, measured operators out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoscope.analysis.rows import Measured
from zoscope.analysis.slope import Slope
from zoscope.curvature.jumps import Jump, jump_of
from zoscope.curvature.kinks import NOTHING, PROBES, Missed, missed_curvature
from zoscope.curvature.lanczos import rounding
from zoscope.curvature.measure import measure
from zoscope.curvature.operators import HessianOperator, LinearOperator, Preconditioned, gradient
from zoscope.curvature.precondition import (
    Preconditioner,
    expected_preconditioner,
    probe_preconditioner,
)
from zoscope.curvature.sampling import OnProgress
from zoscope.curvature.scaled import divided, nearly_scalar
from zoscope.errors import NumericalError, UsageError
from zoscope.runtime import spawn_generators
from zoscope.theory.curve import GradientMeasure
from zoscope.theory.spectrum import Estimate
from zoscope.theory.student import widening

if TYPE_CHECKING:
    from zoscope.analysis.minibatch import Batches
    from zoscope.analysis.request import Request
    from zoscope.curvature.results import Curvature
    from zoscope.problem import Objective
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule


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
        missed: What differences of the loss see beside the Hessian.
        jump: Of a loss that is piecewise constant.
    """

    loss: float
    grad_norm: float
    operators: dict[str, Measured]
    descent: dict[str, Estimate | None]
    preconditioner: Preconditioner | None
    num_hvps: int
    missed: Missed
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
    operators: dict[str, Measured] = {}
    descent: dict[str, Estimate | None] = {}
    preconditioner = None
    missed = _missed(objective, base, request)
    plain = [rule for rule in request.rules.values() if not rule.preconditioned]
    adam = [rule for rule in request.rules.values() if rule.preconditioned]
    if adam:
        preconditioner = _preconditioner(objective, g, request=request, moments=moments)
    batches = _batches(objective, base, g, request)
    scalar = plain and preconditioner is not None and batches is None and _is_scalar(preconditioner, request)
    if plain:
        # Of a spectrum that serves Adam too the same precision is wanted for Adam.
        rules = [*plain, *adam] if scalar else plain
        found, slope = _plain(base, g, rules, missed=missed, batches=batches, request=request, moments=moments)
        operators |= dict.fromkeys((rule.name for rule in plain), found)
        descent |= {rule.name: None if slope is None else slope.estimate(rule, moments) for rule in plain}
    if preconditioner is not None:
        if scalar and not found.curvature.spectrum.is_exact:
            found, slope = _adam_of(found, slope, preconditioner, request=request)
        else:
            found, slope = _adam(
                base, g, preconditioner, adam, missed=missed, batches=batches, request=request, moments=moments
            )
        operators |= dict.fromkeys((rule.name for rule in adam), found)
        descent |= {rule.name: None if slope is None else slope.estimate(rule, moments) for rule in adam}
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
        missed,
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


def _missed(objective: Objective, base: LinearOperator, request: Request) -> Missed:
    if not isinstance(base, HessianOperator):
        return NOTHING
    (generator,) = spawn_generators(request.seed, 1, base.device)
    return missed_curvature(objective, base, generator=generator)


def _counted(missed: Missed) -> Estimate:
    """What kinks add to the trace of the descent threshold, from a few directions; nothing, to rounding, if smooth."""
    return replace(missed.trace, stderr=missed.trace.stderr * widening(PROBES - 1))


def curvature_operator(objective: Objective, request: Request) -> LinearOperator:
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


def _plain(
    base: LinearOperator,
    g: Tensor,
    rules: list[UpdateRule],
    *,
    missed: Missed,
    batches: Batches | None,
    request: Request,
    moments: EstimatorMoments,
) -> tuple[Measured, Slope | None]:
    name = operator_name(request, preconditioned=False)
    curvature = _measured(base, g, rules, name=name, batches=batches, request=request, moments=moments)
    measure, slope = gradient_measure(curvature), None
    if measure is not None:
        square, curved = float(measure.weights.sum()), float(measure.weights @ measure.nodes)
        trace = curvature.trace
        kinks = _counted(missed)
        error = trace.half_width + kinks.half_width + rounding(g.dtype, abs(trace.value) + 2 * abs(curved) / square)
        slope = Slope(square, curved, trace.value + kinks.value, square, error)
    spread = None if batches is None else batches.spread_of(slope, moments, diagonal=None)
    return Measured(name, curvature, measure, batches=spread), slope


def _adam(
    base: LinearOperator,
    g: Tensor,
    preconditioner: Preconditioner,
    rules: list[UpdateRule],
    *,
    missed: Missed,
    batches: Batches | None,
    request: Request,
    moments: EstimatorMoments,
) -> tuple[Measured, Slope | None]:
    p = preconditioner.diagonal
    scaled = Preconditioned(base, p)
    name = operator_name(request, preconditioned=True)
    # In the coordinates y = P^½ x of the operator the gradient is P^-½ g.
    scaled_g = (g.double() / p.double().sqrt()).to(g.dtype)
    curvature = _measured(scaled, scaled_g, rules, name=name, batches=batches, request=request, moments=moments)
    (generator,) = spawn_generators(request.seed, 1, base.device)
    probes = probe_preconditioner(base.known(), p, generator=generator)
    alike = float(p.double().reciprocal().square().mean())  # kinks bend the loss in all directions alike
    kinks = _counted(missed)
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
    spread = None if batches is None else batches.spread_of(slope, moments, diagonal=p)
    return Measured(name, curvature, measure, probes.commutator, spread), slope


def _is_scalar(preconditioner: Preconditioner, request: Request) -> bool:
    """Whether P is so nearly a multiple of the identity that the difference is small beside the precision wanted.

    That is the rule for the expected P of a large model, whose gradient has no entry near its norm.
    """
    return nearly_scalar(preconditioner.diagonal)[1] <= SCALAR * request.rtol


def _adam_of(
    plain: Measured, slope: Slope | None, preconditioner: Preconditioner, *, request: Request
) -> tuple[Measured, Slope | None]:
    """Adam from the spectrum of H itself."""
    p, spread = nearly_scalar(preconditioner.diagonal)
    curvature = divided(plain.curvature, by=p, spread=spread)
    note = (
        f"Adam's P is {p:.3g} on every parameter to within {100 * spread:.1g} %: its spectrum is that of H divided by "
        "it, which cost no products of its own."
    )
    curvature = replace(curvature, notes=(note,))
    if slope is not None:
        slope = replace(
            slope,
            gPg=slope.gPg / p,
            gPHPg=slope.gPHPg / p**2,
            trace=slope.trace / p**2,
            trace_error=slope.trace_error / p**2,
        )
    name = operator_name(request, preconditioned=True)
    return Measured(name, curvature, gradient_measure(curvature)), slope


def gradient_measure(curvature: Curvature) -> GradientMeasure | None:
    """Spectral measure of the gradient; ``None`` for a zero gradient."""
    measure = curvature.vector_measure
    if measure is None or not measure.nodes.size:
        return None
    return GradientMeasure(measure.nodes, measure.weights)


def _measured(
    operator: LinearOperator,
    g: Tensor,
    rules: list[UpdateRule],
    *,
    name: str,
    batches: Batches | None,
    request: Request,
    moments: EstimatorMoments,
) -> Curvature:
    return measure(
        operator,
        method=request.method,
        precision=request.precision(rules, moments=moments),
        vector=g,
        rtol=request.rtol,
        max_hvps=request.max_hvps,
        seed=request.seed,
        on_progress=_told(request.on_progress, name.replace("_", " ")),
        on_pairs=None if batches is None else batches.keep,
    )


def _told(on_progress: OnProgress | None, operator: str) -> OnProgress | None:
    """Name the operator in front of the stage of its measurement."""
    if on_progress is None:
        return None
    return lambda stage, num_hvps, precision: on_progress(f"{operator}: {stage}", num_hvps, precision)


def _preconditioner(objective: Objective, g: Tensor, *, request: Request, moments: EstimatorMoments) -> Preconditioner:
    if request.state_file is not None:
        from zoscope.curvature.adam_state import stored_preconditioner

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
    if batch_size_of(objective, request) is None:
        return None
    from zoscope.analysis.minibatch import Batches

    return Batches(objective, base, g, request)
