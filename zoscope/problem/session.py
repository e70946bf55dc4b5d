"""A prepared problem: its model on a device, its batches cut until they fit, everything put back at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoscope import runtime
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.problem import pytree as nest
from zoscope.problem.checks import check as check_objective
from zoscope.problem.data import CriterionLoss, NumberLoss
from zoscope.problem.derivatives import SecondDerivativesByHand
from zoscope.problem.model import (
    Selection,
    ShardedGroup,
    copied,
    devices_of,
    entrance,
    hooked,
    is_sharded,
    refuse_partly_sharded,
    refuse_quantised,
    refuse_ranks,
    refuse_spread,
    restored,
    select,
    some,
    trainable,
    unwrapped,
    uses_batch_statistics,
)
from zoscope.problem.objective import Objective

if TYPE_CHECKING:
    from zoscope.problem.core import Problem
    from zoscope.problem.objective import Shard

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
        whole = objective.indivisible is not None or rows <= TRIED
        _evaluated(objective, largest if whole else objective.cut(TRIED)[0])  # the first time takes a copy of the batch
        if whole:
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


_SESSIONS = threading.RLock()
"""Sessions of several threads follow each other: they set switches of the whole process, and may move one model."""

OWN_DTYPE = "own"
"""Every tensor in the dtype that it has: nothing is copied or converted."""

AUTOCAST = (
    "The loss runs under torch.autocast. Its curvature is measured without it, in float32: second derivatives through "
    "half precision carry about 1 % of noise each, which no error bar would contain."
)

HOOKS = (
    "Gradients of {} go through hooks (register_hook), which first-order training sees and zeroth-order training does "
    "not. The curvature is that of the loss, without them."
)


@dataclass(frozen=True)
class PrepareOptions:
    """The options of :meth:`zoscope.Problem.prepare`, and what a job of several processes adds to them.

    Args:
        spread: Whether the batches stay on the host: each process moves those that it evaluates.
        limited: Whether another process has a memory limit.
    """

    device: str | torch.device
    dtype: str | torch.dtype
    micro_batch: int | None
    check: bool
    differentiable: bool
    trains: bool
    max_memory: int | None
    spread: bool = False
    limited: bool = False


@contextmanager
def prepared_here(problem: Problem, options: PrepareOptions) -> Iterator[Objective]:
    """Implements :meth:`zoscope.Problem.prepare` in this process."""
    if options.micro_batch is not None and options.micro_batch < 1:
        raise UsageError(f"--micro-batch {options.micro_batch}: expected at least 1.")
    device, dtype, differentiable = options.device, options.dtype, options.differentiable
    with ExitStack() as stack:
        stack.enter_context(_SESSIONS)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(runtime.memory_limit(options.max_memory))
        ranks = runtime.joined_ranks()
        sharded = ranks is not None and not differentiable and is_sharded(problem.model)
        model = stack.enter_context(unwrapped(problem.model, sharded=sharded))
        selection = select(model, problem.params, sharded=sharded)
        own, in_parts = entrance(model), len(devices_of(model)) > 1 and not differentiable
        _refuse(model, differentiable=differentiable, ranked=ranks is not None and not sharded)
        if sharded or in_parts:
            device, dtype = own, _own_only(device, dtype)
        found = _device(problem, model, device, own)
        asked = None if dtype == OWN_DTYPE else runtime.resolve_dtype(dtype, model)
        preparation = Preparation(
            problem,
            model,
            selection,
            asked=asked,
            precision=_wide(asked, model) if differentiable and not options.trains else asked,
            options=options,
            in_parts=in_parts,
            mirrored=ranks if sharded else None,
        )
        try:
            objective = preparation.opened(stack, found)
        except SpecError as error:
            if str(device) != "auto" or found == own or "same device" not in str(error.__cause__):
                raise
            objective = preparation.opened(stack, own)
            objective.notify("device", f"The loss uses tensors that stay on {own}: measured there, not on {found}.")
        yield objective


def _refuse(model: nn.Module, *, differentiable: bool, ranked: bool) -> None:
    """Refuse a model whose parts are on several devices or processes where that cannot be."""
    if differentiable:
        refuse_spread(model)
        refuse_quantised(model)
    if ranked:
        refuse_ranks(model)


def _device(problem: Problem, model: nn.Module, device: str | torch.device, own: torch.device) -> torch.device:
    if problem.own_device_only and str(device) == "auto":
        return own
    return runtime.resolve_device(device, model=model)


@dataclass(frozen=True)
class Preparation:
    """How a problem is to be prepared, wherever that will be.

    Args:
        problem: The problem.
        model: Its model, unwrapped.
        selection: Its trained parameters.
        asked: Floating-point type asked for; ``None`` for every tensor's own.
        precision: Floating-point type of what is measured, likewise.
        options: What was asked for.
        in_parts: Whether the model is on several devices.
        mirrored: Processes that hold a slice of every parameter each.
    """

    problem: Problem
    model: nn.Module
    selection: Selection
    asked: torch.dtype | None
    precision: torch.dtype | None
    options: PrepareOptions
    in_parts: bool
    mirrored: runtime.Ranks | None

    def opened(self, stack: ExitStack, where: torch.device) -> Objective:
        """The objective on a device; what undoes it is on ``stack``."""
        options, differentiable = self.options, self.options.differentiable
        with ExitStack() as attempt:
            attempt.enter_context(runtime.preserved_rng(where))
            if differentiable and where.type == "cpu" and not (options.limited or runtime.is_limited()):
                attempt.enter_context(runtime.kept_memory())
            objective = self._objective(attempt, where)
            if self.mirrored is not None:
                _mirror(objective, self.mirrored)
            if self.asked is not None and self.asked != self.precision:
                _note_half(objective, self.asked)
            if differentiable and not options.trains:
                attempt.enter_context(runtime.without_autocast(lambda: objective.notify("autocast", AUTOCAST)))
            attempt.enter_context(runtime.threads_for(objective.num_params * objective.num_examples))
            cut = runtime.is_limited() and self.mirrored is None and fit(objective, differentiable=differentiable)
            if options.check:
                _checked(objective, differentiable=differentiable, cut=cut or options.micro_batch is not None)
            stack.push(attempt.pop_all())
        return objective

    def _objective(self, stack: ExitStack, device: torch.device) -> Objective:
        """Build an objective whose clean-up is on ``stack``."""
        problem, model, differentiable = self.problem, self.model, self.options.differentiable
        precision, selection, counts = self.precision, self.selection, problem.counts
        dtype = runtime.widest_dtype(model) if precision is None else precision
        halves = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype in runtime.HALF})
        hooks = hooked(model, selection.names)
        if not self.in_parts and _elsewhere(model, device, precision):
            model = copied(model, device=device, dtype=precision)
        else:
            stack.enter_context(restored(model, selection.names, aside=not differentiable))
        params = stack.enter_context(trainable(model, selection, gradients=differentiable))
        stack.enter_context(runtime.second_order_mode(model) if differentiable else runtime.full_precision())
        criterion, loss = problem.criterion, problem.loss
        if isinstance(criterion, nn.Module):
            weights = [b for b in criterion.buffers() if b.is_floating_point()]  # class weights are buffers
            if any(precision not in (None, b.dtype) for b in weights) or _elsewhere(criterion, device, precision):
                criterion = copied(criterion, device=device, dtype=precision)
                loss = CriterionLoss(criterion)
        # Forward passes share directions, not examples.
        spread = self.options.spread and differentiable and device.type != "cpu"
        batches, on_host = _placed(problem.batches, torch.device("cpu") if spread else device, precision)
        objective = Objective(
            model,
            loss=loss if differentiable else NumberLoss(loss),
            criterion=criterion,
            params=dict(zip(selection.names, params, strict=True)),
            batches=batches,
            counts=counts,
            batch_size_of=problem.batch_size_of,
            device=device,
            dtype=dtype,
        )
        objective.metrics = problem.metrics
        objective.warnings.extend(problem.notices)
        objective.on_host, objective.batch_dtype = on_host or spread, precision
        _note_precision(objective, halves, on_host, converted=precision is not None)
        if differentiable and hooks:
            objective.notify("gradient-hooks", HOOKS.format(some(hooks)))
        _note_sizes(objective)
        statistics = [f"{type(m).__name__} '{n}'" for n, m in model.named_modules() if uses_batch_statistics(m)]
        if self.options.micro_batch is not None:
            objective.split(self.options.micro_batch)
        if statistics:
            objective.indivisible = f"{some(statistics)} uses the statistics of the whole batch"
        return objective


def _wide(dtype: torch.dtype | None, model: nn.Module) -> torch.dtype | None:
    """The dtype that second derivatives are taken in: float32 where the one asked for is coarser."""
    if dtype is None and any(p.dtype in runtime.HALF for p in model.parameters()):
        return runtime.resolve_dtype("auto", model)
    return torch.float32 if dtype in runtime.HALF else dtype


def _own_only(device: str | torch.device, dtype: str | torch.dtype) -> str:
    if str(device) != "auto" or dtype != OWN_DTYPE:
        raise UsageError(
            "A model whose parts are on several devices is measured where they are and as they are: leave --device and "
            "--dtype out."
        )
    return OWN_DTYPE


def _mirror(objective: Objective, ranks: runtime.Ranks) -> None:
    """Let an objective be about the parts of its parameters that are on this rank."""
    refuse_partly_sharded(objective.names, objective.params, ranks.size)
    objective.own_parts()
    objective.process_group = ShardedGroup(ranks, objective)


def _elsewhere(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether a module must be copied: other device or dtype, or tensors that cannot be differentiated."""
    parameters, buffers = list(module.parameters()), list(module.buffers())
    return (
        any(p.is_floating_point() and dtype not in (None, p.dtype) for p in parameters)
        or any(t.device != device for t in (*parameters, *buffers))
        or any(t.is_inference() for t in (*parameters, *buffers))
    )


