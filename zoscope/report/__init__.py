"""How results look: dataclasses in, rich renderables out; nothing is computed here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoscope.report.answer import Report
    from zoscope.result import RichResult

_HOME = {
    "BoundsResult": "bounds.render",
    "CostEstimate": "bounds.render_cost",
    "CheckReport": "check.render",
    "PlanResult": "plan.render",
    "PerturbationScale": "plan.render_scale",
    "ProbeResult": "probe.render",
    "SpectrumResult": "spectrum.render",
    "MomentsResult": "spectrum.render_moments",
    "TrackResult": "track.render",
    "Comparison": "track.render_comparison",
}


def render(result: RichResult, *, verbose: bool = False, warnings: bool = True) -> Report[Any]:
    """The answer of a result, or with ``verbose`` everything; its module is loaded on first use."""
    module, name = _HOME[type(result).__name__].split(".")
    shown = getattr(import_module(f"zoscope.report.{module}"), name)
    report: Report[Any] = shown(result, verbose=verbose, warnings=warnings)
    return report
