"""The quadratic model that ``linearized`` runs walk on: as a matrix where that is small, else in its eigenbasis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoscope.analysis.measuring import curvature_operator
from zoscope.curvature.operators import gradient
from zoscope.optim.surface import QuadraticSurface

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.analysis.probing.forecast import Forecast
    from zoscope.analysis.probing.request import ProbeRequest
    from zoscope.problem import Objective
    from zoscope.theory.spectrum import Spectrum

DENSE_LIMIT = 4096
"""Largest dimension in which the quadratic model is held as a matrix."""

MOST_MODES = 1 << 16
"""Most eigenvalues that are followed; those next to 0 are left out."""


def matrix_model(objective: Objective, request: ProbeRequest, origin: Tensor) -> QuadraticSurface:
    """The quadratic model at the current parameters, with all of H."""
    loss, g = gradient(objective)
    matrix = curvature_operator(objective, request.measure).dense().double()
    symmetric = 0.5 * (matrix + matrix.T)
    return QuadraticSurface(
        origin, loss=loss, gradient=g, matmat=lambda rows: (rows.double() @ symmetric).to(rows.dtype)
    )


def eigenbasis_model(forecast: Forecast, *, device: torch.device) -> tuple[QuadraticSurface, Tensor]:
    """The quadratic model with the measured spectrum, one coordinate an eigenvalue, and where its runs start.

    Isotropic directions are the same in every basis, so that this loses nothing but what the measurement of the
    spectrum does. Adam's is that of ``P^-1/2 H P^-1/2``, where P is 1.
    """
    eigenvalues = modes(forecast.spectrum)
    squares = np.zeros_like(eigenvalues)
    if forecast.gradient is not None:
        nearest = np.abs(eigenvalues[None, :] - forecast.gradient.nodes[:, None]).argmin(axis=1)
        np.add.at(squares, nearest, forecast.gradient.weights)
    scale = torch.from_numpy(eigenvalues).to(device)
    start = torch.zeros_like(scale)
    slope = torch.from_numpy(np.sqrt(squares)).to(device)
    return QuadraticSurface(start, loss=forecast.loss, gradient=slope, matmat=lambda rows: rows * scale), start


def modes(spectrum: Spectrum) -> NDArray[np.float64]:
    """A spectrum as a list of eigenvalues, largest in magnitude first."""
    parts = []
    for sign in (1.0, -1.0):
        inside = sign * spectrum.nodes > 0
        order = np.argsort(-np.abs(spectrum.nodes[inside]))
        nodes, weights = spectrum.nodes[inside][order], spectrum.weights[inside][order]
        # Extrapolated quadrature rules have negative weights here and there; their running sum is what counts.
        ends = np.maximum.accumulate(np.rint(np.cumsum(weights)).astype(int)).clip(0, MOST_MODES)
        parts.append(np.repeat(nodes, np.diff(ends, prepend=0)))
    found = np.concatenate(parts)
    return found[np.argsort(-np.abs(found))][:MOST_MODES]
