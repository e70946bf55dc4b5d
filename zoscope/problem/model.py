"""The user's model during a session: wrappers off, parameters selected, copies kept, everything put back."""

from __future__ import annotations

import copy
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from zoscope import runtime
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.problem import pytree as nest

if TYPE_CHECKING:
    from zoscope.problem.data import LossFunction
    from zoscope.problem.objective import Objective, Shard
    from zoscope.runtime import Ranks

T = TypeVar("T")
_BY_NAME = {"StochasticDepth": "stochastic depth", "DropPath": "stochastic depth", "_SpectralNorm": "spectral norm"}


@dataclass
class ActiveLayers:
    """Names of the layers that ran in a state that matters, in the order in which they ran."""

    random: dict[str, str] = field(default_factory=dict)
    batch_statistics: dict[str, str] = field(default_factory=dict)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a layer normalises with the statistics of the batch, which ties the examples of a batch together."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def randomness(module: nn.Module) -> str | None:
    """What makes a layer random in its present mode, in words; None for a deterministic layer."""
    if isinstance(module, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)) and module._random_samples is None:
        return "random pooling regions"
    if not module.training:
        return None
    if isinstance(module, _DropoutNd) and module.p > 0:
        return f"p={module.p:g}"
    if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
        return f"dropout={module.dropout:g} between its layers"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return f"dropout={module.dropout:g} on its weights"
    if isinstance(module, nn.RReLU) and module.lower != module.upper:
        return "random slopes"
    return _BY_NAME.get(type(module).__name__)


@contextmanager
def watched(model: nn.Module) -> Iterator[ActiveLayers]:
    """Record the layers of ``model`` that are random or use batch statistics as they run.

    The mode is read when a layer runs, since a loss function may call ``model.eval()`` itself.
    """
    active = ActiveLayers()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or not _interesting(module):
            continue
        handles.append(module.register_forward_pre_hook(_recorder(name or "model", active)))
    try:
        yield active
    finally:
        for handle in handles:
            handle.remove()


def _interesting(module: nn.Module) -> bool:
    kinds = (_BatchNorm, _DropoutNd, nn.RNNBase, nn.MultiheadAttention, nn.RReLU)
    return isinstance(module, (*kinds, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)) or (
        type(module).__name__ in _BY_NAME
    )


def _recorder(name: str, active: ActiveLayers) -> Callable[..., None]:
    def record(module: nn.Module, *_: Any) -> None:
        cause = randomness(module)
        if cause is not None:
            active.random[name] = f"{type(module).__name__} '{name}' ({cause})"
        if uses_batch_statistics(module):
            active.batch_statistics[name] = f"{type(module).__name__} '{name}'"

    return record


def some(names: list[str], *, most: int = 3) -> str:
    """The first few names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


IN_MEMORY = 1 << 26
"""Bytes up to which copies stay in memory; more go to the host (from a GPU) or to a temporary file (from the host)."""

CHUNK = 1 << 22
"""Bytes that travel between a file and memory at a time."""


class _Copy(Protocol):
    def put_back(self, tensor: Tensor, *, look: bool) -> None: ...


class Originals:
    """The values of some tensors, to be put back bit for bit.

    Args:
        tensors: What to keep; they must stay where they are in memory.
        aside: Whether large ones go elsewhere.
    """

    def __init__(self, tensors: Sequence[Tensor], *, aside: bool = True) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._file: BinaryIO | None = None
        size = sum(t.numel() * t.element_size() for t in self._tensors)
        self._copies: list[_Copy] = []
        for tensor in self._tensors:
            if not aside or size <= IN_MEMORY or not _flat(tensor):
                self._copies.append(_InMemory(tensor.clone()))
            elif tensor.device.type != "cpu":
                self._copies.append(_InMemory(tensor.cpu()))
            else:
                self._copies.append(self._on_disk(tensor))

    def _on_disk(self, tensor: Tensor) -> _Copy:
        try:
            if self._file is None:
                self._file = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - open as long as this object
            return _InFile(self._file, tensor)
        except OSError:  # no room or no right to write: memory it is
            return _InMemory(tensor.clone())

    @property
    def in_memory(self) -> int:
        """Bytes that the copies take on the tensors' own device."""
        pairs = zip(self._copies, self._tensors, strict=True)
        held = [t for copy, t in pairs if isinstance(copy, _InMemory) and copy.value.device == t.device]
        return sum(t.numel() * t.element_size() for t in held)

    @torch.no_grad()
    def put_back(self, indices: Sequence[int] | None = None) -> None:
        """Give tensors the values that they had.

        Args:
            indices: Which, known to have others now; ``None`` for all, of which those that have not are left alone.
        """
        for index in range(len(self._tensors)) if indices is None else indices:
            self._copies[index].put_back(self._tensors[index], look=indices is None)

    def close(self) -> None:
        """Forget the copies."""
        self._copies.clear()
        if self._file is not None:
            self._file.close()


