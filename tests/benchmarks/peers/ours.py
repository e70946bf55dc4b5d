"""zoscope's side of the comparison, and the long measurement that both sides are judged by."""

from dataclasses import dataclass

import numpy as np

import zoscope
from zoscope.curvature.moments import measure_moments
from zoscope.curvature.operators import HessianOperator
from zoscope.curvature.slq import NORM, Curvature, Moments, measure
from zoscope.theory.spectrum import SampledSpectrum

from . import clock
from .budgets import FROBENIUS, LAMBDA_MAX, THRESHOLD, TRACE
from .standin import STEPS, conditions
from .workloads import Workload

REFERENCE = 0.004
"""Half-width wanted of the reference, of thresholds and moments alike."""


@dataclass(frozen=True)
class Run:
    """What one measurement took and found, and whether its own intervals are as narrow as they were to be."""

    seconds: float
    products: int
    values: dict[str, float]
    reached: bool = True


def moments_error(sampled: SampledSpectrum) -> float:
    """95 % half-widths of trace and ‖H‖_F² in units of what is wanted of them: 1 where both are met."""
    trace, squared = sampled.trace_of(lambda x: x), sampled.trace_of(np.square)
    return max(trace.half_width / abs(trace.value) / TRACE, squared.half_width / squared.value / FROBENIUS)


def moments(workload: Workload, *, seed: int, most: int) -> Run:
    """λ_max, trace and ‖H‖_F² to the targets, within ``most`` products."""
    assert LAMBDA_MAX == 0.01  # what a converged eigenvalue is
    assert FROBENIUS == NORM * TRACE
    started = clock.now()
    with workload.problem.prepare(device=str(workload.device), dtype="float32") as objective:
        found = measure_moments(HessianOperator(objective), rtol=TRACE, max_hvps=most, seed=seed)
    values = {
        "lambda_max": found.lambda_max.value,
        "trace": found.trace.value,
        "frobenius_sq": found.frobenius_sq.value,
    }
    return Run(clock.now() - started, found.num_hvps, values, reached=found.error <= TRACE)


def bounds(workload: Workload, *, seed: int, most: int) -> Run:
    """η*(1000) and the infinite-time threshold of GD and GDM to the target, with their intervals, within ``most``."""
    started = clock.now()
    result = zoscope.bounds(
        workload.problem,
        optimizers=("gd", "gdm"),
        steps=STEPS,
        threshold="exact",
        rtol=THRESHOLD,
        max_hvps=most,
        dtype="float32",
        device=str(workload.device),
        method="deflated-slq",
        seed=seed,
    )
    seconds = clock.now() - started
    values = {}
    for name, row in result.optimizers.items():
        values |= {
            f"{name} full": row.horizon.lower,
            f"{name} positive": row.horizon.upper,
            f"{name} infinite": row.exact.value,
        }
    return Run(seconds, result.num_hvps, values, reached=all(w.code != "precision" for w in result.warnings))


def reference(workload: Workload, *, seed: int, most: int) -> Curvature:
    """A measurement several times as precise as the targets; all eigenvalues where there are few."""

    def error(sampled: SampledSpectrum) -> float:
        if sampled.is_exact:
            return 0.0
        estimates = [condition.estimate(sampled) for condition in conditions().values()]
        widths = [estimate.half_width / estimate.value for estimate in estimates]
        return max(*widths, TRACE * moments_error(sampled))

    with workload.problem.prepare(device=str(workload.device), dtype="float32") as objective:
        operator = HessianOperator(objective)
        method = "dense" if workload.dim <= 4096 else "deflated-slq"
        return measure(
            operator, method=method, precision=error, most_steps=200, rtol=REFERENCE, max_hvps=most, seed=seed
        )


def reference_moments(workload: Workload, *, seed: int, most: int) -> Moments:
    """The trace, to the same half-width."""
    with workload.problem.prepare(device=str(workload.device), dtype="float32") as objective:
        return measure_moments(HessianOperator(objective), rtol=REFERENCE, max_hvps=most, seed=seed)
