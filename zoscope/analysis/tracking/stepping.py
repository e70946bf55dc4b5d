"""One training step, zeroth- or first-order, with the update rules of ``zoscope.optim``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from zoscope.analysis.monitoring.forward import ForwardMonitor, ForwardRecord
from zoscope.optim import ZOGD, ZOGDM, ZOAdam
from zoscope.optim.optimizers import ZeroOrderOptimizer
from zoscope.optim.rules import new_state, rule_from_options

if TYPE_CHECKING:
    from zoscope.analysis.tracking.batches import Batches
    from zoscope.analysis.tracking.request import TrackRequest
    from zoscope.problem import Objective


class Stepper(Protocol):
    """Moves the parameters of a prepared problem."""

    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """Take the step that starts at ``number``.

        Returns:
            The loss that it saw, before it moved.
        """

    def second_moment(self) -> Tensor | None:
        """Adam's v as ``(d,)``; ``None`` before the first step, and for other rules."""

    def forward(self) -> ForwardRecord | None:
        """What the loss values of the steps themselves say of the threshold, where they are watched."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


def new_stepper(objective: Objective, request: TrackRequest) -> Stepper:
    """The stepper of an optimizer."""
    return FirstOrder(objective, request) if request.first_order else ZerothOrder(objective, request)


class ZerothOrder:
    """Steps with `zoscope.ZOGD`, `zoscope.ZOGDM` or `zoscope.ZOAdam`.

    Args:
        objective: The prepared problem.
        request: The optimizer and its constants.
    """

    def __init__(self, objective: Objective, request: TrackRequest) -> None:
        self._objective = objective
        self._optimizer = _optimizer(objective, request)
        self._monitor: ForwardMonitor | None = None
        if request.forward_every is not None:
            self._monitor = ForwardMonitor(self._optimizer, every=request.forward_every)

    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """See `Stepper.step`; the mean of the losses at the two points of each query."""
        self._optimizer.param_groups[0]["lr"] = lr
        if self._monitor is None:
            return self._optimizer.step(lambda: batches.value(number))
        self._monitor.step(lambda: batches.value(number))
        seen = [loss for pair in self._optimizer.evaluations for loss in pair]
        return sum(seen) / len(seen)

    def forward(self) -> ForwardRecord | None:
        """See `Stepper.forward`."""
        return None if self._monitor is None else self._monitor.record

    def second_moment(self) -> Tensor | None:
        """See `Stepper.second_moment`."""
        states = [self._optimizer.state[p].get("exp_avg_sq") for p in self._objective.params]
        return None if any(state is None for state in states) else self._objective.flatten(states)

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        state = self._optimizer.state_dict()
        return state if self._monitor is None else {**state, "monitor": self._monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        own = dict(state)
        if self._monitor is not None:
            self._monitor.load_state_dict(own.pop("monitor"))
        self._optimizer.load_state_dict(own)


def _optimizer(objective: Objective, request: TrackRequest) -> ZeroOrderOptimizer:
    common: Any = {"mu": request.mu, "queries": request.queries, "directions": request.directions, "seed": request.seed}
    lr = request.lr_at(0)
    if request.family == "gdm":
        return ZOGDM(objective.params, lr, beta=request.beta, **common)
    if request.family == "adam":
        return ZOAdam(objective.params, lr, betas=request.betas, eps=request.eps, **common)
    return ZOGD(objective.params, lr, **common)


class FirstOrder:
    """Steps along the gradient with the same rules.

    Args:
        objective: The prepared problem.
        request: The optimizer and its constants.
    """

    def __init__(self, objective: Objective, request: TrackRequest) -> None:
        self._objective = objective
        options = {"beta": request.beta, "betas": request.betas, "eps": request.eps}
        self._rule = rule_from_options(request.family, options)
        self._state = new_state(self._rule, objective.params)
        self._steps = 0

    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """See `Stepper.step`."""
        loss, flat = batches.gradient(number)
        self._steps += 1
        with torch.no_grad():
            gradients = self._objective.unflatten(flat)
            self._rule.update(self._objective.params, gradients, self._state, lr=lr, step=self._steps)
        return loss

    def second_moment(self) -> Tensor | None:
        """See `Stepper.second_moment`."""
        return (
            self._objective.flatten(self._state["exp_avg_sq"]) if "exp_avg_sq" in self._state and self._steps else None
        )

    def forward(self) -> ForwardRecord | None:
        """See `Stepper.forward`; a gradient step sees one loss and no curvature."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        return {"state": self._state, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        self._steps = int(state["steps"])
        for slot, tensors in self._state.items():
            for own, stored in zip(tensors, state["state"][slot], strict=True):
                own.copy_(stored)
