"""Zeroth-order GD, momentum and Adam as PyTorch optimizers: two forward passes a query, no gradient."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from zoscope.optim.directions import Block, Direction, Seed, check_law, new_generator, partition
from zoscope.optim.perturbation import FixedPoint, Restore, Snapshot, choose_perturbation
from zoscope.optim.rules import Rule, State, rule_from_options
from zoscope.registry import OPTIMIZERS, Directions

__all__ = ["ZOGD", "ZOGDM", "ZOAdam", "ZONormalized", "ZOSignSGD"]

BLOCK_SIZE = 1 << 18  # entries of a direction that exist at a time: fits in a cache
KEPT_SIZE = 1 << 20  # up to this many a direction is kept instead of being drawn again
Closure = Callable[[], Tensor | float]


@dataclass(frozen=True)
class _Layout:
    """Parameters cut into blocks, none of which spans two groups."""

    key: tuple[tuple[int, ...], ...]
    params: list[list[Tensor]]
    blocks: list[Block]
    group_of: list[int]
    perturbation: Snapshot | FixedPoint


class QueryOptions(TypedDict, total=False):
    """Keyword arguments that every zeroth-order optimizer takes; see `ZOGD` for what they mean."""

    mu: float
    queries: int
    directions: Directions
    seed: Seed
    restore: Restore
    one_sided: bool


Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class StepControl(Protocol):
    """What decides on a step between its evaluations and its update; see `zoscope.AutoLR`."""

    def reach(self) -> float | None:
        """Distance along the last direction at which the loss is wanted too, param; ``None`` if it is not."""
        ...

    def choose(self, slopes: Sequence[float], loss: float, curvatures: Sequence[float]) -> Sequence[float]:
        """The slopes to use; sets the ``lr`` of the groups."""
        ...


class ZeroOrderOptimizer(Optimizer):
    """Shared by the zeroth-order optimizers: everything but the update rule.

    One step draws ``queries`` directions, evaluates the closure at ``θ ± μu`` for each, and feeds the averaged
    estimate ``ĝ = (f(θ+μu) − f(θ−μu))/(2μ)·u`` to the rule. Directions are drawn again from the generator's state
    instead of being kept, and parameters are perturbed in place and brought back exactly, so that memory stays that
    of a forward pass (for models above 64 MiB; smaller ones keep a copy, which is faster). Parameters that do not
    require gradients do not move.

    ``evaluations`` holds the pairs ``(f(θ+μu), f(θ−μu))`` of the last step, one for each query; one-sided ones
    ``(f(θ+μu), f(θ))``.

    The generator's state is part of ``state_dict()``: a run that is saved and resumed equals one that was not.
    """

    name: ClassVar[str]

    def __init__(
        self,
        params: Parameters,
        defaults: dict[str, Any],
        *,
        mu: float = 1e-3,
        queries: int = 1,
        directions: Directions = "gaussian",
        seed: Seed = 0,
        restore: Restore = "auto",
        one_sided: bool = False,
    ) -> None:
        if not defaults["lr"] >= 0.0:
            raise ValueError(f"lr must be at least 0, got {defaults['lr']}")
        if not 0.0 < mu < float("inf"):
            raise ValueError(f"mu must be positive and finite, got {mu}")
        if queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self._rule = rule_from_options(self.name, defaults)
        super().__init__(params, defaults)
        self.mu, self.queries, self.directions, self.restore = mu, queries, check_law(directions), restore
        self.one_sided = one_sided
        devices = {p.device for group in self.param_groups for p in group["params"]}
        if len(devices) > 1:
            raise ValueError(f"all parameters must be on one device, got {', '.join(sorted(map(str, devices)))}")
        self._generator = new_generator(seed, next(iter(devices), "cpu"))
        self._layout: _Layout | None = None
        self.evaluations: tuple[tuple[float, float], ...] = ()
        self.control: StepControl | None = None

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Returns the loss as a scalar; called twice a query, or with one-sided differences once a query and
                once more, without gradients; must not call ``backward``.

        Returns:
            The mean of the losses seen, an estimate of the loss before the step (exact up to O(μ²)); with one-sided
            differences that loss itself.

        Raises:
            ValueError: If there is no closure.
        """
        if closure is None:
            raise ValueError(f"{type(self).__name__}.step needs a closure that returns the loss")
        layout = self._current_layout()
        layout.perturbation.begin()
        here = float(loss_of(closure)) if self.one_sided else None
        keep = sum(b.size for b in layout.blocks) <= KEPT_SIZE and not layout.perturbation.overwrites
        directions: list[Direction] = []
        evaluations: list[tuple[float, float]] = []
        for query in range(self.queries):
            direction = Direction(layout.blocks, self._generator, law=self.directions, keep=keep)
            evaluations.append(self._evaluate(layout, direction, closure, here))
            if query < self.queries - 1:
                _restore(layout, direction, sign=self._sign)
            directions.append(direction)
        self.evaluations = tuple(evaluations)
        spacing = self.mu if self.one_sided else 2.0 * self.mu
        slopes: Sequence[float] = [(f - g) / spacing for f, g in evaluations]
        loss = sum(0.5 * (f + g) for f, g in evaluations) / self.queries if here is None else here
        sign = self._sign
        if self.control is not None:
            curvatures: list[float] = []
            reach = self.control.reach()
            if reach is not None:
                curvature, sign = self._curvature(layout, directions[-1], closure, reach)
                curvatures = [curvature]
            slopes = self.control.choose(slopes, loss, curvatures)
        size = math.sqrt(sum(s * s for s in slopes) / self.queries) if self._rule.normalizes else 1.0
        self._update(layout, directions, [s / (size or 1.0) / self.queries for s in slopes], sign)
        return loss

    def _curvature(self, layout: _Layout, direction: Direction, closure: Closure, reach: float) -> tuple[float, int]:
        """``uᵀHu`` along the last direction from one evaluation more, and the side where that leaves the parameters."""
        perturbation, blocks, sign = layout.perturbation, range(len(layout.blocks)), self._sign
        above, below = self.evaluations[-1]
        try:
            if isinstance(perturbation, Snapshot):
                for index in blocks:
                    perturbation.far(index, direction.part(index), reach)
            elif self.one_sided:
                reach, sign = -self.mu, -1
                for index in blocks:
                    perturbation.minus(index, direction.part(index))
            else:
                reach = 0.0
                _restore(layout, direction, sign=sign)
                sign = 0
            far = float(loss_of(closure))
        except BaseException:
            _restore(layout, direction, sign=sign)
            raise
        if self.one_sided:
            return 2.0 * ((far - below) / reach - (above - below) / self.mu) / (reach - self.mu), sign
        slope, middle = (above - below) / (2.0 * self.mu), 0.5 * (above + below)
        return 2.0 * (far - middle - reach * slope) / (reach * reach - self.mu * self.mu), sign

    @property
    def _sign(self) -> int:
        """Side on which a query leaves the parameters."""
        return 1 if self.one_sided else -1

    def _evaluate(
        self, layout: _Layout, direction: Direction, closure: Closure, here: float | None
    ) -> tuple[float, float]:
        """``f(θ+μu)`` and ``f(θ−μu)``, or ``f(θ)`` where that is given; parameters are left at the last point."""
        blocks = range(len(layout.blocks))
        for index in blocks:
            layout.perturbation.plus(index, direction.part(index))
        sign = 1
        try:
            above = loss_of(closure)
            if here is not None:
                return float(above), here
            for index in blocks:
                layout.perturbation.minus(index, direction.part(index))
            sign = -1
            below = loss_of(closure)
        except BaseException:
            _restore(layout, direction, sign=sign)
            raise
        if isinstance(above, Tensor) and isinstance(below, Tensor):
            above, below = torch.stack([above, below]).tolist()  # a device is waited for once
        return float(above), float(below)

    def _update(self, layout: _Layout, directions: list[Direction], slopes: list[float], sign: int) -> None:
        """Bring the parameters back from the last query, block by block, and move them."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        rules = [rule_from_options(self.name, group) for group in self.param_groups]
        states = [self._state_of(rule, params) for rule, params in zip(rules, layout.params, strict=True)]
        for index, block in enumerate(layout.blocks):
            number = layout.group_of[index]
            group = self.param_groups[number]
            # Its last use: the estimate may take the place of the direction.
            estimate = layout.perturbation.restore(index, directions[-1].part(index), sign=sign)
            torch._foreach_mul_(estimate, slopes[-1])
            for direction, slope in zip(directions[:-1], slopes[:-1], strict=True):
                used = layout.perturbation.used(index, direction.part(index))
                torch._foreach_add_(estimate, used, alpha=slope)
            state = {slot: block.select(tensors) for slot, tensors in states[number].items()}
            rules[number].update(block.pieces, estimate, state, lr=float(group["lr"]), step=group["step"])

    @property
    def replays(self) -> bool:
        """Whether a step is a sum of its directions, so that `undo` needs no more than its numbers."""
        return not self._rule.slots and (not self._takes_signs or self.queries == 1)

    @property
    def _takes_signs(self) -> bool:
        return OPTIMIZERS[self.name].adapts == "sign"

    def reseed(self, seed: int) -> None:
        """The coming step draws from this seed."""
        self._generator.manual_seed(seed)

    @torch.no_grad()
    def undo(self, seed: int, slopes: Sequence[float], lrs: Sequence[float]) -> None:
        """Take back the step that began with ``reseed(seed)``, up to the rounding of its sums.

        Args:
            seed: Its seed.
            slopes: Slopes that it used, one for each query.
            lrs: Step size of every group.

        Raises:
            ValueError: If steps cannot be taken back from these numbers; see `replays`.
        """
        if not self.replays:
            raise ValueError(f"{type(self).__name__} has a memory: its steps cannot be taken back from their numbers")
        layout = self._current_layout()
        layout.perturbation.begin()
        self.reseed(seed)
        size = math.sqrt(sum(s * s for s in slopes) / self.queries) if self._rule.normalizes else 1.0
        for slope in slopes:
            direction = Direction(layout.blocks, self._generator, law=self.directions, keep=False)
            for index, block in enumerate(layout.blocks):
                moved = layout.perturbation.used(index, direction.part(index))
                torch._foreach_mul_(moved, slope / (size or 1.0) / self.queries)
                if self._takes_signs:
                    torch._foreach_sign_(moved)
                torch._foreach_add_(block.pieces, moved, alpha=lrs[layout.group_of[index]])
        for group, params, lr in zip(self.param_groups, layout.params, lrs, strict=True):
            group["step"] -= 1
            if group.get("weight_decay") and params:
                torch._foreach_div_(params, 1.0 - lr * group["weight_decay"])

    def _state_of(self, rule: Rule, params: list[Tensor]) -> State:
        for p in params:
            for slot in rule.slots:
                if slot not in self.state[p]:
                    self.state[p][slot] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return {slot: [self.state[p][slot] for p in params] for slot in rule.slots}

    def _current_layout(self) -> _Layout:
        """The blocks, cut anew when a parameter was moved, replaced, frozen or added."""
        params = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        key = tuple(tuple(p.data_ptr() for p in group) for group in params)
        if self._layout is None or self._layout.key != key:
            cut = [(n, b) for n, group in enumerate(params) for b in partition(group, block_size=BLOCK_SIZE)]
            blocks = [b for _, b in cut]
            perturbation = choose_perturbation(blocks, mu=self.mu, restore=self.restore)
            self._layout = _Layout(key, params, blocks, [n for n, _ in cut], perturbation)
        return self._layout

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and ``pickle``: what PyTorch keeps, the options, and where the directions are."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().__getstate__(), **kept, "stream": (str(self._generator.device), self._generator.get_state())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` gave; also called by ``load_state_dict``, with less of it."""
        state = dict(state)
        stream = state.pop("stream", None)
        super().__setstate__(state)
        self._layout = None
        if stream is not None:
            device, position = stream
            self._generator = torch.Generator(device=device)
            self._generator.set_state(position.cpu())

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with the state of the direction stream under ``stream``."""
        return {**super().state_dict(), "stream": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        state = dict(state_dict)
        stream = state.pop("stream")
        super().load_state_dict(state)
        self._generator.set_state(stream.cpu())


_KEPT = ("mu", "queries", "directions", "restore", "one_sided", "evaluations", "control", "_rule")
"""Attributes of a zeroth-order optimizer that its copies share."""


def loss_of(closure: Closure) -> float | Tensor:
    """What a closure returns without gradients; with them where it takes derivatives itself, and fails without."""
    if not callable(closure):
        raise TypeError(
            f"step got a {type(closure).__name__}: expected a function that evaluates the loss of the batch, such as "
            "step(lambda: loss(model, batch))"
        )
    try:
        return _detached(closure())
    except RuntimeError as error:
        if torch.is_grad_enabled() or "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return _detached(closure())


def _detached(loss: float | Tensor) -> float | Tensor:
    """A loss that stays as it is, wherever the closure writes the next one."""
    if loss is None or isinstance(loss, tuple | list | dict):
        what = "nothing" if loss is None else f"a {type(loss).__name__}"
        raise TypeError(f"the closure returned {what}: expected one number, the mean loss of a batch")
    if not isinstance(loss, Tensor):
        return loss
    if loss.numel() != 1:
        raise ValueError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}: expected one number, the mean loss of a batch"
        )
    return loss.detach().clone().reshape(())


def _restore(layout: _Layout, direction: Direction, *, sign: int) -> None:
    for index in range(len(layout.blocks)):
        layout.perturbation.restore(index, direction.part(index), sign=sign)


class ZOGD(ZeroOrderOptimizer):
    """Zeroth-order gradient descent: ``x ← x − η ĝ``.

    Args:
        params: Parameters or groups of them, as for any PyTorch optimizer; all on one device.
        lr: Step size η, param²/loss; may differ between groups.
        weight_decay: w of ``ĝ + wx``, loss/param².
        mu: Smoothing radius μ, in the parameters' unit; 1e-3 by default.
        queries: Directions averaged in each estimate; 1 by default.
        directions: Their law: ``gaussian``, the default, or ``sphere`` of radius √d.
        seed: Seed of the direction stream; 0 by default.
        one_sided: Differences ``(f(θ+μu) − f(θ))/μ``, one evaluation a query and one more, whose noise has a part of
            order μ: small where μ ≪ 2‖g‖/Tr H, which ``zoscope.bounds(differences="one-sided")`` tells.
        restore: How parameters come back from a perturbation: ``auto``, ``snapshot`` (a copy) or ``fixed-point`` (no
            copy; rounds the parameters once to a grid on which perturbations are exact).

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "gd"

    def __init__(
        self, params: Parameters, lr: float, *, weight_decay: float = 0.0, **query: Unpack[QueryOptions]
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, **query)


