"""Operations with their first and second derivatives, in a form that autograd follows to any order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Gradients = tuple[Tensor | None, ...]
"""One entry for every input: ``None`` where it has none, or none is asked for."""


class Rule(ABC):
    """One call of an operation. ``needed`` says for which of its inputs a gradient is asked for."""

    @abstractmethod
    def value(self, *inputs: Any) -> Tensor:
        """The result, by PyTorch's own operation."""

    @abstractmethod
    def gradient(self, needed: Sequence[bool], g: Tensor, *inputs: Any) -> Gradients:
        """Derivatives of ``⟨g, value⟩`` by the inputs."""

    @abstractmethod
    def second(self, needed: Sequence[bool], v: Gradients, g: Tensor, *inputs: Any) -> Gradients:
        """Derivatives of ``Σ⟨v, gradient⟩`` by g, the first of ``needed``, and by the inputs."""

    def __call__(self, *inputs: Any) -> Tensor:
        """The result, with a graph that leads here."""
        result: Tensor = _Value.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return result


class _Value(Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, *inputs: Any) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(*inputs)
        return rule.value(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return (None, *_Gradient.apply(ctx.rule, needed, *grad_outputs, *ctx.saved_tensors))  # type: ignore[no-untyped-call]
        return (None, *ctx.rule.gradient(needed, *grad_outputs, *ctx.saved_tensors))


class _Gradient(Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, needed: Sequence[bool], g: Tensor, *inputs: Any) -> Gradients:
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, *inputs)
        return rule.gradient(needed, g, *inputs)

    @staticmethod
    def backward(ctx: Any, *v: Any) -> Any:
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return (None, None, *_by_pytorch(ctx.rule, needed, v, *ctx.saved_tensors))
        return (None, None, *ctx.rule.second(needed, v, *ctx.saved_tensors))


def _by_pytorch(rule: Rule, needed: Sequence[bool], v: Gradients, g: Tensor, *inputs: Any) -> Gradients:
    """What ``rule.second`` gives, with a graph for derivatives of higher order: a loss may have gradients inside."""
    # Fresh names for g and the inputs: g may itself depend on them, which is for others to follow.
    g, *inputs = (t if t is None else t.view_as(t) for t in (g, *inputs))  # type: ignore[assignment]
    varied = [t for t, wanted in zip(inputs, needed[1:], strict=True) if wanted]
    grads = torch.autograd.grad(rule.value(*inputs), varied, g, create_graph=True, allow_unused=True)
    along = [w for w, wanted in zip(v, needed[1:], strict=True) if wanted]
    pairs = [(d, w) for d, w in zip(grads, along, strict=True) if d is not None and w is not None and d.requires_grad]
    by = [t for t, wanted in zip((g, *inputs), needed, strict=True) if wanted]
    if not pairs:
        return (None,) * len(needed)
    ends, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ends, by, weights, create_graph=True, allow_unused=True))
    return tuple(next(found) if wanted else None for wanted in needed)


class Elementwise(Rule):
    """A smooth function of one argument.

    Args:
        value: PyTorch's own function.
        slopes: Its first and second derivative, in a precision of at least float32.
    """

    def __init__(self, value: Callable[[Tensor], Tensor], slopes: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._value, self._slopes = value, slopes
        self._kept: tuple[Tensor, Tensor] | None = None

    def value(self, *inputs: Any) -> Tensor:
        """``f(x)``."""
        return self._value(*inputs)

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            first, second = self._slopes(x.detach().to(wide))
            self._kept = first.to(x.dtype), second.to(x.dtype)
        return self._kept

    def gradient(self, needed: Sequence[bool], g: Tensor, *inputs: Any) -> Gradients:
        """``g f'(x)``."""
        return (g * self._at(*inputs)[0],)

    def second(self, needed: Sequence[bool], v: Gradients, g: Tensor, *inputs: Any) -> Gradients:
        """``v f'(x)`` and ``v g f''(x)``."""
        if v[0] is None:
            return None, None
        first, second = self._at(*inputs)
        return v[0] * first if needed[0] else None, (v[0] * g).mul_(second) if needed[1] else None


class Convolution(Rule):
    """``conv(x, w) + b``: bilinear, so that its second derivatives are convolutions of the same kind.

    Args:
        settings: Stride, padding, dilation, transposed, output padding and groups.
    """

    def __init__(self, *settings: Any) -> None:
        self._settings = settings

    def value(self, *inputs: Any) -> Tensor:
        """The convolution of ``(n, c, ...)`` images."""
        result: Tensor = torch.ops.aten.convolution(*inputs, *self._settings)
        return result

    def gradient(self, needed: Sequence[bool], g: Tensor, *inputs: Any) -> Gradients:
        """By images, kernels and bias."""
        x, w, b = inputs
        return self._backward(g, x, w, None if b is None else list(b.shape), needed)

    def second(self, needed: Sequence[bool], v: Gradients, g: Tensor, *inputs: Any) -> Gradients:
        """By g, where the convolution is differentiated along v, and by images and kernels."""
        (x, w, _), (along_x, along_w, along_b) = inputs, v
        by_g = by_x = by_w = None
        if needed[0]:
            terms = [] if along_x is None else [self.value(along_x, w, along_b)]
            if along_w is not None:
                terms.append(self.value(x, along_w, None if terms else along_b))
            if not terms and along_b is not None:
                terms = [along_b.view(1, -1, *[1] * (g.dim() - 2)).expand_as(g)]
            by_g = terms[0] if len(terms) == 1 else terms[0].add_(terms[1]) if terms else None
        if needed[1] and along_w is not None:
            by_x = self._backward(g, x, along_w, None, (True, False, False))[0]
        if needed[2] and along_x is not None:
            by_w = self._backward(g, along_x, w, None, (False, True, False))[1]
        return by_g, by_x, by_w, None

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, bias: Any, needed: Sequence[bool]) -> Gradients:
        found: Gradients = torch.ops.aten.convolution_backward(g, x, w, bias, *self._settings, list(needed))
        return tuple(d if wanted else None for d, wanted in zip(found, needed, strict=True))


class LogSoftmax(Rule):
    """``x - log Σ exp x`` along a dimension."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._shares: Tensor | None = None

    def value(self, *inputs: Any) -> Tensor:
        """Logarithms of the shares."""
        result = torch.log_softmax(inputs[0], self._dim)
        if self._shares is None:
            self._shares = result.detach().exp()
        return result

    def gradient(self, needed: Sequence[bool], g: Tensor, *inputs: Any) -> Gradients:
        """``g - p Σ g`` with the shares p."""
        assert self._shares is not None
        return (g - self._shares * g.sum(self._dim, keepdim=True),)

    def second(self, needed: Sequence[bool], v: Gradients, g: Tensor, *inputs: Any) -> Gradients:
        """``v - Σ p v``, and ``-p (v - Σ p v) Σ g``."""
        if v[0] is None:
            return None, None
        assert self._shares is not None
        by_g = v[0] - (self._shares * v[0]).sum(self._dim, keepdim=True)
        return by_g, (by_g * self._shares).mul_(-g.sum(self._dim, keepdim=True)) if needed[1] else None


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


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _is_plain(arguments: Sequence[Any]) -> bool:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and any(t.requires_grad for t in tensors)
        and all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in tensors)
        and not any(t.is_complex() for t in tensors)
        and not _autocasts(tensors[0].device.type)
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
