"""What ``zoscope.bounds`` returns: a frozen dataclass whose ``to_dict`` is the document ``zoscope.bounds/1``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zoscope.analysis.measured import Measured
from zoscope.analysis.optimizer_bounds import (
    Binding,
    Horizon,
    OptimizerBounds,
    Outlook,
    ThresholdName,
    Verdict,
    ci95,
    estimate_dict,
    number,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoscope.curvature.results import Curvature, Eigenvalue, ForwardCurvature

__all__ = [
    "SCHEMA",
    "Binding",
    "BoundsResult",
    "Estimator",
    "Horizon",
    "OptimizerBounds",
    "Outlook",
    "ThresholdName",
    "Verdict",
    "ci95",
    "curvature_dict",
    "eigenvalue_dict",
    "number",
]

SCHEMA = "zoscope.bounds/1"


@dataclass(frozen=True)
class Estimator:
    """The zeroth-order gradient estimate: direction law and number of averaged queries."""

    directions: Literal["gaussian", "sphere"] = "gaussian"
    queries: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {"directions": self.directions, "queries": self.queries}


@dataclass(frozen=True, kw_only=True)
class BoundsResult(Measured):
    """Curvature and step-size bounds of a problem; the other fields are those of every `Measured` result.

    Args:
        steps: The planned number of training steps N.
        rtol: Relative 95 % half-width asked for.
        curvature: One entry per operator measured.
        optimizers: One entry per update rule.
        estimator: The zeroth-order gradient estimate.
        forward: The Hessian as forward passes see it, where only those were made; ``curvature`` is empty then.
    """

    steps: int
    rtol: float
    curvature: Mapping[str, Curvature]
    optimizers: Mapping[str, OptimizerBounds]
    estimator: Estimator
    forward: ForwardCurvature | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.bounds/1``: JSON numbers, strings and null only."""
        fields = {
            "steps": self.steps,
            "rtol": self.rtol,
            "checks": {"num_hvps": self.num_check_hvps},
            "curvature": {name: curvature_dict(entry) for name, entry in self.curvature.items()}
            | ({} if self.forward is None else {"hessian": _forward_dict(self.forward)}),
            "optimizers": {name: entry.to_dict() for name, entry in self.optimizers.items()},
            "estimator": self.estimator.to_dict(),
        }
        return self.document(SCHEMA, fields)

    @property
    def num_check_hvps(self) -> int:
        """The part of ``num_hvps`` that no operator lists.

        It went into whether products repeat, what kinks add to the trace, and how far P and H are from commuting.
        """
        if self.forward is not None:
            return 0
        batches = {row.operator: row.minibatch.num_hvps for row in self.optimizers.values() if row.minibatch}
        return self.num_hvps - sum(c.num_hvps for c in self.curvature.values()) - sum(batches.values())

    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""
        from zoscope.report.bounds import render

        return render(self)


def eigenvalue_dict(eigenvalue: Eigenvalue) -> dict[str, Any]:
    """The JSON object of an eigenvalue."""
    return {
        "value": number(eigenvalue.value),
        "residual": number(eigenvalue.residual),
        "converged": eigenvalue.converged,
    }


def curvature_dict(curvature: Curvature) -> dict[str, Any]:
    """The JSON object of a measured operator."""
    return {
        "trace": estimate_dict(curvature.trace),
        "frobenius_sq": estimate_dict(curvature.frobenius_sq),
        "lambda_max": eigenvalue_dict(curvature.lambda_max),
        "lambda_min": eigenvalue_dict(curvature.lambda_min),
        "trace_positive": estimate_dict(curvature.trace_positive),
        "negative_mass": number(curvature.negative_mass),
        "effective_rank": number(curvature.effective_rank),
        "method": curvature.method,
        "hvp": curvature.hvp,
        "num_hvps": curvature.num_hvps,
        "seconds": number(curvature.seconds),
    }


def _forward_dict(found: ForwardCurvature) -> dict[str, Any]:
    unknown = ("lambda_max", "lambda_min", "trace_positive", "negative_mass", "effective_rank")
    return {
        "trace": estimate_dict(found.trace),
        "frobenius_sq": estimate_dict(found.frobenius_sq),
        **dict.fromkeys(unknown),
        "rayleigh": None if found.rayleigh is None else estimate_dict(found.rayleigh),
        "gradient_sq": estimate_dict(found.gradient_sq),
        "step": number(found.step),
        "step_disagreement": number(found.disagreement),
        "method": found.method,
        "num_hvps": found.num_hvps,
        "num_evaluations": found.num_evaluations,
        "seconds": number(found.seconds),
    }