def _placed(batches: list[Any], device: torch.device, dtype: torch.dtype | None) -> tuple[list[Any], bool]:
    """Batches on the device, or on the host where the device has no room for all of them."""
    try:
        return [nest.moved(batch, device=device, dtype=dtype) for batch in batches], False
    except RuntimeError as error:
        if device.type == "cpu" or not runtime.is_out_of_memory(error):
            raise
        runtime.release_memory(device)
        host = torch.device("cpu")
        return [nest.moved(batch, device=host, dtype=dtype) for batch in batches], True


def _note_precision(objective: Objective, halves: list[str], on_host: bool, *, converted: bool) -> None:
    if on_host:
        objective.notify(
            "host-batches", f"The batches do not fit on {objective.device}; they move there one at a time, slowly."
        )
    name = str(objective.dtype).removeprefix("torch.")
    if halves and converted and objective.dtype not in runtime.HALF:
        objective.notify("upcast", f"The model is in {', '.join(halves)}; a copy in {name} is measured.")


def _note_half(objective: Objective, asked: torch.dtype) -> None:
    asked_name, name = (str(dtype).removeprefix("torch.") for dtype in (asked, objective.dtype))
    objective.notify(
        "half-precision",
        f"Second derivatives are not taken in {asked_name}, in which every product carries about 1 % of noise: they "
        f"are measured in {name}.",
    )
    objective.warnings[:] = [notice for notice in objective.warnings if notice.code != "upcast"]  # the same once more


