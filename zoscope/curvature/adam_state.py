"""Second moments from a saved ``torch.optim.Adam`` or ``AdamW`` state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoscope.curvature.precondition import Preconditioner, assemble
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.problem import Objective

NESTED_UNDER = ("optimizer", "optimizer_state_dict", "optim", "optimizer_state")
"""Where training scripts keep the optimizer inside a larger checkpoint."""


@dataclass(frozen=True)
class _Entry:
    """One parameter of the file: its group's settings and its state, ``None`` when it was never updated."""

    name: str | None
    group: Mapping[str, Any]
    state: Mapping[str, Any] | None


def stored_preconditioner(
    path: Path, *, objective: Objective, betas: tuple[float, float], eps: float
) -> Preconditioner:
    """P of a run that was saved: ``(1 − β₁ᵗ)·(√(v/(1 − β₂ᵗ)) + ε)`` with v, t, β and ε of the file.

    Parameters are matched by name where the file has names (an optimizer made with ``named_parameters``), else by their
    order, and checked by shape.

    Args:
        path: File written by ``torch.save(optimizer.state_dict(), path)``, or a checkpoint that holds it under
            ``"optimizer"`` or ``"optimizer_state_dict"``.
        objective: The problem whose parameters P belongs to.
        betas: Those asked for; a difference to the file is remarked on.
        eps: As ``betas``.

    Raises:
        UsageError: If the file cannot be read safely, is no Adam state, or does not match the parameters.
        NumericalError: If P is zero or not finite somewhere.
    """
    entries = _matched(_entries(_load(path), path), objective, path)
    if all(entry.state is None for entry in entries):
        raise UsageError(
            f"--preconditioner state:{path}: the optimizer has made no step yet, so it has no second moments. Save the "
            "state after at least one step."
        )
    roots, scales, epsilons = [], [], []
    for name, parameter, entry in zip(objective.names, objective.params, entries, strict=True):
        root, scale = _corrected(entry, name=name, shape=parameter.shape, path=path)
        roots.append(root)
        scales.append(torch.full_like(root, scale))
        epsilons.append(torch.full_like(root, float(entry.group.get("eps", eps))))
    root, scale_of, eps_of = (torch.cat([part.reshape(-1) for part in parts]) for parts in (roots, scales, epsilons))
    device = objective.params[0].device
    return assemble(
        (scale_of * root).to(device),
        eps=(scale_of * eps_of).to(device),
        source=f"state:{path}",
        dtype=objective.params[0].dtype,
        remarks=_differences(entries, betas=betas, eps=eps),
    )


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(
            f"--preconditioner state:{path}: there is no such file. Expected an optimizer state saved with "
            "torch.save(optimizer.state_dict(), path)."
        ) from None
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"--preconditioner state:{path}: the file cannot be loaded as plain tensors ({reason}). Expected an "
            "optimizer state saved with torch.save(optimizer.state_dict(), path); other pickles are refused because "
            "loading them can run code."
        ) from None
    for candidate in (content, *(content.get(key) for key in NESTED_UNDER if isinstance(content, Mapping))):
        if isinstance(candidate, Mapping) and {"state", "param_groups"} <= candidate.keys():
            return candidate
    raise UsageError(
        f"--preconditioner state:{path}: this is no optimizer state dict ('state' and 'param_groups' are missing). "
        "Expected one saved with torch.save(optimizer.state_dict(), path)."
    )


def _entries(document: Mapping[str, Any], path: Path) -> list[_Entry]:
    state = document["state"]
    entries = []
    for group in document["param_groups"]:
        names: Sequence[str | None] = group.get("param_names") or [None] * len(group["params"])
        if "betas" not in group:
            raise UsageError(
                f"--preconditioner state:{path}: the optimizer has no betas, so it is not Adam. Expected the state of "
                "torch.optim.Adam or AdamW."
            )
        entries += [_Entry(name, group, state.get(index)) for index, name in zip(group["params"], names, strict=True)]
    return entries


def _matched(entries: list[_Entry], objective: Objective, path: Path) -> list[_Entry]:
    """One entry per parameter of the problem, in its order."""
    by_name = {entry.name: entry for entry in entries if entry.name is not None}
    if set(objective.names) <= by_name.keys():
        return [by_name[name] for name in objective.names]
    for candidates in (entries, [entry for entry in entries if entry.state is not None]):
        if len(candidates) == len(objective.params):
            return candidates
    raise UsageError(
        f"--preconditioner state:{path}: the file holds {len(entries)} parameters and the problem varies "
        f"{len(objective.params)}. Expected the optimizer of these very parameters; choose them with --params, or make "
        "the optimizer with model.named_parameters() so that the file knows their names."
    )


def _corrected(entry: _Entry, *, name: str, shape: torch.Size, path: Path) -> tuple[Tensor, float]:
    """``√(v/(1 − β₂ᵗ))`` and ``1 − β₁ᵗ`` of a parameter."""
    if entry.state is None:  # Adam skips a parameter without a gradient
        return torch.zeros(shape, dtype=torch.float64), 1.0
    key = "max_exp_avg_sq" if entry.group.get("amsgrad") else "exp_avg_sq"
    if key not in entry.state or "step" not in entry.state:
        raise UsageError(
            f"--preconditioner state:{path}: the state of parameter '{name}' has no '{key}' or no 'step', so it is not "
            "Adam's. Expected the state of torch.optim.Adam or AdamW."
        )
    second = entry.state[key].double()
    if second.shape != shape:
        raise UsageError(
            f"--preconditioner state:{path}: parameter '{name}' has shape {tuple(shape)}, the file has "
            f"{tuple(second.shape)} in its place. Parameters are matched by name, else by order: expected the "
            "optimizer of these very parameters, in the order of model.named_parameters()."
        )
    step = float(entry.state["step"])
    if step < 1:
        raise UsageError(
            f"--preconditioner state:{path}: parameter '{name}' has made no step yet, so it has no second moment. "
            "Save the state after at least one step."
        )
    beta1, beta2 = (float(beta) for beta in entry.group["betas"])
    return (second / (1 - beta2**step)).sqrt(), 1 - beta1**step


def _differences(entries: list[_Entry], *, betas: tuple[float, float], eps: float) -> tuple[str, ...]:
    group = entries[0].group
    stored = tuple(float(beta) for beta in group["betas"]), float(group.get("eps", eps))
    if stored == (tuple(betas), eps):
        return ()
    return (
        f"The stored optimizer ran with betas {stored[0]} and eps {stored[1]:g}, the bounds were asked for betas "
        f"{tuple(betas)} and eps {eps:g}: P is the stored one, the momentum is the one asked for.",
    )
