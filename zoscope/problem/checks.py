"""Checks on entry: is the loss a finite, differentiable, deterministic mean over examples?"""

import inspect
import math
import numbers
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoscope import runtime
from zoscope.errors import NumericalError, SpecError
from zoscope.problem import pytree as nest
from zoscope.problem.data import examples_in, user_code, written_at
from zoscope.problem.model import ActiveLayers, local, some, uses_batch_statistics, watched
from zoscope.problem.objective import Objective, Shard
from zoscope.runtime import autograd_errors as graph

# Two evaluations of one loss may differ by the order of sums, never by more; randomness shows far above this.
_AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-5}
_MEAN_RTOL = 1e-3  # a mean over examples, or not: rounding stays far below, padding or class weights show above
_MEAN_LIMIT = 0.05  # beyond this, cutting a batch measures another function
LARGEST = 1e50  # losses and gradients: the fourth powers of curvatures, of which error bars are made, stay numbers
IGNORED = -100
"""Label that the losses of torch leave out."""

_SHAPES = (
    r"shapes? .*(multipl|broadcast|mismatch|invalid)|size mismatch|must match the size|batch_size .*match"
    r"|expected input.* to have"
)
"""How torch says that two shapes do not fit."""


def check(objective: Objective, *, differentiable: bool, cut: bool) -> None:
    """Refuse what cannot be measured, and note what a reader should know.

    Args:
        objective: Its shards are evaluated: the first one three times at most, the others once.
        differentiable: Whether derivatives will be taken.
        cut: Whether batches were cut into micro-batches.

    Raises:
        SpecError: For a loss that is no scalar, has no gradient, is random, or ties the examples of shards together.
        NumericalError: For a loss or a gradient that is not finite.
    """
    # So that two evaluations agree, and what is in half precision is so by itself.
    with runtime.without_autocast() if differentiable else nullcontext():
        _check(objective, differentiable=differentiable, cut=cut)


def _check(objective: Objective, *, differentiable: bool, cut: bool) -> None:
    first = objective.shards[0]
    before = runtime.rng_fingerprint()
    narrow = _Narrowings()
    with (
        watched(objective.model) as active,
        torch.set_grad_enabled(differentiable),
        graph.checkpoint_warnings() as detached,
        narrow,
    ):
        loss = _evaluated(objective, first, 0)
    drew = runtime.rng_fingerprint() != before
    _refuse_batch_statistics(objective, active)
    value = _finite(loss, 0, objective)
    if differentiable:
        if detached:
            raise SpecError(graph.REENTRANT)
        if objective.dtype not in runtime.HALF:
            _refuse_half(narrow)
        _check_gradient(objective, loss)
    del loss
    again = _check_all(objective)
    if differentiable and not _agree(objective, value, again) and not objective.differentiates:
        # Some losses are others where gradients are off: training has them on.
        objective.differentiates = True
        again = _check_all(objective)
    _refuse_random(objective, value, again, active, drew)
    _check_mean(objective, value, cut=cut)


class _Narrowings(TorchFunctionMode):
    """Notices which operation first gives a result in half precision that will be differentiated."""

    first: tuple[str, str] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.first is None and isinstance(found, Tensor) and found.dtype in runtime.HALF and found.requires_grad:
            self.first = getattr(func, "__name__", str(func)), str(found.dtype).removeprefix("torch.")
        return found


def _refuse_half(narrow: _Narrowings) -> None:
    if narrow.first is None:
        return
    name, dtype = narrow.first
    raise SpecError(
        f"The loss computes in {dtype} though the parameters are wider (first in {name}()), so its derivatives would "
        "carry about 1 % of noise: expected float32 or float64 all through. Follow the dtype of the parameters in "
        "place of a fixed one, as x.to(weight.dtype) does, or use --curvature forward, which takes the loss as it is."
    )


def _evaluated(objective: Objective, shard: Shard, index: int) -> Tensor:
    which = f" on batch {index} of {len(objective.shards)}" if len(objective.shards) > 1 else ""
    with user_code(f"The loss function{which}", remedy=lambda error: _remedy(objective, shard, error)):
        return _scalar(objective.loss(shard), written_at(objective.loss_function))