class ZOGDM(ZeroOrderOptimizer):
    """Zeroth-order gradient descent with momentum: ``m ← βm + (1−τ)(ĝ + wx); x ← x − ηm``.

    Args:
        params: See `ZOGD`; so for the options not listed.
        lr: Step size η, param²/loss.
        beta: β in ``[0, 1)``.
        dampening: τ in ``[0, 1)``.
        weight_decay: w, loss/param².

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "gdm"

    def __init__(
        self,
        params: Parameters,
        lr: float,
        *,
        beta: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        **query: Unpack[QueryOptions],
    ) -> None:
        defaults = {"lr": lr, "beta": beta, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults, **query)


class ZOAdam(ZeroOrderOptimizer):
    """Zeroth-order Adam; the same rule as ``torch.optim.Adam``, fed by the estimate.

    Args:
        params: See `ZOGD`; so for the options not listed.
        lr: Step size η.
        betas: β₁ and β₂, each in ``[0, 1)``.
        eps: ε ≥ 0, in the unit of the gradient.

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "adam"

    def __init__(
        self,
        params: Parameters,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **query: Unpack[QueryOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, **query)


class ZOSignSGD(ZeroOrderOptimizer):
    """ZO-SignSGD: ``x ← x − η sign(ĝ)`` in every coordinate (Liu et al., ICLR 2019).

    Args:
        params: See `ZOGD`; so for the options not listed.
        lr: Step size η: how far every parameter moves, param.

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "signsgd"

    def __init__(self, params: Parameters, lr: float, **query: Unpack[QueryOptions]) -> None:
        super().__init__(params, {"lr": lr}, **query)


class ZONormalized(ZeroOrderOptimizer):
    """Normalised ZO: ``x ← x − η ĝ/s``, s the root mean square of the slopes ``(f(θ+μu) − f(θ−μu))/(2μ)`` of a step.

    That is FZOO (arXiv:2506.09034), which divides by the standard deviation of the losses of a step, in units in which
    η does not depend on μ: η = FZOO's learning rate over μ. One query leaves the sign of its slope.

    Args:
        params: See `ZOGD`; so for the options not listed.
        lr: Step size η, param.

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "normalized"

    def __init__(self, params: Parameters, lr: float, **query: Unpack[QueryOptions]) -> None:
        super().__init__(params, {"lr": lr}, **query)
