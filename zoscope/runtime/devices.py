"""Devices and dtypes by name."""

import re

import torch
from torch import nn

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
