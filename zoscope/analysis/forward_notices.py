"""What to know before trusting numbers from forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from zoscope.analysis.notices import jump_notice
from zoscope.curvature.forward import ROUGH
from zoscope.problem import Notice

if TYPE_CHECKING:
    from zoscope.analysis.optimizer_bounds import OptimizerBounds
    from zoscope.analysis.request import Request
    from zoscope.curvature.results import ForwardCurvature
    from zoscope.problem import Objective

DISAGREEMENT = ROUGH
"""Relative error of the trace from truncation and rounding from which the reader is told."""

BATCHES = 5.0
"""Precision wanted of what mini-batches add, in units of that of the rest: it takes thousands of directions to know
``‖g‖²`` alone to a few percent."""

KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Hardswish, nn.MaxPool1d, nn.MaxPool2d)
"""Layers whose slope jumps."""


def precision(reached: float, of_batches: float, request: Request, found: ForwardCurvature) -> Notice | None:
    """On a precision asked for and not reached.

    Args:
        reached: Relative half-width of the descent threshold.
        of_batches: That of mini-batches, in units of what is wanted of it; 0 without.
        request: What is asked.
        found: What was measured.
    """
    if max(reached, of_batches) <= request.rtol:
        return None
    worst, whose, wanted = reached, "the descent threshold", ""
    if of_batches > reached:
        worst, whose = BATCHES * of_batches, "the descent threshold of mini-batches"
        wanted = f", of which {BATCHES:g} times as much would do"
    value = f"± {100 * worst:.1f} %" if math.isfinite(worst) else "no finite error bar"
    return Notice(
        "precision",
        f"The precision asked for (--rtol {request.rtol:g}) was not reached: {value} on {whose}{wanted}, after "
        f"{found.num_hvps} directions of {request.max_hvps} at most. The intervals shown are honest, only wider; raise "
        "--max-hvps or --rtol.",
    )


def of(
    found: ForwardCurvature, request: Request, objective: Objective, rows: Mapping[str, OptimizerBounds]
) -> Iterable[Notice]:
    """Everything else."""
    yield Notice(
        "forward-only",
        "Forward passes see Tr H and ‖H‖_F² but no spectrum: the lower bound assumes H ⪰ 0, the upper bound and the "
        "descent threshold assume nothing. First-order bounds, λ_max and η*(N) need --curvature hessian.",
    )
    if found.indefinite or (found.rayleigh is not None and found.rayleigh.interval[1] < 0):
        yield Notice(
            "indefinite-hessian",
            "Negative curvature was seen along a direction, so H is indefinite and the lower bounds do not hold.",
        )
    if found.trace.value <= 0:
        yield Notice(
            "trace-not-positive",
            "Tr H is not positive here, so two moments bound no mean-square threshold. Use --curvature hessian.",
        )
    yield from _of_batches(rows)
    yield from _differences(found, objective)
    if "adam" in rows:
        yield Notice(
            "adam-forward",
            "Adam's preconditioner is taken as √b‖g‖ + ε for every parameter, which its expected value is up to the "
            "share of a single parameter in the gradient.",
        )
    elif "adam" in request.optimizers:
        yield Notice(
            "adam-forward",
            "Adam is left out: its bounds with a stored preconditioner need --curvature hessian.",
        )
    for note in found.notes:
        yield Notice("measurement", note)


def _of_batches(rows: Mapping[str, OptimizerBounds]) -> Iterable[Notice]:
    row = next(iter(rows.values()))
    found = None if row.forward is None else row.forward.minibatch
    if found is None:
        return
    yield Notice(
        "forward-minibatch",
        f"Of mini-batches of {found.batch_size:,} of {found.examples:,} examples forward passes know how much "
        "gradients and Hessians spread, not along which eigenvectors. The descent threshold is that of mini-batches; "
        "the threshold of the mean square is only known to lie between a lower bound, which the recommendation goes by "
        "and which may be far too low, and an upper one. --curvature hessian knows it, and zoscope probe --batch-size "
        "tries.",
    )


def _differences(found: ForwardCurvature, objective: Objective) -> Iterable[Notice]:
    if found.jump is not None:
        yield jump_notice(found.jump)
    elif found.disagreement > DISAGREEMENT:
        percent = 100 * found.disagreement
        size = f"{percent:.0f} % of the trace" if math.isfinite(percent) else "more than the trace"
        yield Notice(
            "step-size-check",
            f"Differences with steps of h/2 and h (h = {found.step:.2g}) disagree along single directions by about "
            f"{size}. The error bars are as wide as that; where the loss bends on a scale far below h, the Hessian may "
            "lie outside. The loss is rounded too coarsely, has kinks, or is smooth over short distances only: a loss "
            "that ends in float32 (logits.float()) or a wider --dtype lets steps be shorter.",
        )
    kinked = {type(module).__name__ for module in objective.model.modules() if isinstance(module, KINKED)}
    if kinked:
        yield Notice(
            "kinks",
            f"The model has layers with kinks ({', '.join(sorted(kinked))}). Forward passes measure the mean curvature "
            f"over steps of h = {found.step:.2g} along random directions, with the kinks crossed on the way, as a "
            "zeroth-order run with a smoothing radius of that size does. It depends on h; --curvature hessian sees no "
            "kinks and may give less or more.",
        )
