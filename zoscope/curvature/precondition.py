"""Adam's frozen preconditioner P: its closed form, a stored optimizer state, and how nearly it commutes with H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoscope.errors import NumericalError
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from zoscope.curvature.operators import LinearOperator
    from zoscope.theory.moments import EstimatorMoments

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

    Source: arXiv:2604.14669; the constants as in the README's theory section.
    """
    root = expected_diagonal(gradient, moments=moments, eps=0.0)
    return assemble(root, eps=eps, source="expected", dtype=gradient.dtype)


def expected_diagonal(
    gradient: Tensor, *, moments: EstimatorMoments, eps: float, variance: Tensor | float = 0.0
) -> Tensor:
    """``√E[ĝ²] + ε``, ``(d,)`` in float64; with mini-batches whose gradients have a ``variance`` ``(d,)`` around g."""
    squares = gradient.detach().double().square() + variance
    return (moments.a * squares + moments.b * squares.sum()).sqrt() + eps


def assemble(
    root: Tensor, *, eps: Tensor | float, source: str, dtype: torch.dtype, remarks: tuple[str, ...] = ()
) -> Preconditioner:
    """``P = root + ε`` with its checks.

    Raises:
        NumericalError: If P is zero or not finite somewhere.
    """
    diagonal = (root + eps).to(dtype)
    if not bool(torch.isfinite(diagonal).all()) or not bool((diagonal > 0).all()):
        raise NumericalError(
            f"Adam's preconditioner ({source}) is zero or not finite on some parameters: expected √v + ε > 0 "
            "everywhere. The gradient is zero and --eps is too small, or the second moments are damaged; raise --eps."
        )
    return Preconditioner(diagonal, source, float((root <= eps).double().mean()), remarks)


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
