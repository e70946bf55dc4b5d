"""Devices, precision, generators, memory, and the switches under which second derivatives work."""

import gc
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoscope.errors import UsageError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
def preserved_rng() -> Iterator[None]:
    """Give the global generators of torch (CPU, CUDA), numpy and Python back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - user code may draw from it
    devices = list(range(torch.cuda.device_count())) if _cuda_in_use() else []
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


# --- switches ---------------------------------------------------------------------------------------------------


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
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


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
def second_order_mode(model: nn.Module | None = None) -> Iterator[None]:
    """Enter the state in which a forward pass can be differentiated twice; everything is restored on exit.

    Attention runs in its math kernel (the fused ones have no second derivative), recurrent layers without cuDNN,
    float32 in full precision, and code compiled by ``torch.compile`` eagerly (it has no double backward).

    Args:
        model: Keeps cuDNN on outside of this model's recurrent layers. Without a model cuDNN is off altogether.
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_without_attention_fastpath())
        stack.enter_context(_without_cudnn() if model is None else _recurrent_layers_without_cudnn(model))
        stack.enter_context(eager_mode())
        yield


@contextmanager
def eager_mode() -> Iterator[None]:
    """Run what ``torch.compile`` has wrapped eagerly."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes a second or more
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# --- memory -----------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def release_memory(device: torch.device) -> None:
    """Hand cached blocks back after an out-of-memory error."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device; for the CPU what the machine and the container leave."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min(_machine_memory(), *_container_memory())


def _machine_memory() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no figure for what is free: half of all
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _container_memory() -> Sequence[int]:
    """What control groups (v2, v1) leave; caches of files count as free, since the kernel drops them."""
    left = [2**62]
    for folder, limit, usage, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            root = Path(folder)
            total, used = int((root / limit).read_text()), int((root / usage).read_text())
            reclaimable = re.search(rf"^{cache} (\d+)", (root / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such group, or the limit is the word "max"
            continue
        left.append(max(0, total - used + (int(reclaimable.group(1)) if reclaimable else 0)))
    return left


# --- what torch means when a second derivative fails --------------------------------------------------------------

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"use_reentrant=True|Checkpointing is not compatible with \.grad|torch\.utils\.checkpoint.*not compatible",
        "The model uses reentrant activation checkpointing, which cannot be differentiated twice: call checkpoint(..., "
        "use_reentrant=False), with transformers gradient_checkpointing_kwargs={'use_reentrant': False}, or switch it "
        "off; --curvature forward works without derivatives.",
    ),
    (
        r"aot_autograd does not currently support double backward|torch\.compile with.*double backward",
        "A compiled function has no double backward: pass the uncompiled model and loss, or set "
        "TORCHDYNAMO_DISABLE=1; --curvature forward works without derivatives.",
    ),
    (
        r"(flash|efficient|cudnn|fused)_?.*attention.*backward|scaled_dot_product.*backward|FlashAttn|flash_attn",
        "A fused attention kernel has no second derivative: use attn_implementation='eager' with transformers, or "
        "scaled_dot_product_attention without a kernel chosen by hand; --curvature forward works without derivatives.",
    ),
    (
        r"_?cudnn_rnn|mkldnn_rnn_layer|_thnn_fused_(lstm|gru)",
        "A fused recurrent kernel has no such derivative: run the forward pass under torch.backends.cudnn.flags("
        "enabled=False), use --hvp double-backward, or --curvature forward, which works without derivatives.",
    ),
    (
        r"derivative for '?(aten::)?[\w:]+'? is not implemented|is not differentiable twice|once_differentiable"
        r"|marked with @once_differentiable|trying to differentiate twice a function",
        "An operation in the loss has no second derivative: replace it (for example embedding_bag by embedding and a "
        "mean, cdist by (x[:, None] - y).square().sum(-1), ctc_loss by its native version), or use --curvature "
        "forward, which works without derivatives.",
    ),
    (
        r"modified by an inplace operation",
        "The loss, or a layer, changes a tensor in place that its own derivative needs: write it out of place, "
        "for example x = x + y instead of x += y, nn.ReLU() instead of nn.ReLU(inplace=True).",
    ),
    (
        r"Inference tensors cannot be saved for backward",
        "A tensor made under torch.inference_mode() takes part in the loss: make it outside, or clone() it.",
    ),
)


def explain_autograd_error(error: BaseException) -> str | None:
    """One sentence with the cause and the remedy for an error of a first or second derivative.

    Returns:
        None for an error that is not known to come from differentiation.
    """
    if not isinstance(error, (RuntimeError, NotImplementedError)):
        return None
    text = str(error)
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            return remedy
    return None
