"""Update rules: one class per optimizer, fed by a gradient or by an estimate of it.

The rules act on lists of tensors of any shape, element by element, so that one class serves a model's parameters,
slices of them, and a matrix that holds one replica per row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from zoscope.registry import optimizer_record

State = dict[str, list[Tensor]]


class Rule(Protocol):
    """How parameters move, given a gradient.

    Attributes:
        slots: Names of the tensors that the rule remembers for every parameter, each shaped like it and zero at first.
        normalizes: Whether it takes estimates divided by the root mean square of their slopes.
    """

    slots: ClassVar[tuple[str, ...]]
    normalizes: ClassVar[bool]

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, *, lr: float, step: int) -> None:
        """Move ``params`` in place.

        Args:
            params: Tensors to move.
            grads: Their gradients or estimates; may be overwritten.
            state: For every slot the tensors that belong to ``params``; changed in place.
            lr: Step size, param²/loss.
            step: Number of this step, from 1.
        """
        ...


@dataclass(frozen=True)
class GD:
    """``x ← x − η (g + wx)``.

    Args:
        weight_decay: w ≥ 0, loss/param².
    """

    weight_decay: float = 0.0
    slots: ClassVar[tuple[str, ...]] = ()
    normalizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_decay(self.weight_decay)

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, *, lr: float, step: int) -> None:
        """See `Rule.update`."""
        torch._foreach_add_(list(params), _decayed(params, grads, self.weight_decay), alpha=-lr)


@dataclass(frozen=True)
class Normalized(GD):
    """``x ← x − η g/s``, s the root mean square of the slopes whose average g is: FZOO's step (arXiv:2506.09034).

    FZOO divides by the standard deviation of the losses of a step. For central differences that is s up to μ and
    terms of order μ². One-sided differences from f(θ) are taken about f(θ), not about their mean, so that two or three
    queries cannot make s vanish by chance. One query leaves the sign of its slope.
    """

    normalizes: ClassVar[bool] = True


@dataclass(frozen=True)
class SignSGD:
    """``x ← x − η sign(g)`` in every coordinate (ZO-SignSGD, Liu et al., ICLR 2019)."""

    slots: ClassVar[tuple[str, ...]] = ()
    normalizes: ClassVar[bool] = False

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, *, lr: float, step: int) -> None:
        """See `Rule.update`."""
        torch._foreach_add_(list(params), torch._foreach_sign(list(grads)), alpha=-lr)


@dataclass(frozen=True)
class GDM:
    """``m ← βm + (1−τ)(g + wx); x ← x − ηm``, the convention of ``torch.optim.SGD(momentum=β)``.

    Args:
        beta: β in ``[0, 1)``.
        dampening: τ in ``[0, 1)``; the first step has it too, which ``torch.optim.SGD`` spares.
        weight_decay: w ≥ 0, loss/param².
    """

    beta: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    normalizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_unit("beta", self.beta)
        _check_unit("dampening", self.dampening)
        _check_decay(self.weight_decay)

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, *, lr: float, step: int) -> None:
        """See `Rule.update`."""
        momentum = state["momentum"]
        torch._foreach_mul_(momentum, self.beta)
        torch._foreach_add_(momentum, _decayed(params, grads, self.weight_decay), alpha=1.0 - self.dampening)
        torch._foreach_add_(list(params), momentum, alpha=-lr)


@dataclass(frozen=True)
class Adam:
    """``m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²; x ← x − η P⁻¹m``, ``P_t = (1−β₁ᵗ)·diag(√(v/(1−β₂ᵗ)) + ε)``.

    The same as ``torch.optim.Adam``. See `FrozenAdam` for a fixed ``P``, the subject of the stability theorem.

    Args:
        betas: β₁ and β₂, each in ``[0, 1)``.
        eps: ε > 0, in the unit of the gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    normalizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_unit("betas[0]", self.betas[0])
        _check_unit("betas[1]", self.betas[1])
        if not self.eps >= 0.0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, *, lr: float, step: int) -> None:
        """See `Rule.update`."""
        beta1, beta2 = self.betas
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        grads = list(grads)
        torch._foreach_lerp_(mean, grads, 1.0 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, value=1.0 - beta2)
        scale = torch._foreach_div(square, 1.0 - beta2**step)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, self.eps)
        torch._foreach_addcdiv_(list(params), mean, scale, value=-lr / (1.0 - beta1**step))


@dataclass(frozen=True, eq=False)
class FrozenAdam:
    """Adam with a fixed preconditioner: ``m ← β₁m + (1−β₁)g; x ← x − η P⁻¹m``.

    Args:
        preconditioner: Diagonal of ``P``, one tensor per parameter, each of a shape that broadcasts to it; positive.
        beta1: β₁ in ``[0, 1)``.
    """

    preconditioner: Sequence[Tensor]
    beta1: float = 0.9
    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    normalizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_unit("beta1", self.beta1)

    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: State, *, lr: float, step: int) -> None:
        """See `Rule.update`."""
        mean = state["exp_avg"]
        torch._foreach_lerp_(mean, list(grads), 1.0 - self.beta1)
        for parameter, average, scale in zip(params, mean, self.preconditioner, strict=True):
            parameter.addcdiv_(average, scale.expand_as(average), value=-lr)


def rule_from_options(name: str, options: Mapping[str, Any]) -> Rule:
    """The rule of an optimizer, with those of the options that its record names.

    Raises:
        ValueError: If the name is unknown or an option is out of range.
    """
    record = optimizer_record(name)
    kind: Callable[..., Rule] = globals()[record.rule]
    return kind(**{option: options[option] for option in record.options})


def new_state(rule: Rule, params: Sequence[Tensor]) -> State:
    """Zeros for every slot of ``rule``."""
    return {slot: [torch.zeros_like(p, requires_grad=False) for p in params] for slot in rule.slots}


def _decayed(params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float) -> list[Tensor]:
    """``g + wx``, in the place of g."""
    found = list(grads)
    if weight_decay:
        torch._foreach_add_(found, list(params), alpha=weight_decay)
    return found


def _check_decay(value: float) -> None:
    if not value >= 0.0:
        raise ValueError(f"weight_decay must be at least 0, got {value}")


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