def _note_sizes(objective: Objective) -> None:
    """Say which batches count as one example because nothing in them tells how many they hold."""
    unknown = [shard.batch for shard in objective.shards if shard.rows is None and shard.batch is not None]
    if objective.batch_size_of is None and unknown:
        which = "The batch" if len(objective.shards) == 1 else f"{len(unknown)} of {len(objective.shards)} batches"
        objective.notify(
            "unknown-batch-size",
            f"{which} (of type {type(unknown[0]).__name__}) {'has' if len(unknown) == 1 else 'have'} no tensor with "
            "one row per example: each counts as one example, whatever it holds. Say how many with batch_size_of=.",
        )


def _checked(objective: Objective, *, differentiable: bool, cut: bool) -> None:
    """Run the checks, with smaller micro-batches if memory runs out."""
    while True:
        try:
            return check_objective(objective, differentiable=differentiable, cut=cut)
        except Exception as error:
            if not runtime.is_out_of_memory(error):
                raise
            reason = objective.indivisible or "a single example does not fit"
        runtime.release_memory(objective.device)
        if not objective.refine():
            raise NumericalError(
                f"Memory on {objective.device} ran out while the loss was evaluated, and the batches cannot be made "
                f"smaller: {reason}. Use a smaller model or batch, --dtype bfloat16, or a device with more memory."
            )
        cut = True