class _InMemory:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def put_back(self, tensor: Tensor, *, look: bool) -> None:
        if look:
            _put(tensor, self.value)
        else:  # to look is to wait for a device
            tensor.copy_(self.value)


class _InFile:
    """Bytes of a tensor at the end of a file, read through one small buffer."""

    def __init__(self, file: BinaryIO, tensor: Tensor) -> None:
        self._file = file
        self._start = file.seek(0, 2)
        for part in torch.split(_bytes(tensor), CHUNK):
            file.write(part.numpy().data)

    def put_back(self, tensor: Tensor, *, look: bool) -> None:
        self._file.seek(self._start)
        buffer = bytearray(CHUNK)
        for part in torch.split(_bytes(tensor), CHUNK):
            view = memoryview(buffer)[: len(part)]
            if cast("int", self._file.readinto(view)) != len(part):  # type: ignore[attr-defined]
                raise OSError("a temporary file with the values of parameters is shorter than what was written to it")
            (_put if look else Tensor.copy_)(part, torch.frombuffer(view, dtype=torch.uint8))


def _flat(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _put(tensor: Tensor, value: Tensor) -> None:
    # Only what changed: writing bumps the version counter, which would break graphs that the caller still holds.
    if tensor.layout != torch.strided or value.device != tensor.device or not torch.equal(tensor, value):
        tensor.copy_(value)


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices of a model's parameters, in their order."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _hooks(module: nn.Module) -> list[Any]:
    """Those of ``accelerate``."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def entrance(model: nn.Module) -> torch.device:
    """Where the batches of a model on several devices belong: where its own forward pass sends them, else its start."""
    for hook in _hooks(model):
        where = getattr(hook, "execution_device", None)
        if isinstance(where, (int, str, torch.device)):
            return torch.device(where)
    return devices_of(model)[0]


def offloaded(model: nn.Module) -> set[str]:
    """Names of the parameters that ``accelerate`` puts in place only while their layer runs."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if any(getattr(hook, "offload", False) for hook in _hooks(module))
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.device.type == "meta"
    }


def refuse_offloaded(name: str) -> None:
    """Say why a parameter cannot be varied.

    Raises:
        SpecError: Always.
    """
    raise SpecError(
        f"Parameter '{name}' is offloaded by accelerate: its values are in place only while its layer runs, so that "
        "nothing can move them. Expected what is varied on the device that it is used on. Load the model with a "
        "device_map that offloads nothing, device_map='cpu' if need be, or in a smaller dtype; or vary parameters that "
        "are not offloaded, with --params."
    )


def refuse_spread(model: nn.Module) -> None:
    """See that derivatives are not taken of a model that ``accelerate`` has spread.

    Raises:
        SpecError: If its parameters are on several devices.
    """
    devices = devices_of(model)
    if len(devices) > 1 and any(_hooks(module) for module in model.modules()):
        raise SpecError(
            f"The model is spread over {_listed(devices)} (device_map): Hessian-vector products need all of it on one "
            "device. Load it without device_map, or for one device; or use --curvature forward, which measures it "
            "where it is."
        )