def _remedy(objective: Objective, shard: Shard, error: BaseException) -> str:
    """What to do about an error that the user's loss raised, from what it was called with."""
    loss, batch, text = objective.loss_function, shard.batch, str(error)
    seen = nest.outlined(batch)
    if isinstance(loss, nn.modules.loss._Loss):
        name = type(loss).__name__
        return (
            f"{name} compares outputs with targets, and loss is called as loss(model, batch): use "
            f"zoscope.Problem.from_criterion(model, batches, nn.{name}())."
        )
    if isinstance(error, (TypeError, AttributeError)) and (kinds := _no_tensors(batch)):
        return (
            f"The batch is {seen}: it holds {kinds} where a tensor is needed. Turn {kinds} into tensors where the "
            "batches are made, with a tokenizer or torch.as_tensor."
        )
    shards = objective.shards
    if isinstance(error, ValueError) and len(shards) == 2 and all(isinstance(s.batch, Tensor) for s in shards):
        return (
            f"The batch is {seen}: a list of two tensors is read as two batches. For inputs and targets pass the tuple "
            "(inputs, targets), or the list [(inputs, targets)]."
        )
    if re.search(_SHAPES, text, re.IGNORECASE | re.DOTALL):
        names = zip(objective.names, objective.params, strict=True)
        first = next((f" '{name}' of the model is {nest.outlined(p)}." for name, p in names if p.ndim > 1), "")
        return (
            f"Shapes do not fit: the batch is {seen}.{first} Print the shapes on that line, and mend the data or the "
            "line."
        )
    return (
        f"The loss is called as loss(model, batch), here with a {type(objective.model).__name__} and {seen}, and "
        "returns a scalar tensor."
    )


def _no_tensors(batch: Any) -> str:
    """What a batch holds that layers do not take, in words; empty where there is nothing."""
    leaves = list(nest.leaves(batch))
    kinds = {
        "text": any(isinstance(x, str) for x in leaves),
        "NumPy arrays": any(isinstance(x, np.ndarray) for x in leaves),
    }
    return " and ".join(kind for kind, there in kinds.items() if there)


def _scalar(loss: Any, place: str) -> Tensor:
    """The loss, which has to be a scalar tensor; ``place`` is where the user's function is written."""
    if not isinstance(loss, Tensor):
        said = f"{'an' if isinstance(loss, numbers.Integral) else 'a'} {type(loss).__name__}"
        remedy = "return the tensor itself, without .item() or float()"
        if inspect.iscoroutine(loss) or inspect.isgenerator(loss):
            loss.close()
            remedy = "write def in place of async def, and return in place of yield"
        if isinstance(loss, float):
            remedy += ", or use --curvature forward, which takes numbers"
        elif isinstance(loss, numbers.Integral):
            remedy += "; with --curvature forward a float, since a count has no curvature"
        elif isinstance(loss, np.ndarray):
            said += f" of shape {loss.shape}"
            remedy = "end with .item(), which --curvature forward takes"
        if isinstance(getattr(loss, "loss", None), Tensor):
            remedy = "return its .loss"
        elif isinstance(loss, (tuple, list, Mapping)):
            said, remedy = f"{said} {nest.outlined(loss)}", _of_several(loss)
        elif loss is None:
            said, remedy = "None", "end the function with a return statement"
        raise SpecError(f"The loss function{place} returned {said}: expected a scalar torch.Tensor; {remedy}.")
    if not loss.is_floating_point():
        raise SpecError(
            f"The loss{place} is a tensor of dtype {str(loss.dtype).removeprefix('torch.')}: expected a floating-point "
            "scalar, since others have no derivative (argmax, counts and accuracies do not)."
        )
    if loss.ndim != 0:
        raise SpecError(
            f"The loss{place} has shape {tuple(loss.shape)}: expected a scalar, the mean over the batch. Use "
            "reduction='mean', or end with .mean()."
        )
    return loss


def _of_several(found: Any) -> str:
    """Which item of what a loss function returned is the loss, as the end of a sentence."""
    items = list(found.items() if isinstance(found, Mapping) else enumerate(found))
    scalars = [key for key, item in items if isinstance(item, Tensor) and item.ndim == 0]
    key = "loss" if "loss" in scalars else scalars[0] if scalars else None
    return "return the loss alone" if key is None else f"return the loss alone, its item [{key!r}]"


