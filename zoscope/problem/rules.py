"""Operations with their first and second derivatives, in a form that autograd follows to any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

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