def refuse_quantised(model: nn.Module) -> None:
    """See that derivatives are not taken of layers with quantised weights.

    Raises:
        SpecError: If a parameter is of integers, as in the int8 and 4-bit layers of bitsandbytes.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in (torch.int8, torch.uint8):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise SpecError(
                    f"The weights of {type(module).__name__} '{prefix or name}' are quantised ({kind}). Such layers "
                    "round on the way, and what they pass back leaves the rounding out: their second derivatives are "
                    "not those of the loss. Use --curvature forward, which takes the model as it is, or load the base "
                    "in float32 or bfloat16."
                )


def refuse_ranks(model: nn.Module) -> None:
    """See that only one process uses a model on several devices.

    Raises:
        SpecError: If it is.
    """
    devices = devices_of(model)
    if len(devices) > 1:
        raise SpecError(
            f"The model is spread over {_listed(devices)}, and this is a job of several processes: expected one or the "
            "other. Run zoscope as one process, or shard the model with fully_shard."
        )


def _listed(devices: list[torch.device]) -> str:
    names = ["offloaded weights" if device.type == "meta" else str(device) for device in devices]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here, in the same memory; an ordinary tensor is here as a whole."""
    inner = getattr(tensor, "_local_tensor", None)
    return tensor if inner is None else inner


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to a model or to parts of it."""
    return bool(_sharded_modules(model))


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


class ShardedLoss:
    """A loss after which the parts of the model are apart again: the next pass then sees them where they have moved."""

    def __init__(self, loss: LossFunction) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch."""
        value = self._loss(model, batch)
        for module in _sharded_modules(model):
            module.reshard()
        return value


def refuse_partly_sharded(names: tuple[str, ...], params: tuple[Tensor, ...], ranks: int) -> None:
    """See that each rank holds a part of its own of every parameter.

    Raises:
        SpecError: If one is replicated, or sharded over other ranks.
    """
    for name, parameter in zip(names, params, strict=True):
        placements: Any = getattr(parameter, "placements", ())
        mesh: Any = getattr(parameter, "device_mesh", None)
        if len(placements) != 1 or not placements[0].is_shard() or mesh.size() != ranks:
            raise SpecError(
                f"Parameter '{name}' is not sharded over all {ranks} ranks: expected fully_shard on the whole model, "
                "with one mesh dimension. Apply it to the root module too, or select other parameters with --params."
            )


class ShardedGroup:
    """All ranks go through the same program with parts of one model; stands where a `ProcessGroup` stands otherwise.

    Args:
        ranks: The job.
        objective: The problem, with the parts of its parameters that are here.
    """

    def __init__(self, ranks: Ranks, objective: Objective) -> None:
        self.ranks = ranks
        self._objective = objective

    def attempt(self, work: Callable[[], T]) -> T:
        """Work that all ranks do together: losses, and what is wrong with them, are the same everywhere."""
        try:
            return work()
        except NumericalError:
            if self.ranks.leads:
                raise
            raise runtime.DroppedError from None
        except Exception:
            self.ranks.in_step = False  # the others may wait for this rank in the middle of a forward pass
            raise

    @torch.no_grad()
    def value(self) -> float:
        """Loss over all shards; all ranks ask for it together, and make equally many passes."""
        objective, ranks = self._objective, self.ranks
        shards = objective.shards
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(shards), ranks.size):
            index = start + ranks.rank
            shard: Shard = shards[min(index, len(shards) - 1)]  # a pass that counts for nothing keeps the others going
            loss = objective.loss(shard).detach().to(total)
            total += shard.weight * loss if index < len(shards) else 0.0
        return float(ranks.total(total))

    def total(self, number: float) -> float:
        """Sum over ranks."""
        return float(self.ranks.total(torch.tensor(number, dtype=torch.float64)))

    def largest(self, number: float) -> float:
        """Largest over ranks."""
        return -self.ranks.smallest(-number)


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "_FabricModule": "_original_module",
}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of torch (compile, DistributedDataParallel, DataParallel) or Fabric holds; None for others."""
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith(("torch.", "lightning")):
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
        first, twin = first_of.setdefault(place(parameter), (name, parameter))
        if parameter is not twin:
            aliases.append((name, first))
        if wanted and parameter.is_floating_point():
            chosen.setdefault(first, parameter)
    num_params = sum(p.numel() for p in chosen.values())
    if num_params == 0:
        raise SpecError(_nothing_selected(model, regex))
    _refuse_overlap(chosen)
    return Selection(tuple(chosen), tuple(pair for pair in aliases if pair[1] in chosen), num_params)


def place(parameter: Tensor) -> Any:
    """What two tensors share that are the same numbers: the memory, the type and the layout."""
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
    if parameter.layout != torch.strided:
        raise SpecError(
            f"Parameter '{name}' is stored as {parameter.layout}: expected a dense tensor, whose numbers can be "
            "varied one by one. Use .to_dense()."
        )
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
            if extent < p.numel():
                raise SpecError(
                    f"The elements of parameter '{name}' share memory (it is expanded: shape {tuple(p.shape)} on "
                    f"{extent} numbers), so they are not independent: expected one number for each. Use "
                    "nn.Parameter(tensor.clone()), or keep the small tensor as the parameter and expand it in the "
                    "forward pass."
                )
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
            return copy.deepcopy(module, _computed(module, device, dtype)).to(device=device, dtype=dtype)
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


def _computed(module: Any, device: torch.device, dtype: torch.dtype | None) -> dict[int, Any]:
    """Copies of tensors that modules keep and that are no leaves, which ``deepcopy`` refuses, by their identity.

    Pruning, and weight and spectral norm of the older kind, compute a weight before each forward pass and leave it
    where the parameter was.
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return {}
    kept = [leaf for m in module.modules() for leaf in nest.leaves(vars(m)) if isinstance(leaf, Tensor)]
    return {
        id(t): t.detach().clone().to(device, dtype if t.is_floating_point() else None) for t in kept if not t.is_leaf
    }


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
    originals = Originals([parameters[name] for name in names], aside=aside)
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
        originals.put_back()
        originals.close()
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                _put(buffer, value)
        for module, mode in modes:
            module.training = mode


