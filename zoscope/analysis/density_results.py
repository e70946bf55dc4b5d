"""What ``zoscope.spectrum`` returns: a frozen dataclass whose ``to_dict`` is the document ``zoscope.spectrum/1``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zoscope.analysis.measured import Measured
from zoscope.analysis.optimizer_bounds import estimate_dict, number
from zoscope.analysis.results import curvature_dict, eigenvalue_dict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoscope.curvature.results import Curvature, Eigenvalue
    from zoscope.theory.density import Decade, Density
    from zoscope.theory.spectrum import Array, Estimate

SCHEMA = "zoscope.spectrum/1"


@dataclass(frozen=True)
class LayerTrace:
    """The share of a layer in the trace.

    Args:
        name: Module that holds the parameters, or the parameter where no module does.
        num_params: How many there are.
        trace: Trace of the layer's diagonal block, loss/param².
        share: Its part of the whole trace; ``None`` where that is not positive.
    """

    name: str
    num_params: int
    trace: Estimate
    share: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "name": self.name,
            "num_params": self.num_params,
            "trace": estimate_dict(self.trace),
            "share": number(self.share),
        }


@dataclass(frozen=True, kw_only=True)
class SpectrumResult(Measured):
    """Eigenvalues of a problem's curvature matrix; the other fields are those of every `Measured` result.

    Args:
        rtol: Relative 95 % half-width asked for.
        operator: ``"hessian"`` or ``"ggn"``.
        curvature: Its moments and ends.
        top: Largest eigenvalues, the largest first.
        bottom: Smallest eigenvalues, the smallest first; none of them is among ``top``.
        outliers: Eigenvalues known one by one, ascending, loss/param²; all of them when the method is dense.
        density: Eigenvalues per decade with a 95 % band.
        decades: Counts and sums of eigenvalues by powers of ten.
        layers: Trace by layer, in the order of the parameters; ``None`` where it was not asked for.
    """

    rtol: float
    operator: str
    curvature: Curvature
    top: tuple[Eigenvalue, ...]
    bottom: tuple[Eigenvalue, ...]
    outliers: Array
    density: Density
    decades: tuple[Decade, ...]
    layers: tuple[LayerTrace, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.spectrum/1``: JSON numbers, strings and null only."""
        fields = {
            "rtol": self.rtol,
            "curvature": {self.operator: curvature_dict(self.curvature)},
            "top": [eigenvalue_dict(eigenvalue) for eigenvalue in self.top],
            "bottom": [eigenvalue_dict(eigenvalue) for eigenvalue in self.bottom],
            "outliers": _numbers(self.outliers),
            "density": _density(self.density),
            "decades": [_decade(part) for part in self.decades],
            "layers": None if self.layers is None else [layer.to_dict() for layer in self.layers],
        }
        return self.document(SCHEMA, fields)

    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""
        from zoscope.report.spectrum import render

        return render(self)


def _density(density: Density) -> dict[str, Any]:
    low, high = density.values - density.half_widths, density.values + density.half_widths
    return {
        "unit": "eigenvalues per decade, smoothed",
        "axis": "asinh(eigenvalue / (2 scale)) / ln 10",
        "scale": number(density.scale),
        "bandwidth": density.bandwidth,
        "error": number(density.error),
        "position": _numbers(density.positions),
        "eigenvalue": _numbers(density.eigenvalues),
        "value": _numbers(density.values),
        "lower": _numbers(np.maximum(low, 0.0)),
        "upper": _numbers(np.maximum(high, 0.0)),
    }


def _decade(part: Decade) -> dict[str, Any]:
    return {
        "lower": number(part.lower),
        "upper": number(part.upper),
        "count": estimate_dict(part.count),
        "sum": estimate_dict(part.total),
    }


def _numbers(values: Sequence[float] | Array) -> list[float | None]:
    return [number(float(value)) for value in values]
