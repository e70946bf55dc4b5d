"""Second derivatives by hand, for operations whose own are slow in PyTorch.

Products with a Hessian differentiate the graph of a gradient again and again at one point. PyTorch composes the second
derivative of an activation of a dozen operations, each time anew, that of a convolution's weight of a convolution with
a kernel as large as the image, and that of batch norm in eval mode as if it were in train mode. By hand they are the
products and convolutions that they have to be, and what depends on the point alone is computed once. Products of
convolutional networks take 0.7 to 0.9 of the time, those of transformers 0.9.

Values and derivatives of all orders are PyTorch's up to rounding: from the third on it is asked for them. Weight
normalisation is here because the second derivative that PyTorch 2.13 has of it is not symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zoscope.problem.rules import Convolution, Elementwise, LogSoftmax


class SecondDerivativesByHand(TorchFunctionMode):
    """Within it, operations that are called with plain tensors keep a graph that is fast to differentiate twice.

    What does not fit is left to PyTorch: autocast, transforms of ``torch.func``, subclasses of tensors, complex
    numbers, unusual layouts, and code that decides what the graph keeps, as activation checkpointing does.
    """

    def __enter__(self) -> SecondDerivativesByHand:
        self._hooks = _saved_tensor_hooks()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_hand = _OPERATIONS.get(func)
        if by_hand is not None and _saved_tensor_hooks() is self._hooks and _is_plain((*args, *kwargs.values())):
            found = by_hand(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _saved_tensor_hooks() -> object:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks and hooks[0]


def _is_plain(arguments: Sequence[Any]) -> bool:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and any(t.requires_grad for t in tensors)
        and all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in tensors)
        and not any(t.is_complex() for t in tensors)
        and not torch.is_autocast_enabled(tensors[0].device.type)
    )


def _gelu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    # In place, as graphs are what memory goes to: Φ(x) + x φ(x), and (2 - x²) φ(x).
    square = x * x
    density = square.mul(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    first = x.mul(math.sqrt(0.5)).erf_().add_(1).mul_(0.5).addcmul_(x, density)
    return first, square.neg_().add_(2).mul_(density)


def _tanh_gelu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(scale * x * (1 + cubic * square))
    inner, bend, rise = scale * (1 + 3 * cubic * square), 6 * scale * cubic * x, 1 - t * t
    return 0.5 * (1 + t + x * rise * inner), rise * (inner + 0.5 * x * (bend - 2 * t * inner * inner))


def _silu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor | None:
    slopes = {"none": _gelu_slopes, "tanh": _tanh_gelu_slopes}.get(approximate)
    return slopes and Elementwise(lambda x: functional.gelu(x, approximate=approximate), slopes)(input)


def _silu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace else Elementwise(functional.silu, _silu_slopes)(input)


def _convolution(dimensions: int) -> Callable[..., Tensor | None]:
    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if isinstance(padding, str) or input.dim() != dimensions + 2:
            return None
        sizes = [[s] * dimensions if isinstance(s, int) else list(s) for s in (stride, padding, dilation)]
        sizes = [s * dimensions if len(s) == 1 else s for s in sizes]
        return Convolution(*sizes, False, [0] * dimensions, groups)(input, weight, bias)

    return convolve


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """In eval mode it is a scale and a shift."""
    if training or running_mean is None or running_var is None or input.dtype != running_mean.dtype:
        return None
    shape = (1, -1, *[1] * (input.dim() - 2))
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    centred = (input - running_mean.view(shape)) * scale.view(shape)
    return centred if bias is None else centred + bias.view(shape)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _log_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor | None:
    return None if dim is None or dtype is not None else LogSoftmax(dim)(input)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Of classes, without smoothing."""
    old = size_average is not None or reduce is not None
    if old or label_smoothing or target.is_floating_point() or input.dim() != target.dim() + 1:
        return None
    logs = LogSoftmax(0 if input.dim() == 1 else 1)(input)
    return functional.nll_loss(logs, target, weight, ignore_index=ignore_index, reduction=reduction)


_OPERATIONS: dict[Any, Callable[..., Tensor | None]] = {
    functional.gelu: _gelu,
    functional.silu: _silu,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    functional.batch_norm: _batch_norm,
    torch._weight_norm: _weight_norm,
    functional.log_softmax: _log_softmax,
    functional.cross_entropy: _cross_entropy,
}
"""By the function that modules and users call; each returns ``None`` for arguments that it leaves to PyTorch."""
