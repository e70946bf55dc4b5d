"""What ``zoscope.check`` returns: frozen dataclasses whose ``to_dict`` is the document ``zoscope.check/1``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zoscope._version import __version__
from zoscope.analysis.result import RichResult

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoscope.analysis.advice import Limit

SCHEMA = "zoscope.check/1"

CheckStatus = Literal["pass", "warn", "fail", "error"]
SEVERITY: tuple[CheckStatus, ...] = ("pass", "warn", "fail", "error")
EXIT_ORDER = (0, 1, 3, 2)
"""Exit codes from mildest to worst: a broken spec says less than a failed measurement, and that less than a "no"."""


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


@dataclass(frozen=True)
class BaselineComparison:
    """A threshold against an earlier one.

    Args:
        before: The earlier threshold; ``None`` where the baseline has none that can be compared.
        drop: By which fraction it fell, negative when it rose; ``None`` without an earlier one.
        failed: Whether it fell by more than is allowed, beyond the combined error bars.
        message: One sentence.
    """

    before: float | None
    drop: float | None
    failed: bool
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {"before": _number(self.before), "drop": _number(self.drop), "failed": self.failed}


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Args:
        name: Name of the check.
        spec: The spec as the user knows it.
        optimizer: Optimizer, ``zo-`` for the zeroth-order ones.
        lr: Step size that was checked, param²/loss: the peak of a schedule.
        status: ``pass``, ``warn``, ``fail`` or ``error``.
        message: One paragraph.
        exit_code: What this check alone would exit with.
        settings: What identifies the threshold: steps, estimator, optimizer constants, policy.
        threshold: What the step size is held against; ``None`` on an error.
        doubts: Why the threshold is provisional; empty where it is not.
        largest_lr: Largest step size that passes, rounded down to two digits; ``None`` when there is no limit or none.
        file: Configuration file; ``None`` without one.
        line: Its line.
        baseline: Comparison with the baseline, when one was given.
        probe: Document of the short training probe, when one was asked for.
        notices: What to know before trusting the number.
        details: The user's own traceback lines on an error in their code.
        seconds: Time of the measurement, shared by checks that share it.
        cached: Whether the measurement came from the cache.
    """

    name: str
    spec: str
    optimizer: str
    lr: float
    status: CheckStatus
    message: str
    exit_code: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    threshold: Limit | None = None
    doubts: tuple[str, ...] = ()
    largest_lr: float | None = None
    file: str | None = None
    line: int | None = None
    baseline: BaselineComparison | None = None
    probe: Mapping[str, Any] | None = None
    notices: tuple[str, ...] = ()
    details: str = ""
    seconds: float = 0.0
    cached: bool = False

    @property
    def ratio(self) -> float | None:
        """``lr`` over the threshold; 0 where nothing limits the step size."""
        return None if self.threshold is None else self.threshold.ratio(self.lr)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        threshold = self.threshold
        document = {
            "name": self.name,
            "spec": self.spec,
            "optimizer": self.optimizer,
            "lr": self.lr,
            "threshold": None if threshold is None else _number(threshold.value),
            "threshold_name": None if threshold is None else threshold.name,
            "ci95": None if threshold is None else [_number(threshold.low), _number(threshold.high)],
            "error": None if threshold is None else _number(threshold.error),
            "ratio": _number(self.ratio),
            "provisional": bool(self.doubts),
            "status": self.status,
            "message": self.message,
            "largest_lr": _number(self.largest_lr),
            "exit_code": self.exit_code,
            "settings": dict(self.settings),
            "file": self.file,
            "line": self.line,
            "notices": list(self.notices),
            "seconds": _number(self.seconds),
            "cached": self.cached,
        }
        if self.baseline is not None:
            document["baseline"] = self.baseline.to_dict()
        if self.probe is not None:
            document["probe"] = dict(self.probe)
        return document


@dataclass(frozen=True)
class CheckReport(RichResult):
    """The outcomes of all checks, in the order of the configuration.

    Args:
        checks: One result per check.
        config: The configuration file as the user knows it; ``None`` without one.
        seconds: Wall-clock time of everything.
        version: Version of zoscope.
    """

    checks: tuple[CheckResult, ...]
    config: str | None = None
    seconds: float = 0.0
    version: str = __version__

    @property
    def status(self) -> CheckStatus:
        """The worst status."""
        return max((check.status for check in self.checks), key=SEVERITY.index, default="pass")

    @property
    def exit_code(self) -> int:
        """The worst exit code: 2 over 3 over 1 over 0."""
        return max((check.exit_code for check in self.checks), key=EXIT_ORDER.index, default=0)

    @property
    def passed(self) -> bool:
        """Whether the gate is open: no check failed or could not be done."""
        return self.exit_code == 0

    def counts(self) -> dict[CheckStatus, int]:
        """How many checks ended in each status."""
        return {status: sum(check.status == status for check in self.checks) for status in SEVERITY}

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.check/1``: JSON numbers, strings and null only."""
        return {
            "schema": SCHEMA,
            "zoscope": self.version,
            "config": self.config,
            "checks": [check.to_dict() for check in self.checks],
            "status": self.status,
            "exit_code": self.exit_code,
            "seconds": _number(self.seconds),
        }

    def __rich__(self) -> RenderableType:
        """A table for the terminal."""
        from zoscope.report.check import render

        return render(self)
