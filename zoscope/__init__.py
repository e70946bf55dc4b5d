"""Step-size stability bounds for zeroth-order and first-order optimization, from your model's curvature.

The public names load on first use, so that ``import zoscope`` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoscope._version import __version__

if TYPE_CHECKING:
    from zoscope.analysis.bounds import bounds as bounds
    from zoscope.analysis.check import check as check
    from zoscope.analysis.monitor import ForwardMonitor as ForwardMonitor
    from zoscope.analysis.monitor import StabilityMonitor as StabilityMonitor
    from zoscope.analysis.plan import plan as plan
    from zoscope.analysis.probe import probe as probe
    from zoscope.analysis.spectrum import moments as moments
    from zoscope.analysis.spectrum import spectrum as spectrum
    from zoscope.analysis.track import track as track
    from zoscope.errors import NumericalError as NumericalError
    from zoscope.errors import SpecError as SpecError
    from zoscope.errors import UsageError as UsageError
    from zoscope.errors import ZoscopeError as ZoscopeError
    from zoscope.optim import ZOGD as ZOGD
    from zoscope.optim import ZOGDM as ZOGDM
    from zoscope.optim import ZOAdam as ZOAdam
    from zoscope.problem import Problem as Problem

_HOME = {
    "Problem": "zoscope.problem",
    "bounds": "zoscope.analysis.bounds",
    "plan": "zoscope.analysis.plan",
    "probe": "zoscope.analysis.probe",
    "check": "zoscope.analysis.check",
    "track": "zoscope.analysis.track",
    "spectrum": "zoscope.analysis.spectrum",
    "moments": "zoscope.analysis.spectrum",
    "StabilityMonitor": "zoscope.analysis.monitor",
    "ForwardMonitor": "zoscope.analysis.monitor",
    "ZOGD": "zoscope.optim",
    "ZOGDM": "zoscope.optim",
    "ZOAdam": "zoscope.optim",
    "ZoscopeError": "zoscope.errors",
    "UsageError": "zoscope.errors",
    "SpecError": "zoscope.errors",
    "NumericalError": "zoscope.errors",
}

__all__ = [
    "ZOGD",
    "ZOGDM",
    "ForwardMonitor",
    "NumericalError",
    "Problem",
    "SpecError",
    "StabilityMonitor",
    "UsageError",
    "ZOAdam",
    "ZoscopeError",
    "__version__",
    "bounds",
    "check",
    "moments",
    "plan",
    "probe",
    "spectrum",
    "track",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home, once (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'zoscope' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
