"""``zoscope.spectrum`` and ``zoscope.moments``: eigenvalue density, the ends of the spectrum, trace by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor

from zoscope.analysis import notices
from zoscope.analysis.measurement import curvature_operator, find_jump, finite_gradient, notify_unseen
from zoscope.analysis.request import CurvatureSession, MeasureRequest, Progress, curvature_session
from zoscope.analysis.thresholds import CURVATURE
from zoscope.curvature.moments import measure_moments
from zoscope.curvature.slq import DEFLATION_TOLERANCE, Curvature, Moments, measure
from zoscope.options import MomentsOptions, SpectrumOptions, keywords
from zoscope.problem import Notice
from zoscope.result import JsonObject, MeasuredResult, encode, pick
from zoscope.theory.density import Known, decades, density, finest_density

if TYPE_CHECKING:
    from zoscope.analysis.request import ProblemLike
    from zoscope.curvature.nonsmooth import Jump
    from zoscope.curvature.operators import LinearOperator
    from zoscope.curvature.slq import Eigenvalue
    from zoscope.problem import Objective
    from zoscope.theory.density import Decade, Density
    from zoscope.theory.spectrum import Array, Estimate, SampledSpectrum


@dataclass(frozen=True)
class LayerTrace(JsonObject):
    """The share of a layer in the trace.

    Args:
        name: Module that holds the parameters, or the parameter where no module does.
        num_params: How many there are.
        trace: Trace of the layer's diagonal block, loss/param².
        share: Its part of the whole trace; ``None`` where that is not positive.
    """

    name: str
    num_params: int
    trace: Estimate
    share: float | None


@dataclass(frozen=True, kw_only=True)
class MatrixResult(MeasuredResult):
    """What is known of a problem's curvature matrix; the other fields are those of every `MeasuredResult`.

    Args:
        rtol: Relative 95 % half-width asked for of the trace.
        operator: ``"hessian"`` or ``"ggn"``.
    """

    rtol: float
    operator: str


@dataclass(frozen=True, kw_only=True)
class SpectrumResult(MatrixResult):
    """Eigenvalues of a problem's curvature matrix; the other fields are those of every `MatrixResult`.

    Args:
        curvature: Its moments and ends.
        top: Largest eigenvalues, the largest first.
        bottom: Smallest eigenvalues, the smallest first; none of them is among ``top``.
        density: Eigenvalues per decade with a 95 % band.
        layers: Trace by layer, in the order of the parameters; ``None`` where it was not asked for.
    """

    schema = "zoscope.spectrum/1"

    curvature: Curvature
    top: tuple[Eigenvalue, ...]
    bottom: tuple[Eigenvalue, ...]
    density: Density
    layers: tuple[LayerTrace, ...] | None

    @property
    def outliers(self) -> Array:
        """Eigenvalues known one by one, ascending, loss/param²; all of them when the method is dense."""
        return known_eigenvalues(self.curvature).values

    @property
    def decades(self) -> tuple[Decade, ...]:
        """Counts and sums of eigenvalues by powers of ten."""
        return decades(self.curvature.spectrum, scale=self.density.scale)

    def body(self) -> dict[str, Any]:
        """What only this kind of result has."""
        return {
            "rtol": self.rtol,
            "curvature": {self.operator: pick(self.curvature, CURVATURE)},
            **pick(self, "top bottom outliers"),
            "density": _density(self.density),
            "decades": [pick(part, "lower upper count sum=total") for part in self.decades],
            "layers": encode(self.layers),
        }


def _density(density: Density) -> dict[str, Any]:
    low, high = density.values - density.half_widths, density.values + density.half_widths
    return {
        "unit": "eigenvalues per decade, smoothed",
        "axis": "asinh(eigenvalue / (2 scale)) / ln 10",
        **pick(density, "scale bandwidth error position=positions eigenvalue=eigenvalues value=values"),
        "lower": encode(np.maximum(low, 0.0)),
        "upper": encode(np.maximum(high, 0.0)),
    }


DENSITY_TOLERANCE = 5.0
"""Error of the density that is worth further products, in units of the one wanted for the trace."""

RESOLUTION = 3e-4
"""Distance from zero at which the density is wanted with that error, in units of the spectral radius."""

PLACED = 0.1
"""Largest residual, relative to the value, of an eigenvalue whose place in the order counts as known."""

CHAIN_STEPS = 200
"""Most steps of the long Lanczos chain; the resolution near zero is about inversely proportional."""


def spectrum(
    problem: ProblemLike, *, on_progress: Progress | None = None, **options: Unpack[SpectrumOptions]
) -> SpectrumResult:
    """Eigenvalue density of a problem's curvature matrix, its largest and smallest eigenvalues, and trace by layer.

    The problem comes back as it was: parameters, buffers, modes, ``.grad`` and the global generators.

    Args:
        problem: Model, batches and loss; a function that returns them, or a spec, such as ``"model.py"``.
        on_progress: Called as ``on_progress(stage, num_hvps, precision)`` during the measurement.
        **options: Those of ``zoscope spectrum``: ``examples/guide/options.md`` has types, defaults and ranges. ``rtol``
            is the 95 % half-width wanted for the trace, relative to ``Σ|λ|``; of the density five times as much.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range.
        SpecError: If the problem cannot be measured.
        NumericalError: For values that are not finite, exhausted memory, or, with ``strict``, a precision not reached.
    """
    found = keywords("spectrum", options)
    top, by_layer = found.pop("top"), found.pop("by_layer")
    with curvature_session(problem, MeasureRequest(**found, on_progress=on_progress)) as session:
        return _spectrum(session, top=top, by_layer=by_layer)


def _spectrum(session: CurvatureSession, *, top: int, by_layer: bool) -> SpectrumResult:
    objective, request = session.objective, session.request
    loss, g = finite_gradient(objective)
    layers = layers_of(objective)
    operator = curvature_operator(objective, request)
    curvature = measure(
        operator,
        method=request.method,
        precision=steering_error,
        top=top,
        bottom=top,
        most_steps=CHAIN_STEPS,
        blocks=[size for _, size in layers] if by_layer else None,
        **request.budget,
    )
    found = finest_density(
        curvature.spectrum,
        tolerance=DENSITY_TOLERANCE * request.rtol,
        noise=curvature.lambda_max.residual if curvature.method == "dense" else 0.0,
        known=known_eigenvalues(curvature),
    )
    largest, smallest = ends(curvature, most=top)
    return SpectrumResult(
        curvature=curvature,
        top=largest,
        bottom=smallest,
        density=found,
        layers=_layer_traces(layers, curvature),
        **_shared(session, operator, curvature, loss, g),
    )


def _shared(
    session: CurvatureSession, operator: LinearOperator, found: Curvature | Moments, loss: float, g: Tensor
) -> dict[str, Any]:
    """The fields of a `MatrixResult`, once its matrix was measured and held against differences of the loss."""
    objective, request = session.objective, session.request
    flat = not bool(g.any()) and found.frobenius_sq.value == 0
    jump = find_jump(objective, seed=request.seed) if flat else None
    if jump is None:
        trace = found.trace.value
        positive = max(trace, 0.0) if isinstance(found, Moments) else found.trace_positive.value
        notify_unseen(objective, operator, request, trace=trace, positive=positive)
    header = session.header(
        loss=loss,
        grad_norm=float(torch.linalg.vector_norm(g.double())),
        num_hvps=operator.num_hvps,
        warnings=_notices(session, found, jump),
    )
    return {"rtol": request.rtol, "operator": request.curvature, **header}


def trace_error(sampled: SampledSpectrum) -> float:
    """95 % half-width of the trace over ``Σ|λ|``: signs may cancel in the trace itself."""
    size = sampled.fine.trace_of(np.abs)
    return sampled.trace_of(lambda nodes: nodes).half_width / size if size > 0 else 0.0


def steering_error(sampled: SampledSpectrum) -> float:
    """What a measurement brings down: the error of the trace and, in its own units, that of the density."""
    radius = float(np.abs(sampled.fine.nodes).max(initial=0.0))
    if sampled.is_exact or radius == 0:
        return 0.0
    band = density(sampled, scale=RESOLUTION * radius, points=2)
    return max(trace_error(sampled), band.error / DENSITY_TOLERANCE)


def known_eigenvalues(curvature: Curvature) -> Known:
    """Eigenvalues that a measurement found one by one: all when dense, else those that it deflated."""
    found: Iterable[Eigenvalue] = curvature.ritz
    if curvature.method != "dense":
        found = [ritz for ritz in curvature.ritz if ritz.residual <= DEFLATION_TOLERANCE * abs(ritz.value)]
    pairs = [(ritz.value, ritz.residual) for ritz in found]
    values, residuals = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return Known(values, residuals)


def ends(curvature: Curvature, *, most: int) -> tuple[tuple[Eigenvalue, ...], tuple[Eigenvalue, ...]]:
    """The largest eigenvalues, descending, and of the others the smallest, ascending, as far as their order is known.

    A Ritz value that is far from an eigenvalue has no place in the order yet, and neither have those behind it. The
    outermost one counts in any case: it bounds the spectrum from inside.
    """
    highest = _in_order(curvature.ritz[::-1][:most], curvature.method)
    others = curvature.ritz[: len(curvature.ritz) - len(highest)]
    return highest, _in_order(others[:most], curvature.method)


def _in_order(eigenvalues: tuple[Eigenvalue, ...], method: str) -> tuple[Eigenvalue, ...]:
    if method == "dense":
        return eigenvalues
    far = (i for i, found in enumerate(eigenvalues) if i > 0 and found.residual > PLACED * abs(found.value))
    return eigenvalues[: next(far, len(eigenvalues))]


def layers_of(objective: Objective) -> list[tuple[str, int]]:
    """Names and sizes of the layers, in the order of the flat vector: parameters of one module belong together."""
    sizes = [parameter.numel() for parameter in objective.params]
    named = ((name.rpartition(".")[0] or name, size) for name, size in zip(objective.names, sizes, strict=True))
    return [(name, sum(size for _, size in group)) for name, group in groupby(named, key=lambda pair: pair[0])]


def _layer_traces(layers: list[tuple[str, int]], curvature: Curvature) -> tuple[LayerTrace, ...] | None:
    if curvature.block_traces is None:
        return None
    total = sum(trace.value for trace in curvature.block_traces)
    return tuple(
        LayerTrace(name, size, trace, share=trace.value / total if total > 0 else None)
        for (name, size), trace in zip(layers, curvature.block_traces, strict=True)
    )


def _notices(session: CurvatureSession, found: Curvature | Moments, jump: Jump | None) -> Iterable[Notice]:
    request, objective = session.request, session.objective
    if jump is not None:
        yield notices.jump_notice(jump)
    if isinstance(found, Curvature):
        reached, dimension = trace_error(found.spectrum), objective.num_params  # which a dense spectrum is for
    else:
        reached, dimension = found.error, None
    yield from session.missed(
        notices.precision_notices(
            {request.curvature: reached}, rtol=request.rtol, max_hvps=request.max_hvps, dimension=dimension
        )
    )
    if isinstance(found, Moments) and not found.lambda_max.converged:
        yield Notice(
            "lambda-max",
            f"The largest eigenvalue did not converge: it is {found.lambda_max.value:.4g} to within "
            f"{found.lambda_max.residual:.2g}. Raise --max-hvps.",
        )
    for note in found.notes:
        yield Notice("measurement", note)
    yield from objective.warnings


@dataclass(frozen=True, kw_only=True)
class MomentsResult(MatrixResult):
    """Trace, norm and λ_max of a problem's curvature matrix; the other fields are those of every `MatrixResult`.

    Args:
        moments: What was measured; of ``‖·‖_F²`` three times ``rtol`` was asked for.
    """

    schema = "zoscope.moments/1"

    moments: Moments

    def body(self) -> dict[str, Any]:
        """What only this kind of result has."""
        found = pick(self.moments, "trace frobenius_sq lambda_max pieces num_hvps seconds")
        return {"rtol": self.rtol, "curvature": {self.operator: found}}


def moments(
    problem: ProblemLike, *, on_progress: Progress | None = None, **options: Unpack[MomentsOptions]
) -> MomentsResult:
    """Trace, ``‖·‖_F²`` and the largest eigenvalue, at a fraction of the products that a spectrum takes.

    Where it helps, every piece of the data has probe vectors of its own: see ``zoscope.curvature.moments``.

    Args:
        problem: Model, batches and loss; a function that returns them, or a spec, such as ``"model.py"``.
        on_progress: Called as ``on_progress(stage, num_hvps, precision)`` during the measurement.
        **options: Those of ``zoscope spectrum --moments``: ``examples/guide/options.md`` has types, defaults and
            ranges. ``rtol`` is the 95 % half-width wanted of the trace, relative to it; three times as much of
            ``‖·‖_F²``.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range.
        UsageError: If the budget is too small for an error bar.
        SpecError: If the problem cannot be measured.
        NumericalError: For values that are not finite, exhausted memory, or, with ``strict``, a precision not reached.
    """
    request = MeasureRequest(**keywords("moments", options), method="deflated-slq", on_progress=on_progress)
    with curvature_session(problem, request) as session:
        objective = session.objective
        loss, g = finite_gradient(objective)
        operator = curvature_operator(objective, request)
        found = measure_moments(operator, **request.budget)
        return MomentsResult(moments=found, **_shared(session, operator, found, loss, g))
