"""Adam's preconditioner: expected where training stands, or from the state dict of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.slq import Curvature
from zoscope.errors import NumericalError, UsageError
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum

if TYPE_CHECKING:
    from zoscope.curvature.operators import LinearOperator
    from zoscope.problem import Objective
    from zoscope.theory.rules import EstimatorMoments

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
    found = [
        _corrected(entry, name=name, shape=parameter.shape, eps=eps, path=path)
        for name, parameter, entry in zip(objective.names, objective.params, entries, strict=True)
    ]
    root, floor = (torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*found, strict=True))
    first = objective.params[0]
    return assemble(
        root.to(first.device),
        eps=floor.to(first.device),
        source=f"state:{path}",
        dtype=first.dtype,
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


def _corrected(entry: _Entry, *, name: str, shape: torch.Size, eps: float, path: Path) -> tuple[Tensor, Tensor]:
    """``√(v/(1 − β₂ᵗ))`` and ε of a parameter, each times ``1 − β₁ᵗ``, in its shape."""
    floor = torch.full(shape, float(entry.group.get("eps", eps)), dtype=torch.float64)
    if entry.state is None:  # Adam skips a parameter without a gradient
        return torch.zeros_like(floor), floor
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
    scale = 1 - beta1**step
    return scale * (second / (1 - beta2**step)).sqrt(), scale * floor


def _differences(entries: list[_Entry], *, betas: tuple[float, float], eps: float) -> tuple[str, ...]:
    group = entries[0].group
    stored = tuple(float(beta) for beta in group["betas"]), float(group.get("eps", eps))
    if stored == (tuple(betas), eps):
        return ()
    return (
        f"The stored optimizer ran with betas {stored[0]} and eps {stored[1]:g}, the bounds were asked for betas "
        f"{tuple(betas)} and eps {eps:g}: P is the stored one, the momentum is the one asked for.",
    )


EXACT_DIMENSION = 64
"""Up to this many parameters all coordinate vectors are used instead of random probe vectors."""


@dataclass(frozen=True)
class Preconditioner:
    """The diagonal of P, with what a reader should know of it.

    Args:
        diagonal: ``(d,)``, positive, in units of a gradient.
        source: ``"expected"`` or ``"state:FILE"``.
        collapsed: Share of the coordinates on which ε is the larger part of P.
        remarks: Sentences for the reader.
    """

    diagonal: Tensor
    source: str
    collapsed: float
    remarks: tuple[str, ...] = ()


def expected_preconditioner(gradient: Tensor, *, moments: EstimatorMoments, eps: float) -> Preconditioner:
    """P that Adam settles on where it stands: ``√E[ĝ²] + ε`` with ``E[ĝ_i²] = a g_i² + b ‖g‖²``.

    Args:
        gradient: ``(d,)``, loss/param.
        moments: Constants of the estimator; ``a = 1 + 1/q``, ``b = 1/q`` for Gaussian directions.
        eps: Adam's ε.

    Raises:
        NumericalError: If P is zero or not finite somewhere.

    Source: arXiv:2604.14669; the constants as in the guide's page on theory.
    """
    root = expected_diagonal(gradient, moments=moments, eps=0.0)
    return assemble(root, eps=eps, source="expected", dtype=gradient.dtype)


def expected_diagonal(
    gradient: Tensor, *, moments: EstimatorMoments, eps: float, variance: Tensor | float = 0.0
) -> Tensor:
    """``√E[ĝ²] + ε``, ``(d,)`` in float64; with mini-batches whose gradients have a ``variance`` ``(d,)`` around g."""
    squares = gradient.detach().double().square() + variance
    return (moments.a * squares + moments.b * squares.sum()).sqrt() + eps


def current_diagonal(v: Tensor, step: int, *, betas: tuple[float, float], eps: float) -> Tensor:
    """``P_t = (1−β₁ᵗ)·(√(v/(1−β₂ᵗ)) + ε)`` after t steps, in float64, in the shape of the second moment v."""
    beta1, beta2 = betas
    scale: Tensor = (1.0 - beta1**step) * (torch.sqrt(v.double() / (1.0 - beta2**step)) + eps)
    return scale


def assemble(
    root: Tensor, *, eps: Tensor | float, source: str, dtype: torch.dtype, remarks: tuple[str, ...] = ()
) -> Preconditioner:
    """``P = root + ε`` with its checks.

    Raises:
        NumericalError: If P is zero or not finite somewhere.
    """
    diagonal = (root + eps).to(dtype)
    # A device is waited for once.
    usable = (torch.isfinite(diagonal) & (diagonal > 0)).all()
    usable, collapsed = torch.stack([usable.double(), (root <= eps).double().mean()]).tolist()
    if not usable:
        raise NumericalError(
            f"Adam's preconditioner ({source}) is zero or not finite on some parameters: expected √v + ε > 0 "
            "everywhere. The gradient is zero and --eps is too small, or the second moments are damaged; raise --eps."
        )
    return Preconditioner(diagonal, source, collapsed, remarks)


@dataclass(frozen=True)
class PreconditionerProbes:
    """What a few probe vectors say about P and H together.

    Args:
        commutator: ``‖PH − HP‖_F / ‖PH‖_F``.
        trace_correction: ``Tr P⁻¹HP⁻¹ − shift·Tr P^-½HP^-½``.
        shift: The multiple that leaves the smallest correction.
    """

    commutator: Estimate
    trace_correction: Estimate
    shift: float


def probe_preconditioner(
    operator: LinearOperator, diagonal: Tensor, *, generator: torch.Generator, probes: int = 4
) -> PreconditionerProbes:
    """Estimate how far P and H are from commuting, with two products per probe vector.

    ``‖A‖_F² = E‖Az‖²`` for ``z ~ N(0, I)``. The commutator does not change when a multiple of the identity is taken off
    P, which avoids cancellation for a P that is nearly one. The same products ``Hz`` give ``Tr P⁻¹HP⁻¹ = Tr P⁻²H`` as a
    correction to ``Tr P⁻¹H``, already known precisely: ``E zᵀ(P⁻² − shift·P⁻¹)Hz``.

    Args:
        operator: H, dimension ``d``.
        diagonal: ``(d,)`` diagonal of P.
        generator: Source of the probe vectors.
        probes: Number of probe vectors; all coordinate vectors are used for ``d ≤ 64``.
    """
    vectors = _probe_vectors(operator, probes=probes, generator=generator)
    exact = operator.dim <= EXACT_DIMENSION
    p = diagonal.double()
    centred = p - p.mean()
    products = operator.matmat(vectors).double()
    swapped = operator.matmat((centred * vectors).to(vectors.dtype)).double()
    shift = float((p**-3).sum() / (p**-2).sum())
    above = (centred * products - swapped).square().sum(dim=1)
    below = (p * products).square().sum(dim=1)
    corrections = (vectors.double() * (p**-2 - shift / p) * products).sum(dim=1)
    spread = 0.0 if exact else float(corrections.std()) / len(vectors) ** 0.5
    return PreconditionerProbes(
        commutator=_root_of_ratio(above, below, exact=exact),
        trace_correction=Estimate(float(corrections.mean()), spread),
        shift=shift,
    )


def _probe_vectors(operator: LinearOperator, *, probes: int, generator: torch.Generator) -> Tensor:
    dim, dtype, device = operator.dim, operator.dtype, operator.device
    if dim <= EXACT_DIMENSION:
        return torch.eye(dim, dtype=dtype, device=device).mul_(dim**0.5)
    return torch.randn((max(probes, 2), dim), generator=generator, dtype=dtype, device=device)


def _root_of_ratio(above: Tensor, below: Tensor, *, exact: bool) -> Estimate:
    """``√(mean above / mean below)`` with a standard error by the delta method."""
    scale = float(below.mean())
    if scale == 0:
        return Estimate(0.0)
    ratio = float(above.mean()) / scale
    if exact or ratio == 0:
        return Estimate(ratio**0.5)
    spread = float((above - ratio * below).std()) / (len(above) ** 0.5 * scale)
    return Estimate(ratio**0.5, spread / (2 * ratio**0.5))


def nearly_scalar(diagonal: Tensor) -> tuple[float, float]:
    """The number that a positive diagonal is nearest to, in ratios, and how far the farthest entry is from it.

    Args:
        diagonal: ``(d,)``, positive.

    Returns:
        ``√(p_min p_max)`` and ``√(p_max/p_min) − 1``.
    """
    low, high = float(diagonal.min()), float(diagonal.max())
    return math.sqrt(low * high), math.sqrt(high / low) - 1.0


def divided(curvature: Curvature, *, by: float, spread: float) -> Curvature:
    """The curvature of ``P^-1/2 M P^-1/2`` from that of M, for a diagonal P within ``by·(1+spread)^±1``.

    By Ostrowski's theorem each eigenvalue of the former is one of M divided by a number in that range, so that every
    error grows by at most a factor ``1 + spread`` on the nodes, which becomes quadrature error here.

    Args:
        curvature: Of M; its block traces are left out.
        by: What P is nearly a multiple of the identity by.
        spread: Relative distance of its farthest entry.

    Source: A. M. Ostrowski, A quantitative formulation of Sylvester's law of inertia, PNAS 45 (1959).
    """
    spectrum = _divided_spectrum(curvature.spectrum, by=by, spread=spread)
    positive = spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    ritz = tuple(
        replace(e, value=e.value / by, residual=e.residual / by + spread * abs(e.value / by)) for e in curvature.ritz
    )
    vector = curvature.vector_measure
    return replace(
        curvature,
        trace=spectrum.trace_of(lambda x: x),
        frobenius_sq=spectrum.trace_of(np.square),
        lambda_max=ritz[-1],
        lambda_min=ritz[0],
        trace_positive=positive,
        negative_mass=curvature.negative_mass / by,
        num_hvps=0,
        seconds=0.0,
        spectrum=spectrum,
        ritz=ritz,
        block_traces=None,
        # Its vector is divided by √P as well.
        vector_measure=None if vector is None else Spectrum(vector.nodes / by, vector.weights / by),
        notes=(),
    )


def _divided_spectrum(spectrum: SampledSpectrum, *, by: float, spread: float) -> SampledSpectrum:
    def over(part: Spectrum) -> Spectrum:
        return Spectrum(part.nodes / by, part.weights)

    fine = over(spectrum.fine)
    moved = tuple(
        Spectrum(np.concatenate([fine.nodes * factor, fine.nodes]), np.concatenate([fine.weights, -fine.weights]))
        for factor in (1.0 + spread, 1.0 / (1.0 + spread))
    )
    errors = tuple(tuple(over(error) for error in kind) for kind in spectrum.errors)
    return replace(
        spectrum,
        fine=fine,
        sampled=over(spectrum.sampled),
        errors=(*errors, moved) if spread > 0 else errors,
        probes=tuple(over(rule) for rule in spectrum.probes),
    )