@contextmanager
def trainable(model: nn.Module, selection: Selection, *, gradients: bool = True) -> Iterator[tuple[nn.Parameter, ...]]:
    """Let exactly the selected parameters require gradients, without ``.grad``, and tie those that share memory.

    Their gradient hooks are off meanwhile: zeroth-order training never runs them, and a product would, twice.

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
        for parameter in chosen.values():
            if parameter._backward_hooks:  # the same dictionary goes back: the user's handles remove hooks from it
                stack.callback(setattr, parameter, "_backward_hooks", parameter._backward_hooks)
                parameter._backward_hooks = None
        yield tuple(chosen.values())


def hooked(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Those of the named parameters whose gradients go through hooks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if parameters[name]._backward_hooks]


class _BeforeWriting(TorchFunctionMode):
    """Copies the parameters that an operation is about to write to; a frozen base model is never copied."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self._at: dict[int, list[tuple[str, Tensor]]] = {}  # .data and views have the memory of a parameter in common
        for name, parameter in parameters.items():
            self._at.setdefault(_memory(parameter), []).append((name, parameter))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place or name == "__setitem__" or name.startswith("__i"):
            self._keep(args[:1])
        if "out" in kwargs:
            self._keep(kwargs["out"])
        return func(*args, **kwargs)

    def _keep(self, written: Any) -> None:
        for tensor in nest.leaves(written):
            if isinstance(tensor, Tensor):
                for name, parameter in self._at.get(_memory(tensor), ()):
                    if name not in self.kept:
                        self.kept[name] = parameter.clone()


def _memory(tensor: Tensor) -> int:
    """Where a tensor begins to have memory; 0 for one without any of its own, as within a transform of functions."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


@contextmanager
def frozen(model: nn.Module, varied: Sequence[Tensor]) -> Iterator[None]:
    """See that an evaluation leaves the parameters that are not varied as they are.

    Args:
        model: The model.
        varied: Its parameters that are.

    Raises:
        SpecError: If one has changed, as a mean teacher does that the loss moves along. It has its value back then.
    """
    own = {id(parameter) for parameter in varied}
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in own and parameter.is_floating_point() and _memory(parameter)
    }
    if not parameters:
        yield
        return
    before = {name: parameter.detach() for name, parameter in parameters.items()}
    watch = _BeforeWriting(before)
    try:
        with watch:
            yield
    finally:
        changed = [name for name in before if _put_back(parameters[name], before[name], watch.kept.get(name))]
    if changed:
        raise SpecError(
            f"The loss changes parameters of the model that are not varied ({some(changed)}): expected a function that "
            "leaves the model as it is, since no other has a curvature. Move a teacher, or an average of parameters, "
            "outside of the loss."
        )


@torch.no_grad()
def _put_back(parameter: Tensor, before: Tensor, value: Tensor | None) -> bool:
    """Undo what was done to a parameter; whether that was anything.

    Args:
        parameter: The parameter.
        before: A view of its memory as it was.
        value: What was in it; ``None`` where nothing wrote to it.
    """
    now = parameter.detach()
    replaced = now.data_ptr() != before.data_ptr() and now.dtype == before.dtype  # layers may cast theirs for good
    if replaced and (now.shape != before.shape or not torch.equal(now, before)):
        parameter.data = before
    else:
        replaced = False
    if value is None or torch.equal(before, value):
        return replaced
    before.copy_(value)
    return True
