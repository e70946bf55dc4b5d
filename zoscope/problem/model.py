"""The user's model during a session: wrappers off, parameters selected, everything put back afterwards."""

import copy
import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoscope import runtime
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.problem.dispatched import offloaded, refuse_offloaded
from zoscope.problem.layers import some
from zoscope.problem.originals import Originals
from zoscope.problem.sharded import local

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a torch.compile, DistributedDataParallel or DataParallel wrapper holds; None for another module."""
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            inner = getattr(module, _WRAPPERS[kind.__name__])
            assert isinstance(inner, nn.Module)
            return inner
    return None


@contextmanager
def unwrapped(model: nn.Module, *, sharded: bool = False) -> Iterator[nn.Module]:
    """Take wrappers off a model and off its submodules, in place for the time of the context.

    The hooks of such wrappers are skipped by ``torch.autograd.grad``, and compiled code has no double backward.

    Args:
        model: Any model.
        sharded: Let ``fully_shard`` pass.

    Raises:
        SpecError: For a sharded (FSDP) model.
    """
    while (inner := wrapped(model)) is not None:
        model = inner
    with ExitStack() as stack:
        for name, module in list(model.named_modules()):
            if (_SHARDED - {"FSDPModule" if sharded else ""}) & {kind.__name__ for kind in type(module).__mro__}:
                raise SpecError(
                    f"The model is sharded ({type(module).__name__} at '{name or 'its root'}'): Hessian products of "
                    "sharded (FSDP) models are not supported. Pass an ordinary copy that holds the full state dict; or "
                    "use --curvature forward, under torchrun and with fully_shard."
                )
            for child_name, child in list(module._modules.items()):
                bare = child
                while bare is not None and (inner := wrapped(bare)) is not None:
                    bare = inner
                if bare is not child:
                    module._modules[child_name] = bare
                    stack.callback(module._modules.__setitem__, child_name, child)
        yield model


@dataclass(frozen=True)
class Selection:
    """Which parameters are varied.

    Args:
        names: One name per distinct tensor, in the order of ``named_parameters``.
        aliases: ``(name, first name)`` of parameters that are other objects on the same memory.
        num_params: Number of scalars.
    """

    names: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]
    num_params: int


def select(model: nn.Module, regex: str | None, *, sharded: bool = False) -> Selection:
    """Choose parameters by name; tied weights count once.

    Args:
        model: Without wrappers.
        regex: ``re.search`` pattern; None takes those with ``requires_grad``.
        sharded: Let parameters of which a part is elsewhere pass.

    Raises:
        UsageError: For an invalid pattern.
        SpecError: If nothing is selected, or parameters cannot be varied (complex, not yet initialised, overlapping).
    """
    try:
        pattern = None if regex is None else re.compile(regex)
    except re.error as error:
        raise UsageError(f"--params {regex!r} is not a regular expression ({error}).") from error
    away = offloaded(model)
    first_of: dict[Any, tuple[str, Tensor]] = {}
    chosen: dict[str, Tensor] = {}
    aliases: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = parameter.requires_grad if pattern is None else pattern.search(name) is not None
        if name in away:
            if wanted:
                refuse_offloaded(name)
            continue
        _refuse_unusable(name, parameter, sharded=sharded)
        first, twin = first_of.setdefault(_place(parameter), (name, parameter))
        if parameter is not twin:
            aliases.append((name, first))
        if wanted and parameter.is_floating_point():
            chosen.setdefault(first, parameter)
    num_params = sum(p.numel() for p in chosen.values())
    if num_params == 0:
        raise SpecError(_nothing_selected(model, regex))
    _refuse_overlap(chosen)
    return Selection(tuple(chosen), tuple(pair for pair in aliases if pair[1] in chosen), num_params)


def _place(parameter: Tensor) -> Any:
    whole, parameter = parameter, local(parameter)
    if parameter.numel() == 0 or parameter.device.type == "meta":
        return id(whole)
    return (parameter.device, parameter.dtype, parameter.data_ptr(), parameter.shape, parameter.stride())


def _refuse_unusable(name: str, parameter: Tensor, *, sharded: bool) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise SpecError(f"Parameter '{name}' is not initialised yet: run the model once on a batch before measuring.")
    if parameter.device.type == "meta":
        raise SpecError(f"Parameter '{name}' has no values (meta device): load the weights before measuring.")
    if parameter.is_complex():
        raise SpecError(f"Parameter '{name}' is complex: only real parameters are supported; store it as view_as_real.")
    if type(parameter.data).__name__ == "DTensor" and not sharded:
        raise SpecError(
            f"Parameter '{name}' is sharded (DTensor): Hessian products of sharded models are not supported. Pass an "
            "ordinary copy that holds the full state dict."
        )


def _refuse_overlap(parameters: dict[str, Tensor]) -> None:
    spans = []
    for name, p in ((name, local(parameter)) for name, parameter in parameters.items()):
        if p.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + extent * p.element_size(), name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise SpecError(
                f"Parameters '{name}' and '{other}' share memory under different shapes, so they are not independent: "
                "use one parameter for both (for example its transpose in the forward pass), or select one with "
                "--params."
            )


def _nothing_selected(model: nn.Module, regex: str | None) -> str:
    names = [name for name, _ in model.named_parameters()]
    if not names:
        return f"The model ({type(model).__name__}) has no parameters: expected an nn.Module with parameters to vary."
    if regex is not None:
        return f"--params {regex!r} matches no trainable parameter. The model has {some(names, most=6)}."
    return (
        f"No parameter of the model ({type(model).__name__}) has requires_grad=True. It has {some(names, most=6)}: "
        "select some with --params REGEX, which varies frozen ones too, or call requires_grad_()."
    )


def copied(module: Any, *, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A deep copy on ``device``, its floating tensors in ``dtype`` unless that is None.

    Raises:
        SpecError: If the module cannot be copied.
        NumericalError: If memory runs out.
    """
    try:
        with torch.no_grad():  # scripted modules copy by operations that are recorded otherwise
            return copy.deepcopy(module).to(device=device, dtype=dtype)
    except Exception as error:
        if runtime.is_out_of_memory(error):
            raise NumericalError(
                f"A copy of the {type(module).__name__}{_in(dtype)} does not fit into the "
                f"memory of {device}. Use a device with more memory, a smaller --dtype, or a smaller model."
            ) from error
        half = any(t.dtype in runtime.HALF for t in module.parameters()) and dtype not in (None, *runtime.HALF)
        remedy = "Build it on that device and in that dtype in the spec, or choose "
        remedy += (
            "--curvature forward, which takes it as it is: second derivatives are not taken in half precision."
            if half
            else "the --device and --dtype that it already has."
        )
        raise SpecError(
            f"The {type(module).__name__} cannot be copied to {device}{_in(dtype)} "
            f"({type(error).__name__}: {error}). {remedy}"
        ) from error


