"""What an optimizer of somebody else's loop is, in zoscope's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zoscope.optim.optimizers import ZeroOrderOptimizer

NAMES = ("gd", "gdm", "adam", "zo-gd", "zo-gdm", "zo-adam")


@dataclass(frozen=True)
class OptimizerSetup:
    """Name and constants of an optimizer.

    Args:
        name: ``zo-gd`` and so on.
        constants: ``beta``; or ``betas`` and ``eps``; and ``queries``, ``directions``, ``mu`` of a zeroth-order one.
    """

    name: str
    constants: dict[str, Any]


def setup_of(optimizer: Optimizer) -> OptimizerSetup:
    """Recognise a PyTorch optimizer by its class and its first parameter group.

    Raises:
        ValueError: If it is none that the theory covers.
    """
    group = optimizer.param_groups[0]
    if isinstance(optimizer, ZeroOrderOptimizer):
        constants = {"queries": optimizer.queries, "directions": optimizer.directions, "mu": optimizer.mu}
        constants |= {key: group[key] for key in ("beta", "betas", "eps") if key in group}
        return OptimizerSetup(f"zo-{optimizer.name}", constants)
    if isinstance(optimizer, torch.optim.SGD):
        if group["nesterov"] or group["dampening"]:
            raise ValueError("SGD with Nesterov momentum or dampening is not covered: expected plain or heavy-ball SGD")
        beta = float(group["momentum"])
        return OptimizerSetup("gdm", {"beta": beta}) if beta else OptimizerSetup("gd", {})
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        betas = tuple(float(beta) for beta in group["betas"])
        return OptimizerSetup("adam", {"betas": betas, "eps": float(group["eps"])})
    raise ValueError(
        f"optimizer is a {type(optimizer).__name__}: expected SGD, Adam, AdamW, zoscope.ZOGD, ZOGDM or ZOAdam, or one "
        f"of the names {', '.join(NAMES)}"
    )


def differing(optimizer: Optimizer) -> tuple[str, ...]:
    """Constants in which parameter groups differ from the first one, beside the step size; that one's are used."""
    first, *others = optimizer.param_groups
    names = ("momentum", "beta", "betas", "eps")
    return tuple(name for name in names if any(group.get(name) != first.get(name) for group in others))


def step_sizes(optimizer: Optimizer, params: Sequence[Tensor]) -> list[float] | None:
    """The step size of each of some parameters; ``None`` where all groups have the same.

    A parameter that the optimizer does not have counts as one of the first group.
    """
    groups = optimizer.param_groups
    if len({float(group["lr"]) for group in groups}) == 1:
        return None
    found = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    return [found.get(id(p), float(groups[0]["lr"])) for p in params]


def spread_out(values: Sequence[float], params: Sequence[Tensor]) -> Tensor:
    """A value for each parameter as ``(d,)`` in float64, on the parameters' device."""
    parts = [p.new_full((p.numel(),), value, dtype=torch.float64) for p, value in zip(params, values, strict=True)]
    return torch.cat(parts)


@torch.no_grad()
def second_moment(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """Adam's v along ``params`` as ``(d,)`` and the steps that it has seen; ``None`` where it is not there yet."""
    states: list[Any] = [optimizer.state.get(p, {}) for p in params]
    if not states or any("exp_avg_sq" not in state for state in states):
        return None, 0
    # The zeroth-order optimizers count steps in the group.
    step = states[0].get("step", optimizer.param_groups[0].get("step", 0))
    flat = torch.cat([state["exp_avg_sq"].reshape(-1) for state in states])
    return flat, int(step)
