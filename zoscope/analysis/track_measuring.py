"""The curvature at one point of a run, as a record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoscope.analysis.measurement import notify_unseen
from zoscope.analysis.minibatch import Batches
from zoscope.analysis.request import relative_half_width
from zoscope.analysis.thresholds import ci95
from zoscope.analysis.track_results import Record
from zoscope.curvature.ggn import GGNOperator
from zoscope.curvature.operators import HessianOperator, LinearOperator, Preconditioned, ShardOperator, gradient
from zoscope.curvature.preconditioner import current_diagonal, expected_preconditioner, probe_preconditioner
from zoscope.curvature.slq import OnProgress, measure
from zoscope.errors import NumericalError, UsageError
from zoscope.runtime import spawn_generators
from zoscope.theory.quadratic import QuadraticModel
from zoscope.theory.rules import floor_factor
from zoscope.theory.spectrum import Estimate
from zoscope.theory.stability import MomentBounds, StabilityCondition, Version, fo_threshold

if TYPE_CHECKING:
    from zoscope.analysis.minibatch import BatchSpread
    from zoscope.analysis.track_results import TrackRequest
    from zoscope.curvature.slq import Curvature
    from zoscope.problem import Objective
    from zoscope.problem.core import Measurable
    from zoscope.theory.spectrum import SampledSpectrum

VERSIONS: tuple[Version, ...] = ("full", "positive")


@dataclass(frozen=True)
class Moment:
    """Where a run is when it is measured.

    Args:
        step: Steps done.
        lr: Step size that led here.
        lr_next: Step size of the next step.
        remaining: Steps to go.
        second_moment: Adam's v, ``(d,)``; ``None`` before the first step and for other rules.
        steps_of_moment: Steps that v has seen.
        shares: ``(d,)`` step size of every parameter in units of ``lr``, positive; ``None`` where they are the same.
    """

    step: int
    lr: float
    lr_next: float
    remaining: int
    second_moment: Tensor | None = None
    steps_of_moment: int = 0
    shares: Tensor | None = None


class Measurer:
    """Measures the same thing again and again, at the same parameters always with the same answer.

    Args:
        measurable: The problem; measured where its parameters stand.
        request: The optimizer, and how precisely to measure.
    """

    def __init__(self, measurable: Measurable, request: TrackRequest) -> None:
        self._measurable, self._request = measurable, request
        self._rule = request.rule
        self._moments = request.moments(dimension=measurable.num_params)
        self._hvp = request.hvp
        self._compared = False  # second derivatives with differences of the loss: once a problem

    def at(self, moment: Moment, *, on_progress: OnProgress | None = None) -> Record:
        """Measure where the parameters stand. Where the loss or a derivative is not finite, curvature is left open.

        Args:
            moment: Where the run is.
            on_progress: Called after every stage of the measurement.
        """
        with self._measurable.at() as objective:
            return self._at(objective, moment, on_progress)

    def _at(self, objective: Objective, moment: Moment, on_progress: OnProgress | None) -> Record:
        request = self._request
        try:
            loss, g = gradient(objective)
            if not (math.isfinite(loss) and bool(torch.isfinite(g).all())):
                return self.without_curvature(moment, loss=loss)
            operator = self._operator(objective)
            diagonal = self._preconditioner(g, moment)
            if moment.shares is not None:  # η_i = η/P_i
                ones = torch.ones_like(g) if diagonal is None else diagonal
                diagonal = (ones.double() / moment.shares).to(g.dtype)
            acting: LinearOperator = operator if diagonal is None else Preconditioned(operator, diagonal)
            batches = self._batches(objective, operator, g)
            curvature = measure(
                acting,
                method=request.method,
                precision=self._precision,
                on_pairs=None if batches is None else batches.keep,
                **request.budget | {"on_progress": on_progress},
            )
            found = None if batches is None else batches.spread_of(None, self._moments, diagonal=diagonal)
        except NumericalError as error:
            objective.notify("no-curvature", f"At step {moment.step:,} there is no curvature. {error}")
            return self.without_curvature(moment, loss=objective.value())
        if not self._compared:
            self._compared = True
            known = math.nan if acting is not operator else curvature.trace.value
            notify_unseen(objective, operator, request, trace=known, positive=curvature.trace_positive.value)
        norm = float(torch.linalg.vector_norm(g.double()))
        fields = self._curvature(curvature) | self._stability(curvature, moment)
        if found is not None:
            fields |= self._with_batches(curvature, found, moment, fields["exact"])
        if diagonal is not None:
            fields |= self._about_preconditioner(operator, diagonal)
            fields["operator"] = f"preconditioned_{self._request.curvature}"
        fields["num_hvps"] = operator.num_hvps + (0 if found is None else found.num_sweeps)
        self._hvp = getattr(operator, "method", None) or self._hvp
        return Record(step=moment.step, loss=loss, lr=moment.lr, lr_next=moment.lr_next, grad_norm=norm, **fields)

    def _batches(self, objective: Objective, operator: ShardOperator, g: Tensor) -> Batches | None:
        """What measures mini-batches; ``None`` where steps see all examples, or noise has no part in the threshold."""
        request = self._request
        size = request.batch_size
        if size is None or request.first_order or not self._rule.is_linear or size >= objective.num_examples:
            return None
        try:
            return Batches(objective, operator, g, batch_size=size, seed=request.seed, eps=None)
        except UsageError as error:
            objective.notify("no-mini-batches", f"Thresholds are those of all examples. {error}")
            return None

    def _with_batches(
        self, curvature: Curvature, found: BatchSpread, moment: Moment, exact: float | None
    ) -> dict[str, Any]:
        """The threshold with mini-batches, and the step size in units of the lower of both."""
        bounds = found.bounds(
            curvature.spectrum, steps=max(moment.remaining, 1), rule=self._rule, moments=self._moments
        )
        if bounds.exact is None or exact is None:
            return {}
        return {
            "exact_batches": bounds.exact.value,
            "exact_batches_ci95": bounds.exact_ci95,
            "ratio": moment.lr / min(exact, bounds.exact.value),
        }

    def without_curvature(self, moment: Moment, *, loss: float) -> Record:
        """What can be said of a point with nothing finite to measure."""
        return Record(step=moment.step, loss=loss, lr=moment.lr, lr_next=moment.lr_next, operator=self._name)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a measurement after it is the same."""
        return {"hvp": self._hvp, "compared": self._compared}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._hvp, self._compared = state["hvp"], state.get("compared", True)

    @property
    def _name(self) -> str:
        return f"{'preconditioned_' if self._rule.preconditioned else ''}{self._request.curvature}"

    def _operator(self, objective: Objective) -> ShardOperator:
        # A new one each time: a kept one would hold on to its graph while the run trains.
        if self._request.curvature == "ggn":
            return GGNOperator(objective)
        return HessianOperator(objective, hvp=self._hvp)

    def _preconditioner(self, g: Tensor, moment: Moment) -> Tensor | None:
        """Adam's P; before the first step what it is expected to be."""
        if not self._rule.preconditioned:
            return None
        if moment.second_moment is None:
            return expected_preconditioner(g, moments=self._moments, eps=self._request.eps).diagonal
        request = self._request
        found = current_diagonal(moment.second_moment, moment.steps_of_moment, betas=request.betas, eps=request.eps)
        return found.to(g.dtype)

    def _precision(self, spectrum: SampledSpectrum) -> float:
        """The larger half-width of the trace, relative to its positive part, and of the threshold."""
        positive = spectrum.fine.positive.trace
        trace = spectrum.trace_of(lambda x: x).half_width
        widths = [trace / positive if positive > 0 else 0.0]
        if self._moments.b > 0 and self._rule.is_linear:
            widths.append(relative_half_width(StabilityCondition(self._rule, self._moments).estimate(spectrum)))
        return max(widths)

    def _curvature(self, found: Curvature) -> dict[str, Any]:
        return {
            "operator": self._name,
            "trace": found.trace.value,
            "trace_stderr": found.trace.stderr,
            "trace_positive": found.trace_positive.value,
            "lambda_max": found.lambda_max.value,
            "lambda_max_residual": found.lambda_max.residual,
            "lambda_max_converged": found.lambda_max.converged,
            "lambda_min": found.lambda_min.value,
            "lambda_min_residual": found.lambda_min.residual,
            "lambda_min_converged": found.lambda_min.converged,
            "frobenius_sq": found.frobenius_sq.value,
            "frobenius_sq_stderr": found.frobenius_sq.stderr,
            "precision": self._precision(found.spectrum) if not found.spectrum.is_exact else 0.0,
            "method": found.method,
        }

    def _stability(self, found: Curvature, moment: Moment) -> dict[str, Any]:
        trace, largest = found.trace.value, found.lambda_max.value
        if self._rule.adapts is not None and not self._rule.is_linear:
            return {"floor": 0.5 * floor_factor(self._rule.adapts, self._moments) * moment.lr_next * max(trace, 0.0)}
        exact = self._exact(found)
        if self._request.first_order:
            lower = upper = largest
            term = 2 * (1 + self._rule.momentum) / self._rule.lr_scale
        else:
            bounds = MomentBounds(self._rule, self._moments)
            lower, upper = sorted((trace, trace + bounds.own / bounds.noise * largest))
            term = bounds.damping / bounds.noise
        fields = {
            "lower": lower,
            "upper": upper,
            "threshold": term / moment.lr if moment.lr else None,
            "exact": exact.value,
            "exact_ci95": ci95(exact),
            "ratio": moment.lr / exact.value,
        }
        return fields if self._request.first_order else fields | self._outlook(found, moment)

    def _exact(self, found: Curvature) -> Estimate:
        if not self._request.first_order:
            return StabilityCondition(self._rule, self._moments).estimate(found.spectrum)
        value = fo_threshold(found.lambda_max.value, rule=self._rule)
        relative = found.lambda_max.residual / abs(found.lambda_max.value) if math.isfinite(value) else 0.0
        return Estimate(value, quadrature=value * relative if relative else 0.0)

    def _outlook(self, found: Curvature, moment: Moment) -> dict[str, Any]:
        spectrum, rule, moments = found.spectrum.fine, self._rule, self._moments
        if moment.remaining < 1 or not moment.lr_next:
            return {}
        return {
            "horizon": tuple(
                StabilityCondition(rule, moments, moment.remaining, version).threshold(spectrum) for version in VERSIONS
            ),
            "blow_up": tuple(
                QuadraticModel(spectrum, rule, moments).time_to_blow_up(moment.lr_next, version=version)
                for version in VERSIONS
            ),
        }

    def _about_preconditioner(self, operator: LinearOperator, diagonal: Tensor) -> dict[str, Any]:
        (generator,) = spawn_generators(self._request.seed, 1, operator.device)
        probes = probe_preconditioner(operator, diagonal, generator=generator)
        ends = float(diagonal.min()), float(diagonal.median()), float(diagonal.max())
        return {"preconditioner": ends, "commutator": probes.commutator.value}
