"""A curvature seen through a preconditioner that is nearly a multiple of the identity: no product needed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from zoscope.curvature.results import Curvature, Eigenvalue
from zoscope.theory.spectrum import Estimate, SampledSpectrum, Spectrum


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
        curvature: Of M.
        by: What P is nearly a multiple of the identity by.
        spread: Relative distance of its farthest entry.

    Source: A. M. Ostrowski, A quantitative formulation of Sylvester's law of inertia, PNAS 45 (1959).
    """
    spectrum = _divided_spectrum(curvature.spectrum, by=by, spread=spread)
    positive = spectrum.trace_of(lambda x: np.maximum(x, 0.0))
    ritz = tuple(_divided_eigenvalue(e, by=by, spread=spread) for e in curvature.ritz)
    vector = curvature.vector_measure
    return replace(
        curvature,
        trace=spectrum.trace_of(lambda x: x),
        frobenius_sq=spectrum.trace_of(np.square),
        lambda_max=_divided_eigenvalue(curvature.lambda_max, by=by, spread=spread),
        lambda_min=_divided_eigenvalue(curvature.lambda_min, by=by, spread=spread),
        trace_positive=positive,
        negative_mass=curvature.negative_mass / by,
        num_hvps=0,
        seconds=0.0,
        spectrum=spectrum,
        ritz=ritz,
        block_traces=None
        if curvature.block_traces is None
        else tuple(_divided_estimate(e, by=by, spread=spread) for e in curvature.block_traces),
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


def _divided_eigenvalue(eigenvalue: Eigenvalue, *, by: float, spread: float) -> Eigenvalue:
    value = eigenvalue.value / by
    return Eigenvalue(value, eigenvalue.residual / by + spread * abs(value), eigenvalue.converged)


def _divided_estimate(estimate: Estimate, *, by: float, spread: float) -> Estimate:
    value = estimate.value / by
    return Estimate(value, estimate.stderr / by, estimate.quadrature / by + spread * abs(value))
