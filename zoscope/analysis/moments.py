"""``zoscope.moments``: trace, norm and the largest eigenvalue of a problem's curvature matrix, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from zoscope.analysis import notices
from zoscope.analysis.density import sampling_request
from zoscope.analysis.measured import Measured, ProblemInfo
from zoscope.analysis.measuring import curvature_operator, find_jump, finite_gradient
from zoscope.analysis.optimizer_bounds import estimate_dict, number
from zoscope.analysis.request import Progress, Request, subject_of
from zoscope.analysis.results import eigenvalue_dict
from zoscope.curvature.moments import measure_moments
from zoscope.errors import NumericalError
from zoscope.problem import Notice

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoscope.curvature.jumps import Jump
    from zoscope.curvature.results import Moments
    from zoscope.problem import Objective, Problem

SCHEMA = "zoscope.moments/1"


@dataclass(frozen=True, kw_only=True)
class MomentsResult(Measured):
    """Trace, norm and λ_max of a problem's curvature matrix; the other fields are those of every `Measured` result.

    Args:
        rtol: Relative 95 % half-width asked for of the trace; of ``‖·‖_F²`` it is three times as much.
        operator: ``"hessian"`` or ``"ggn"``.
        moments: What was measured.
    """

    rtol: float
    operator: str
    moments: Moments

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.moments/1``: JSON numbers, strings and null only."""
        found = self.moments
        entry = {
            "trace": estimate_dict(found.trace),
            "frobenius_sq": estimate_dict(found.frobenius_sq),
            "lambda_max": eigenvalue_dict(found.lambda_max),
            "pieces": found.pieces,
            "num_hvps": found.num_hvps,
            "seconds": number(found.seconds),
        }
        return self.document(SCHEMA, {"rtol": self.rtol, "curvature": {self.operator: entry}})

    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""
        from zoscope.report.spectrum import render_moments

        return render_moments(self)


def moments(
    problem: Problem,
    *,
    rtol: float = 0.02,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_hvps: int = 600,
    curvature: Literal["hessian", "ggn"] = "hessian",
    micro_batch: int | None = None,
    max_memory: int | None = None,
    hvp: str = "auto",
    strict: bool = False,
    params: str | None = None,
    spec: str | None = None,
    on_progress: Progress | None = None,
) -> MomentsResult:
    """Trace, ``‖·‖_F²`` and the largest eigenvalue, at a fraction of the products that a spectrum takes.

    Where it helps, every piece of the data has probe vectors of its own: see ``zoscope.curvature.moments``.

    Args:
        problem: Model, batches and loss.
        rtol: 95 % half-width wanted of the trace, relative to it; three times as much of ``‖·‖_F²``.
        seed: Seed of the probe vectors.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        dtype: ``"auto"``, ``"float32"``, ``"float64"`` or ``"bfloat16"``; derivatives are taken in float32 at least.
        max_hvps: Most Hessian-vector products.
        curvature: The matrix: ``"hessian"`` or ``"ggn"``.
        micro_batch: Examples per forward and backward pass; the batches as they are by default.
        max_memory: Bytes that the process may hold in all.
        hvp: How products are computed.
        strict: Raise where the precision asked for is not reached.
        params: Regular expression that selects parameters by name.
        spec: Name of the problem in the result; the problem's own by default.
        on_progress: Called as ``on_progress(stage, num_hvps, precision)`` during the measurement.

    Returns:
        A result that prints itself, with the JSON document as ``to_dict()``.

    Raises:
        ValueError: If an argument is outside of its range.
        UsageError: If the curvature asked for cannot be had, or the budget is too small for an error bar.
        SpecError: If the problem cannot be measured.
        NumericalError: For values that are not finite, exhausted memory, or, with ``strict``, a precision not reached.
    """
    started = time.perf_counter()
    request = sampling_request(
        rtol=rtol,
        seed=seed,
        max_hvps=max_hvps,
        curvature=curvature,
        method="deflated-slq",
        hvp=hvp,
        strict=strict,
        on_progress=on_progress,
    )
    subject = subject_of(problem, params)
    with subject.prepare(device=device, dtype=dtype, micro_batch=micro_batch, max_memory=max_memory) as objective:
        name = spec if spec is not None else problem.name
        return _moments(objective, request, spec=name, started=started)


def _moments(objective: Objective, request: Request, *, spec: str | None, started: float) -> MomentsResult:
    loss, g = finite_gradient(objective)
    operator = curvature_operator(objective, request)
    found = measure_moments(
        operator,
        rtol=request.rtol,
        max_hvps=request.max_hvps,
        seed=request.seed,
        on_progress=request.on_progress,
    )
    flat = not bool(g.any()) and found.frobenius_sq.value == 0
    jump = find_jump(objective, seed=request.seed) if flat else None
    dtype = str(objective.dtype).removeprefix("torch.")
    norm = float(torch.linalg.vector_norm(g.double()))
    return MomentsResult(
        spec=spec,
        device=str(objective.device),
        dtype=dtype,
        seed=request.seed,
        rtol=request.rtol,
        problem=ProblemInfo(objective.num_params, objective.num_examples, loss, norm),
        operator=request.curvature,
        moments=found,
        num_hvps=operator.num_hvps,
        seconds=time.perf_counter() - started,
        warnings=notices.without_repeats(_notices(objective, request, found, jump)),
    )


def _notices(objective: Objective, request: Request, found: Moments, jump: Jump | None) -> Iterable[Notice]:
    if jump is not None:
        yield notices.jump_notice(jump)
    reached = {request.curvature: found.error}
    missed = tuple(notices.precision_notices(reached, rtol=request.rtol, max_hvps=request.max_hvps, dimension=None))
    if missed and request.strict:
        raise NumericalError(missed[0].message)
    yield from missed
    if not found.lambda_max.converged:
        yield Notice(
            "lambda-max",
            f"The largest eigenvalue did not converge: it is {found.lambda_max.value:.4g} to within "
            f"{found.lambda_max.residual:.2g}. Raise --max-hvps.",
        )
    for note in found.notes:
        yield Notice("measurement", note)
    yield from objective.warnings