def _finite(loss: Tensor, index: int, objective: Objective) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        which = f" on batch {index} of {len(objective.shards)}" if len(objective.shards) > 1 else ""
        half = " float16 overflows above 65,504: use --dtype float32." if objective.dtype == torch.float16 else ""
        raise NumericalError(
            f"The loss is {value}{which} at the given parameters: expected a finite number. "
            f"{_not_finite(objective, objective.shards[index])}{half}"
        )
    if abs(value) > LARGEST:
        raise NumericalError(
            f"The loss is {value:.3g} at the given parameters: expected less than {LARGEST:g}, since the squares of "
            "curvatures have to be numbers too. Scale the loss; step sizes then scale by the inverse."
        )
    return value


def _not_finite(objective: Objective, shard: Shard) -> str:
    """What is known of where a loss that is no number comes from."""
    model = objective.model  # whose buffers may hold masks of -inf
    bad = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(local(tensor)).all())]
    bad += [name for name, tensor in model.named_buffers() if bool(torch.isnan(local(tensor)).any())]
    if bad:
        return f"The model holds NaN or infinity in {some(bad)}: look at the checkpoint, or at the training before."
    tensors = [leaf for leaf in nest.leaves(shard.batch) if isinstance(leaf, Tensor)]
    leaves = [part for tensor in tensors for part in (tensor.unbind() if tensor.is_nested else [tensor])]
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        return "This batch holds NaN or infinity: clean the data, if it is no mask."
    labels = [tensor for tensor in tensors if tensor.dtype == torch.int64 and not tensor.is_nested and tensor.numel()]
    if any(bool((tensor == IGNORED).all()) for tensor in labels):
        return (
            f"Every label of this batch is {IGNORED}, which losses ignore: their mean is over nothing. Leave the batch "
            "out, or look at how labels are masked and texts are cut off."
        )
    return "Parameters and data are finite: look at logarithms and divisions in the loss."


def _check_gradient(objective: Objective, loss: Tensor) -> None:
    if loss.grad_fn is None:
        raise SpecError(
            f"The loss{written_at(objective.loss_function)} has no gradient: it does not depend on any parameter that "
            "is varied. Likely causes: "
            "torch.no_grad(), .detach(), .item() or argmax on the way, a model other than the one that loss(model, "
            "batch) receives, or --params that select unused parameters."
        )
    with user_code("Differentiating the loss", remedy="Every operation in it needs a derivative."):
        grads = torch.autograd.grad(loss, objective.params, create_graph=True, allow_unused=True)
    unused = [name for name, grad in zip(objective.names, grads, strict=True) if grad is None]
    if unused and graph.hides_parameters(loss):
        raise SpecError(graph.REENTRANT)
    if graph.lacks_second_derivatives(grads):
        raise SpecError(graph.ONCE_DIFFERENTIABLE)
    if len(unused) == len(grads):
        raise SpecError(
            f"The loss depends on none of the {len(grads)} selected parameter tensors ({some(unused)}). It must use "
            "the model that loss(model, batch) receives, which may be a copy; or select others with --params."
        )
    if unused:
        scalars = sum(p.numel() for p, g in zip(objective.params, grads, strict=True) if g is None)
        objective.notify(
            "unused-parameters",
            f"{len(unused)} of {len(grads)} parameter tensors ({scalars:,} of {objective.num_params:,} numbers: "
            f"{some(unused)}) have no effect on the first batch's loss; their curvature counts as zero.",
        )
    pairs = zip(objective.names, grads, strict=True)
    bad = [n for n, g in pairs if g is not None and g.numel() and not float(g.detach().abs().max()) < LARGEST]
    if bad:
        raise NumericalError(
            f"The loss is finite but its gradient is not, for {some(bad)}: expected numbers below {LARGEST:g}. Typical "
            "causes are sqrt, norm or log at zero; add a small constant inside."
        )


def _check_all(objective: Objective) -> float:
    """Evaluate every shard without gradients; the value of the first one."""
    values = []
    with torch.no_grad():
        for index, shard in enumerate(objective.shards):
            values.append(_finite(_evaluated(objective, shard, index), index, objective))
    return values[0]


def _agree(objective: Objective, a: float, b: float) -> bool:
    return a == b or abs(a - b) <= _AGREEMENT.get(objective.dtype, 2e-2) * max(abs(a), abs(b))


