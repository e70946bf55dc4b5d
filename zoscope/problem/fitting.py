"""Cutting batches until they fit into a memory limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from zoscope import runtime
from zoscope.errors import NumericalError
from zoscope.problem.derivatives import SecondDerivativesByHand

if TYPE_CHECKING:
    from zoscope.problem.objective import Objective, Shard

SHARE = 0.45
"""Part of the memory left that one micro-batch may take; the rest is for vectors."""

OVERHEAD = 1.6
"""What a computation takes beside the tensors that it names: scratch space of kernels, and what an allocator keeps."""

FIXED = 64 * 2**20
"""Bytes that the first evaluations bring along whatever their size: code, and tables of kernels."""

TRIED = 4
"""Examples of the micro-batch that is measured; and twice as many, for the slope."""


def fit(objective: Objective, *, differentiable: bool) -> bool:
    """Cut the shards so that evaluating each, twice differentiated or not at all, respects the memory limit.

    A loss that cannot be evaluated like this is left to the checks that follow.

    Returns:
        Whether anything was cut.

    Raises:
        NumericalError: If one example does not fit.
    """
    device = objective.device
    room = SHARE * (runtime.available_memory(device) - FIXED)
    largest = max(objective.shards, key=lambda shard: shard.examples)
    rows = largest.rows or 1
    evaluate = _twice_differentiated if differentiable else _evaluated
    try:
        if objective.indivisible is not None or rows <= TRIED:
            fixed, each = OVERHEAD * _bytes(objective, largest, evaluate) / rows, 0.0
            fixed, each = (fixed * rows, 0.0) if objective.indivisible is not None else (0.0, fixed)
        else:
            few, more = (objective.cut(n)[0] for n in (TRIED, min(2 * TRIED, rows)))
            low, high = (_bytes(objective, shard, evaluate) for shard in (few, more))
            each = OVERHEAD * max(high - low, 0) / max((more.rows or 1) - (few.rows or 1), 1)
            fixed = max(OVERHEAD * low - each * (few.rows or 1), 0.0)
    except Exception:
        return False
    if fixed + each > room:
        raise NumericalError(_does_not_fit(objective, fixed + each))
    fits = rows if each == 0 else int((room - fixed) / each)
    if fits >= rows:
        return False
    objective.split(max(fits, 1))
    return True


def _bytes(objective: Objective, shard: Shard, evaluate: Callable[[Objective, Shard], None]) -> int:
    return runtime.peak_bytes(lambda: evaluate(objective, shard), objective.device)


@torch.no_grad()
def _evaluated(objective: Objective, shard: Shard) -> None:
    objective.loss(shard)


def _twice_differentiated(objective: Objective, shard: Shard) -> None:
    with SecondDerivativesByHand():
        loss = objective.loss(shard)
    grads = torch.autograd.grad(loss, objective.params, create_graph=True, allow_unused=True, materialize_grads=True)
    curved = [g.sum() for g in grads if g.requires_grad]
    if curved:
        torch.autograd.grad(torch.stack(curved).sum(), objective.params, allow_unused=True)


def _does_not_fit(objective: Objective, needed: float) -> str:
    held = runtime.held_memory(objective.device)
    least = (held + FIXED + needed / SHARE) / 2**20
    what = "one example" if objective.indivisible is None else f"a whole batch ({objective.indivisible})"
    return (
        f"--max-memory leaves no room: this process holds {held / 2**20:,.0f} MiB with torch, model and data, and "
        f"{what} takes {needed / 2**20:,.0f} MiB more. Expected at least {least:,.0f} MiB; raise it, select fewer "
        "parameters (--params), or use --curvature forward, which keeps no graph."
    )
