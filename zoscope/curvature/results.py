"""What a curvature measurement returns."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zoscope.curvature.jumps import Jump
from zoscope.curvature.lanczos import Jacobi, rounding
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum

Method = Literal["dense", "deflated-slq", "forward"]

EIGENVALUE_TOLERANCE = 0.01
"""Residual of a converged eigenvalue, in units of its value."""


NORM = 3.0
"""Half-width wanted of the norm, in units of that of the trace: what one product tells of it is about as much."""


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue of a symmetric operator.

    Args:
        value: Eigenvalue in loss/param².
        residual: ``‖Mv - λv‖`` of the unit Ritz vector; some eigenvalue lies within this distance.
        converged: Whether the residual is at most 1 % of the value.
    """

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True)
class Curvature:
    """Everything that one measuring pass learns about a symmetric operator ``M`` of dimension d.

    Args:
        trace: ``Tr M``.
        frobenius_sq: ``‖M‖_F²``.
        lambda_max: Largest eigenvalue (algebraic).
        lambda_min: Smallest eigenvalue (algebraic).
        trace_positive: Sum of the positive eigenvalues.
        negative_mass: Sum of ``|λ|`` over the negative eigenvalues, ≥ 0.
        effective_rank: ``(Σλ)²/Σλ²`` over the positive eigenvalues; 0 when there are none.
        method: How it was measured.
        num_hvps: Matrix-vector products spent.
        seconds: Wall time spent.
        spectrum: Nodes and weights from which every threshold is computed.
        ritz: Eigenvalues found one by one, ascending: all of them when dense, else the Ritz values of a Krylov space.
            There the ends converge first, and a repeated eigenvalue appears once.
        block_traces: Traces of the diagonal blocks that were asked for; ``None`` when none were.
        vector_measure: Spectral measure of the vector that was given, ``Σ w f(θ) = vᵀ f(M) v``; ``None`` without one.
        notes: What the user should know about how the measurement went.
        hvp: How Hessian-vector products were computed; ``None`` where there is but one way.
    """

    trace: Estimate
    frobenius_sq: Estimate
    lambda_max: Eigenvalue
    lambda_min: Eigenvalue
    trace_positive: Estimate
    negative_mass: float
    effective_rank: float
    method: Method
    num_hvps: int
    seconds: float
    spectrum: SampledSpectrum
    ritz: tuple[Eigenvalue, ...] = ()
    block_traces: tuple[Estimate, ...] | None = None
    vector_measure: Spectrum | None = None
    notes: tuple[str, ...] = ()
    hvp: str | None = None


@dataclass(frozen=True)
class ForwardNoise:
    """How single examples e spread around their mean, by groups of directions; see ``measure_forward``.

    Args:
        gradient_sq: ``(m,)`` estimates of ``E‖g_e − g‖²``.
        curvature: ``(m,)`` estimates of ``E (g_e − g)ᵀH(g_e − g)``.
        slopes_sq: ``(m,)`` estimates of ``‖g‖²`` from the same directions.
        gradient_error: Error of ``gradient_sq`` from truncation and rounding.
        slopes_error: The same of ``slopes_sq``.
        hessian_sq: ``E‖H_e − H‖_F²``.
    """

    gradient_sq: NDArray[np.float64]
    curvature: NDArray[np.float64]
    slopes_sq: NDArray[np.float64]
    gradient_error: float
    slopes_error: float
    hessian_sq: Estimate


@dataclass(frozen=True)
class ForwardCurvature:
    """What forward passes learn about the Hessian H, of dimension d; see ``measure_forward``.

    Args:
        trace: ``Tr H``.
        frobenius_sq: ``‖H‖_F²``.
        gradient_sq: ``‖g‖²``, loss²/param².
        rayleigh: ``gᵀHg/‖g‖²``; ``None`` for a zero gradient.
        loss: Loss at the parameters.
        indefinite: Whether negative curvature was seen along a direction.
        step: Step h of the differences along directions of unit entries, param.
        disagreement: Error of the trace from truncation and rounding, relative, from what single directions show at
            steps of h/2 and h; part of the errors above.
        num_hvps: Directions spent, each two evaluations; what stands for a Hessian-vector product here.
        num_evaluations: Evaluations of the whole loss.
        seconds: Wall time spent.
        notes: What the user should know about how the measurement went.
        noise: How examples spread, where that was asked for.
        jump: Where the loss is constant but for jumps.
    """

    trace: Estimate
    frobenius_sq: Estimate
    gradient_sq: Estimate
    rayleigh: Estimate | None
    loss: float
    indefinite: bool
    step: float
    disagreement: float
    num_hvps: int
    num_evaluations: int
    seconds: float
    notes: tuple[str, ...] = ()
    method: Method = "forward"
    noise: ForwardNoise | None = None
    jump: Jump | None = None


@dataclass(frozen=True)
class Moments:
    """What `measure_moments` learns about a symmetric operator M.

    Args:
        trace: ``Tr M``, loss/param².
        frobenius_sq: ``‖M‖_F²``.
        lambda_max: Largest eigenvalue (algebraic).
        pieces: Pieces of the data with probe vectors of their own; 1 where all examples share them.
        num_hvps: Products spent, a sweep of all pieces counted as one.
        seconds: Wall time spent.
        hvp: How Hessian-vector products were computed; ``None`` where there is but one way.
        notes: What the user should know about how the measurement went.
    """

    trace: Estimate
    frobenius_sq: Estimate
    lambda_max: Eigenvalue
    pieces: int
    num_hvps: int
    seconds: float
    hvp: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative 95 % half-width of the trace, or a third of that of the norm where it is larger."""
        return max(relative(self.trace), relative(self.frobenius_sq) / NORM)


def relative(estimate: Estimate) -> float:
    """95 % half-width over the value; infinite for 0 with an error."""
    if estimate.half_width == 0:
        return 0.0
    return estimate.half_width / abs(estimate.value) if estimate.value else math.inf


def ritz_values(jacobi: Jacobi, *, dtype: torch.dtype) -> tuple[Eigenvalue, ...]:
    """Ritz values of a chain, ascending, with residuals, which contain the rounding of a number format."""
    values, vectors = jacobi.eigh()
    noise = rounding(dtype, float(np.abs(values).max()))
    residuals = np.hypot(jacobi.betas[-1] * np.abs(vectors[-1]), noise)
    return tuple(
        Eigenvalue(float(value), float(residual), converged=bool(residual <= EIGENVALUE_TOLERANCE * abs(value)))
        for value, residual in zip(values, residuals, strict=True)
    )
