"""Step-size stability bounds for zeroth-order and first-order optimization, from your model's curvature.

The public names load on first use, so that ``import zoscope`` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoscope._version import __version__
from zoscope.registry import OPTIMIZERS

if TYPE_CHECKING:
    from zoscope.analysis.bounds import bounds as bounds
    from zoscope.analysis.check import check as check
    from zoscope.analysis.check_results import CheckReport as CheckReport
    from zoscope.analysis.check_results import CheckResult as CheckResult
    from zoscope.analysis.monitor import ForwardMonitor as ForwardMonitor
    from zoscope.analysis.monitor import ForwardRecord as ForwardRecord
    from zoscope.analysis.monitor import StabilityMonitor as StabilityMonitor
    from zoscope.analysis.plan import PlanInterruptedError as PlanInterruptedError
    from zoscope.analysis.plan import PlanResult as PlanResult
    from zoscope.analysis.plan import plan as plan
    from zoscope.analysis.probe import probe as probe
    from zoscope.analysis.probe_results import ProbeInterruptedError as ProbeInterruptedError
    from zoscope.analysis.probe_results import ProbeResult as ProbeResult
    from zoscope.analysis.probe_results import ProbeRun as ProbeRun
    from zoscope.analysis.spectrum import MomentsResult as MomentsResult
    from zoscope.analysis.spectrum import SpectrumResult as SpectrumResult
    from zoscope.analysis.spectrum import moments as moments
    from zoscope.analysis.spectrum import spectrum as spectrum
    from zoscope.analysis.thresholds import BoundsResult as BoundsResult
    from zoscope.analysis.thresholds import OptimizerBounds as OptimizerBounds
    from zoscope.analysis.track import track as track
    from zoscope.analysis.track_folder import RunFolderError as RunFolderError
    from zoscope.analysis.track_results import Record as Record
    from zoscope.analysis.track_results import TrackInterruptedError as TrackInterruptedError
    from zoscope.analysis.track_results import TrackResult as TrackResult
    from zoscope.errors import NumericalError as NumericalError
    from zoscope.errors import SpecError as SpecError
    from zoscope.errors import UsageError as UsageError
    from zoscope.errors import ZoscopeError as ZoscopeError
    from zoscope.optim import *  # noqa: F403 - the names of its __all__
    from zoscope.optim.auto_lr import AutoLR as AutoLR
    from zoscope.optim.auto_lr import AutoLRRecord as AutoLRRecord
    from zoscope.planning.mu import perturbation_scale as perturbation_scale
    from zoscope.problem import Notice as Notice
    from zoscope.problem import Problem as Problem
    from zoscope.theory.spectrum import Estimate as Estimate

_HOME = {
    "Problem": "zoscope.problem",
    "bounds": "zoscope.analysis.bounds",
    "plan": "zoscope.analysis.plan",
    "perturbation_scale": "zoscope.planning.mu",
    "probe": "zoscope.analysis.probe",
    "check": "zoscope.analysis.check",
    "track": "zoscope.analysis.track",
    "spectrum": "zoscope.analysis.spectrum",
    "moments": "zoscope.analysis.spectrum",
    "StabilityMonitor": "zoscope.analysis.monitor",
    "ForwardMonitor": "zoscope.analysis.monitor",
    "BoundsResult": "zoscope.analysis.thresholds",
    "OptimizerBounds": "zoscope.analysis.thresholds",
    "SpectrumResult": "zoscope.analysis.spectrum",
    "MomentsResult": "zoscope.analysis.spectrum",
    "PlanResult": "zoscope.analysis.plan",
    "PlanInterruptedError": "zoscope.analysis.plan",
    "ProbeResult": "zoscope.analysis.probe_results",
    "ProbeRun": "zoscope.analysis.probe_results",
    "ProbeInterruptedError": "zoscope.analysis.probe_results",
    "CheckReport": "zoscope.analysis.check_results",
    "CheckResult": "zoscope.analysis.check_results",
    "TrackResult": "zoscope.analysis.track_results",
    "Record": "zoscope.analysis.track_results",
    "TrackInterruptedError": "zoscope.analysis.track_results",
    "RunFolderError": "zoscope.analysis.track_folder",
    "ForwardRecord": "zoscope.analysis.monitor",
    "AutoLR": "zoscope.optim.auto_lr",
    "AutoLRRecord": "zoscope.optim.auto_lr",
    "Estimate": "zoscope.theory.spectrum",
    "Notice": "zoscope.problem",
    **{record.public: "zoscope.optim.optimizers" for record in OPTIMIZERS.values()},
    "ZoscopeError": "zoscope.errors",
    "UsageError": "zoscope.errors",
    "SpecError": "zoscope.errors",
    "NumericalError": "zoscope.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Load a public name from its home, once (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'zoscope' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