def _refuse_random(objective: Objective, a: float, b: float, active: ActiveLayers, drew: bool) -> None:
    if _agree(objective, a, b):
        return
    if active.random:
        cause = f"{some(list(active.random.values()))} is active in train mode"
        remedy = "Call model.eval() in the spec, or set its probability to 0"
    elif any(module.training for module in objective.model.modules()) and drew:
        cause = "it draws random numbers while the model is in train mode, as a functional dropout does"
        remedy = "Call model.eval() in the spec, or pass training=self.training to F.dropout"
    elif drew:
        cause = "it draws random numbers (noise, sampling, an augmentation, F.dropout without training=self.training)"
        remedy = "Draw them once, outside of the loss, and put them into the batches"
    else:
        cause = "it keeps state from one call to the next, or has its own source of randomness"
        remedy = "Make it a function of the model and the batch alone; model.eval() stops layers that update themselves"
    raise SpecError(
        f"Two evaluations of the loss{written_at(objective.loss_function)} on one batch gave {a:.9g} and {b:.9g}, so "
        f"it is not a function that has a curvature: {cause}. {remedy}."
    )


def _refuse_batch_statistics(objective: Objective, active: ActiveLayers) -> None:
    if not active.batch_statistics:
        return
    layers = some(list(active.batch_statistics.values()))
    objective.indivisible = f"{layers} uses the statistics of the whole batch"
    if len(objective.shards) > 1:
        raise SpecError(
            f"{layers} normalises with the statistics of each batch, so the mean over {len(objective.shards)} "
            "(micro-)batches is not the loss of all examples. Call model.eval() in the spec to use the running "
            "statistics, or pass all examples as one batch without --micro-batch."
        )
    if any(uses_batch_statistics(module) and module.training for module in objective.model.modules()):
        objective.notify(
            "batch-statistics",
            f"{layers} is in train mode and normalises with the statistics of the batch, {objective.num_examples} "
            "examples here: the curvature is that of training with such batches. Other batch sizes have another one; "
            "call model.eval() for that of the running statistics.",
        )


def _check_mean(objective: Objective, whole: float, *, cut: bool) -> None:
    """Compare the loss of one batch with those of its halves: a mean over examples is their weighted mean."""
    shard = objective.shards[0]
    if objective.indivisible is not None or shard.rows is None or shard.rows < 2 or whole == 0:
        return
    halves = nest.split(shard.batch, [shard.rows // 2, shard.rows - shard.rows // 2])
    if halves is None:
        return
    counts = [examples_in(half, objective.batch_size_of) for half in halves]
    try:
        with torch.no_grad():
            parts = [float(objective.loss(Shard(h, 1.0, n, None))) for h, n in zip(halves, counts, strict=True)]
    except Exception as error:
        if runtime.is_out_of_memory(error):
            raise
        return  # a loss with a fixed batch size, which tells nothing
    mean = sum(n * part for n, part in zip(counts, parts, strict=True)) / max(1, sum(counts))
    deviation = abs(whole - mean) / abs(whole)
    if not math.isfinite(deviation):  # labels that are ignored leave nothing in a half
        _note_batches(objective, "A part of a batch has no finite loss of its own")
        return
    if deviation <= max(_MEAN_RTOL, 10 * _AGREEMENT.get(objective.dtype, 2e-2)):
        return
    if abs(whole - sum(parts)) <= _MEAN_RTOL * abs(whole):
        place = written_at(objective.loss_function)
        said = f"The loss{place} grows with the batch size: it is a sum over examples, not a mean"
        remedy = "Use reduction='mean' (or divide by the number of examples)"
        examples = sum(counts)
        objective.notify(
            "sum-reduced",
            f"{said}, so step sizes are for the sum: those for the mean over a batch of {examples} are {examples} "
            f"times as large. {remedy} if that is not how you train.",
        )
    else:
        said = f"The loss of a batch differs by {deviation:.1%} from the mean of its halves"
        remedy = "Weight batches with batch_size_of, for example by tokens, or leave --micro-batch out"
        if cut:
            objective.notify("not-a-mean", f"{said}, so micro-batches measure a slightly different function. {remedy}.")
        else:
            _note_batches(objective, said)
    if deviation > _MEAN_LIMIT:
        objective.indivisible = said[0].lower() + said[1:]
        if cut:
            raise SpecError(f"{said}, so cutting batches changes the function that is measured. {remedy}.")


def _note_batches(objective: Objective, said: str) -> None:
    """Say that the mean over several batches is not what one batch of all would have."""
    if len(objective.shards) > 1:
        objective.notify(
            "not-a-mean",
            f"{said} (class weights, labels that are ignored, padding, or examples that see each other), so the mean "
            f"over the {len(objective.shards)} batches is not the loss of all examples as one batch: the two have "
            "other curvatures. Make one batch of them, or weight them with batch_size_of.",
        )