def _in(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"


@contextmanager
def restored(model: nn.Module, names: tuple[str, ...], *, aside: bool = False) -> Iterator[None]:
    """Give the values of the named parameters and of all buffers, and the mode of every layer, back as they were.

    Args:
        model: The model.
        names: Of its parameters.
        aside: Keep large parameters out of working memory meanwhile.
    """
    parameters = {name: local(p) for name, p in model.named_parameters(remove_duplicate=False)}
    originals = Originals([parameters[name] for name in names]) if aside else None
    values = [] if aside else [(parameters[name], parameters[name].detach().clone()) for name in names]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            if originals is not None:
                originals.put_back()
                originals.close()
            for parameter, value in values:
                _put_back(parameter, value)
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                _put_back(buffer, value)
        for module, mode in modes:
            module.training = mode


def _put_back(tensor: Tensor, value: Tensor) -> None:
    # Only what changed: writing bumps the version counter, which would break graphs that the caller still holds.
    if tensor.layout != torch.strided or not torch.equal(tensor, value):
        tensor.copy_(value)


@contextmanager
def trainable(model: nn.Module, selection: Selection, *, gradients: bool = True) -> Iterator[tuple[nn.Parameter, ...]]:
    """Let exactly the selected parameters require gradients, without ``.grad``, and tie those that share memory.

    Args:
        model: The model.
        selection: Parameters to vary.
        gradients: False lets none require them: NumPy and others can then read the parameters themselves.
    """
    with ExitStack() as stack:
        for name, first in selection.aliases:
            owner, _, leaf = name.rpartition(".")
            module, twin = model.get_submodule(owner), model.get_parameter(first)
            stack.callback(setattr, module, leaf, getattr(module, leaf))
            setattr(module, leaf, twin)
        everything = dict(model.named_parameters(remove_duplicate=False))  # get_parameter fails on ScriptModules
        chosen = {name: everything[name] for name in selection.names}
        wanted = {id(parameter) for parameter in chosen.values()} if gradients else set()
        for parameter in model.parameters():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
            if parameter.requires_grad != (id(parameter) in wanted):
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(id(parameter) in wanted)
        yield tuple(chosen.values())
