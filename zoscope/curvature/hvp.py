"""Hessian-vector products of one shard, by the methods that torch offers.

``double-backward`` keeps the graph of the gradient: every vector shares the forward and the first backward sweep, and
adds one more backward sweep of its own. ``batched`` does the same with the vectors under vmap, for devices that are
idle between small kernels. ``forward-over-reverse`` needs no second backward pass, for operations that lack one.
``linearize`` records its linear part once, which takes seconds and memory.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, jvp, linearize
from torch.nn import _reduction, functional
from torch.overrides import TorchFunctionMode

from zoscope.problem import Objective, SecondDerivativesByHand, Shard

HvpMethod = Literal["double-backward", "batched", "forward-over-reverse", "linearize"]
METHODS: tuple[HvpMethod, ...] = ("double-backward", "batched", "forward-over-reverse", "linearize")

Products = Callable[[Tensor], Tensor]
"""From vectors ``(k, d)`` to products ``(k, d)``."""


def shard_products(objective: Objective, shard: Shard, *, method: HvpMethod) -> Products:
    """Prepare products with the Hessian of one shard's mean loss.

    Args:
        objective: The prepared problem.
        shard: One of its shards.
        method: One of ``METHODS``.

    Returns:
        A function from vectors to products; it keeps the shard's graph alive.
    """
    if method == "forward-over-reverse":
        return lambda vectors: _forward_over_reverse(objective, shard, vectors)
    if method == "linearize":
        return _linearized(objective, shard)
    params = objective.params
    # What runs under vmap has to be PyTorch's own.
    with nullcontext() if method == "batched" else SecondDerivativesByHand():
        loss = objective.loss(shard)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    curved = [i for i, g in enumerate(grads) if g.requires_grad]
    _require_constant(objective, shard, {i: g for i, g in enumerate(grads) if not g.requires_grad})
    multiply = _batched if method == "batched" else _looped
    return lambda vectors: multiply(objective, [grads[i] for i in curved], curved, vectors)


def _require_constant(objective: Objective, shard: Shard, claimed: dict[int, Tensor]) -> None:
    """See that derivatives which torch calls constant are: a custom function without second derivative looks alike.

    Raises:
        RuntimeError: In torch's words, if one changes when the parameters move.
    """
    if not claimed:
        return
    point = [p.detach() for p in objective.params]
    moved = [(p + 1e-2 * (p.abs() + p.abs().mean())).requires_grad_() for p in point]
    elsewhere = torch.autograd.grad(
        objective.loss_at(moved, shard), [moved[i] for i in claimed], allow_unused=True, materialize_grads=True
    )
    for here, there in zip(claimed.values(), elsewhere, strict=True):
        if not torch.allclose(here, there, rtol=1e-3, atol=1e-5 * float(here.abs().max()) + 1e-12):
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def _looped(objective: Objective, grads: Sequence[Tensor], curved: Sequence[int], vectors: Tensor) -> Tensor:
    result = torch.zeros_like(vectors)
    if not grads:
        return result
    for vector, row in zip(vectors, result, strict=True):
        parts = objective.unflatten(vector)
        # The gradient of gᵀv rather than grad_outputs=v, for which torch imports its symbolic algebra: half a second.
        along = [g.flatten().dot(parts[i].flatten()) for g, i in zip(grads, curved, strict=True)]
        columns = torch.autograd.grad(torch.stack(along).sum(), objective.params, retain_graph=True, allow_unused=True)
        objective.flatten(columns, out=row)
    return result


def _batched(objective: Objective, grads: Sequence[Tensor], curved: Sequence[int], vectors: Tensor) -> Tensor:
    if not grads:
        return torch.zeros_like(vectors)
    sizes = [p.numel() for p in objective.params]
    parts = [
        part.view(len(vectors), *p.shape)
        for part, p in zip(torch.split(vectors, sizes, dim=1), objective.params, strict=True)
    ]
    columns = torch.autograd.grad(
        grads,
        objective.params,
        [parts[i] for i in curved],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    return torch.cat(
        [
            torch.zeros(len(vectors), size, dtype=vectors.dtype, device=vectors.device)
            if column is None
            else column.reshape(len(vectors), size)
            for column, size in zip(columns, sizes, strict=True)
        ],
        dim=1,
    )


def _forward_over_reverse(objective: Objective, shard: Shard, vectors: Tensor) -> Tensor:
    point = tuple(p.detach() for p in objective.params)
    gradient = grad(lambda tensors: objective.loss_at(tensors, shard))
    result = torch.empty_like(vectors)
    for vector, row in zip(vectors, result, strict=True):
        derivatives = jvp(gradient, (point,), (objective.unflatten(vector),))
        objective.flatten(derivatives[1], out=row)
    return result


def _linearized(objective: Objective, shard: Shard) -> Products:
    point = tuple(p.detach() for p in objective.params)
    gradient = grad(lambda tensors: objective.loss_at(tensors, shard))
    with warnings.catch_warnings(), _SquaredErrorByHand():
        warnings.simplefilter("ignore")  # about the tracing; the loss itself has warned before
        _, derivative = linearize(gradient, point)

    @torch.no_grad()
    def multiply(vectors: Tensor) -> Tensor:
        result = torch.empty_like(vectors)
        for vector, row in zip(vectors, result, strict=True):
            objective.flatten(derivative(objective.unflatten(vector)), out=row)
        return result

    return multiply


class _SquaredErrorByHand(TorchFunctionMode):
    """``mse_loss`` as a difference that is squared: torch 2.13 crashes, without an exception, when it linearizes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.mse_loss:
            return _squared_error(*args, **kwargs)
        if func is torch._C._nn.mse_loss:
            return _reduced(args[0], args[1], *args[2:], **kwargs)
        return func(*args, **kwargs)


def _squared_error(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:  # an older way to say it
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is None:
        return _reduced(input, target, {"none": 0, "mean": 1, "sum": 2}[reduction])
    each = weight * (input - target).square()
    return (
        each if reduction == "none" else each.sum() if reduction == "sum" else each.sum() / weight.expand_as(each).sum()
    )


def _reduced(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    each = (input - target).square()
    return (each, each.mean(), each.sum())[reduction] if reduction else each
