"""The short training probe that a policy may ask for, beside the threshold."""

from __future__ import annotations

from zoscope.analysis.checking.measure import Failure, LoadedProblem
from zoscope.analysis.checking.results import CheckResult
from zoscope.config.model import CheckConfig


def probe_result(result: CheckResult, config: CheckConfig, loaded: LoadedProblem | Failure) -> CheckResult:
    """The result with a probe at the configured step size; one that diverges turns pass and warn into fail."""
    raise NotImplementedError
