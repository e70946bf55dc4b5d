"""Which layers make a loss random, or tie its examples together; found while they run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

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
