"""Models that live on several devices, or whose weights ``accelerate`` (``device_map``) has taken off them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoscope.errors import SpecError


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
