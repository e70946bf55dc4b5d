"""Devices, dtypes, generators and the switches of torch."""

import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoscope.errors import UsageError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
"""Types in which second derivatives are not taken: one product carries about 1 % of noise."""

_DEVICE = re.compile(r"^(auto|cpu|cuda(:\d+)?)$")


def resolve_device(name: str | torch.device, *, model: nn.Module | None = None) -> torch.device:
    """Turn a ``--device`` value into a device that exists.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``. ``"auto"`` is the model's own CUDA device where it
            already lives on one, else the current CUDA device, else the CPU.
        model: The model that ``"auto"`` looks at.

    Raises:
        UsageError: For another name, or a CUDA device that this machine does not have.
    """
    text = str(name)
    if not _DEVICE.match(text):
        raise UsageError(f"--device {text} is not known: expected auto, cpu, cuda or cuda:<index>.")
    if text == "cpu":
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if text == "auto":
        homes = {p.device for p in model.parameters() if p.is_cuda} if model is not None else set()
        if len(homes) == 1:
            return homes.pop()
        return torch.device("cuda", torch.cuda.current_device()) if available else torch.device("cpu")
    if not available:
        raise UsageError(
            f"--device {text} was asked for, but torch {torch.__version__} sees no CUDA device here. Use --device cpu, "
            "or install a CUDA build of torch and check the driver with nvidia-smi."
        )
    device = torch.device(text)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UsageError(f"--device {text} does not exist: this machine has cuda:0 to cuda:{last}.")
    return torch.device("cuda", index)


def resolve_dtype(name: str | torch.dtype, model: nn.Module) -> torch.dtype:
    """Turn a ``--dtype`` value into a dtype.

    Args:
        name: ``"auto"``, a name such as ``"float64"``, or a torch dtype. ``"auto"`` is the dtype of the model's
            parameters, but at least float32: one HVP in bfloat16 carries about 1 % noise.
        model: The model that ``"auto"`` looks at.

    Raises:
        UsageError: For a name that is not known.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name == "auto":
        wide = {torch.float64: torch.float64}
        found = [wide.get(p.dtype, torch.float32) for p in model.parameters() if p.is_floating_point()]
        return torch.float64 if torch.float64 in found else torch.float32
    if name not in DTYPES:
        raise UsageError(f"--dtype {name} is not known: expected auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def widest_dtype(model: nn.Module) -> torch.dtype:
    """The most precise floating-point dtype among a model's parameters; float32 for a model without any."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda dtype: -torch.finfo(dtype).eps, default=torch.float32)


def spawn_generators(seed: int, n: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Make ``n`` independent generators on ``device``; the same ``seed`` gives the same streams.

    Raises:
        ValueError: If ``seed`` is negative (from numpy).
    """
    states = [child.generate_state(1, np.uint64)[0] for child in np.random.SeedSequence(seed).spawn(n)]
    return [torch.Generator(device=device).manual_seed(int(state) >> 1) for state in states]


def _cuda_in_use() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized())


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Give the global generators of torch (CPU, CUDA), numpy and Python back as they were.

    Args:
        device: CUDA device that will be used, whose generator counts even where CUDA has not been started yet.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - user code may draw from it
    starting = device is not None and device.type == "cuda"
    devices = list(range(torch.cuda.device_count())) if starting or _cuda_in_use() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def rng_fingerprint() -> tuple[bytes, ...]:
    """The state of the global generators, comparable with ``==``: tells whether a call drew random numbers."""
    states = [torch.get_rng_state()]
    if _cuda_in_use():
        states += torch.cuda.get_rng_state_all()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    other = repr(hash(random.getstate())) + repr(numpy_state[2]) + str(hash(numpy_state[1].tobytes()))
    return (*(bytes(state.numpy()) for state in states), other.encode())


SMALL_WORK = 2_000_000
"""Parameters times examples below which the threads of a kernel wait for each other longer than they compute."""


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Run a small problem on one CPU thread, and put the number of threads back on exit.

    Args:
        work: Parameters times examples, about the multiplications of a forward pass.
    """
    before = torch.get_num_threads()
    try:
        if work < SMALL_WORK:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bfloat16 shortcuts for float32 off (they put ~3e-4 of noise on an HVP), and back on exit."""
    b: Any = torch.backends
    ops: list[Any] = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn]
    before = [op.fp32_precision for op in ops]
    matmul, cudnn = _or_none(torch.get_float32_matmul_precision), _or_none(lambda: b.cudnn.allow_tf32)
    try:
        # Both the older and the newer switches, so that user code that reads either finds them in agreement.
        torch.set_float32_matmul_precision("highest")
        b.cudnn.allow_tf32 = False
        for op in ops:
            op.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            b.cudnn.allow_tf32 = cudnn
        for op, value in zip(ops, before, strict=True):
            op.fp32_precision = value


def _or_none(read: Any) -> Any:
    """Value of an older switch, None where torch refuses to read it because the newer ones disagree with it."""
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def _recurrent_layers_without_cudnn(model: nn.Module) -> Iterator[None]:
    """Switch cuDNN off around each recurrent layer only: without it convolutions would lose their fast kernels."""
    states: list[bool] = []

    def before(*_: Any) -> None:
        states.append(torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False

    def after(*_: Any) -> None:
        torch.backends.cudnn.enabled = states.pop()

    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    handles = [layer.register_forward_pre_hook(before, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(after, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_attention_fastpath() -> Iterator[None]:
    # The fused inference path of nn.MultiheadAttention rounds differently with and without gradients.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _dense_gradients(model: nn.Module) -> Iterator[None]:
    """Have embeddings return gradients that can be joined with those of other layers."""
    layers = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    for layer in layers:
        layer.sparse = False
    try:
        yield
    finally:
        for layer in layers:
            layer.sparse = True


@contextmanager
def second_order_mode(model: nn.Module) -> Iterator[None]:
    """Enter the state in which a forward pass can be differentiated twice; everything is restored on exit.

    Attention runs in its math kernel (the fused ones have no second derivative), the model's recurrent layers without
    cuDNN, its embeddings with dense gradients, float32 in full precision, and code compiled by ``torch.compile``
    eagerly (it has no double backward).
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_without_attention_fastpath())
        stack.enter_context(_recurrent_layers_without_cudnn(model))
        stack.enter_context(_dense_gradients(model))
        stack.enter_context(eager_mode())
        yield


@contextmanager
def without_autocast(asked: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Have ``torch.autocast`` do nothing, around the context and wherever it is entered within.

    Autocast computes products of float32 tensors in half precision, and derivatives of them with as many digits.

    Args:
        asked: Called whenever something asks for autocast.
    """
    kind: Any = torch.amp.autocast_mode.autocast
    entered = kind.__enter__

    def enter(self: Any) -> Any:
        enabled, self._enabled = self._enabled, False
        try:
            if enabled:
                asked()
            return entered(self)
        finally:
            self._enabled = enabled

    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                asked()
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(setattr, kind, "__enter__", entered)
        kind.__enter__ = enter
        yield


@contextmanager
def eager_mode() -> Iterator[None]:
    """Run what ``torch.compile`` has wrapped eagerly."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes a second or more
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
