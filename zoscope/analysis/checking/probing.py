"""The short training probe that a policy may ask for: does a real run at the configured step size agree?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoscope.analysis.checking.results import CheckResult

if TYPE_CHECKING:
    from zoscope.analysis.checking.measure import Workbench
    from zoscope.config.model import CheckConfig
    from zoscope.problem import Problem

MOST_STEPS = 1000
MOST_SECONDS = 60.0
REPLICAS = 4
PRECISION = 0.1
"""Relative precision of the probe's own measurement: the threshold is known already."""

UNSTABLE = ("diverged", "sharpened")


def with_probe(result: CheckResult, config: CheckConfig, bench: Workbench) -> CheckResult:
    """The result with a probe at the configured step size; a run that leaves the valley turns pass and warn into fail.

    A run whose mean loss rises, or that cannot tell, warns: it is no proof that training diverges.

    Args:
        result: What the gate says.
        config: The check.
        bench: Where its problem is, and the cache.
    """
    if result.threshold is None:
        return result
    value = result.threshold.value if result.threshold.edge is None else result.threshold.edge
    if math.isinf(value):
        return result  # nothing limits the step size, so there is nothing to see
    run = bench.recall(config, probe_options(config, value), _run)
    verdict = str(run["verdict"])
    left = f"{run['diverged']} of {run['replicas']} replicas left"
    message = f"{result.message} A probe of {run['steps_done']} steps ({left}): {verdict}; {run['reason']}."
    changed = replace(result, probe=run, message=message)
    if verdict in UNSTABLE:
        return replace(changed, status="fail", exit_code=1)
    if verdict in ("stable", "falls") or result.status != "pass":
        return changed
    if config.policy.on_warn == "fail":
        return replace(changed, status="fail", exit_code=1)
    return replace(changed, status="warn")


def probe_options(config: CheckConfig, threshold: float) -> dict[str, Any]:
    """Keyword arguments of ``probe`` for a check."""
    curvature, optimizer, estimator = config.curvature, config.optimizer, config.estimator
    options: dict[str, Any] = {
        "optimizer": optimizer.name,
        "lr": optimizer.lr,
        "assume_threshold": threshold,
        "threshold": config.policy.threshold,
        "steps": min(config.steps, MOST_STEPS),
        "max_seconds": MOST_SECONDS,
        "replicas": REPLICAS if optimizer.zeroth_order else 1,
        "mu": estimator.mu,
        "directions": estimator.directions,
        "queries": estimator.queries,
        "beta": optimizer.beta,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "rtol": max(curvature.rtol, PRECISION),
        "seed": curvature.seed,
        "device": curvature.device,
        "dtype": curvature.dtype,
        "max_hvps": curvature.max_hvps,
        "curvature": curvature.kind,
        "method": curvature.method,
        "hvp": curvature.hvp,
        "preconditioner": curvature.preconditioner,
        "micro_batch": curvature.micro_batch,
        "max_memory": curvature.max_memory,
    }
    if optimizer.zeroth_order and estimator.batch_size is not None:
        options["batch_size"] = estimator.batch_size
    return options


def _run(problem: Problem, options: Mapping[str, Any]) -> dict[str, Any]:
    """The run at the step size; for Adam the one whose P adapts, as in training."""
    from zoscope.analysis.probe import probe

    return probe(problem, **options).runs[-1].to_dict()
