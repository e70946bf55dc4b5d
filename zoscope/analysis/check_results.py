"""What ``zoscope.check`` returns: frozen dataclasses whose ``to_dict`` is the document ``zoscope.check/1``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zoscope._version import __version__
from zoscope.result import JsonObject, RichResult

if TYPE_CHECKING:
    from zoscope.analysis.advice import Limit
    from zoscope.problem import Notice

CheckStatus = Literal["pass", "warn", "fail", "error"]
SEVERITY: tuple[CheckStatus, ...] = ("pass", "warn", "fail", "error")
EXIT_ORDER = (0, 1, 3, 2)
"""Exit codes from mildest to worst: a broken spec says less than a failed measurement, and that less than a "no"."""


@dataclass(frozen=True)
class BaselineComparison(JsonObject):
    """A threshold against an earlier one.

    Args:
        before: The earlier threshold; ``None`` where the baseline has none that can be compared.
        drop: By which fraction it fell, negative when it rose; ``None`` without an earlier one.
        failed: Whether it fell by more than is allowed, beyond the combined error bars.
        message: One sentence.
    """

    keys = "before drop failed"

    before: float | None
    drop: float | None
    failed: bool
    message: str


@dataclass(frozen=True)
class CheckResult(JsonObject):
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
        codes: Of each of them.
        details: The user's own traceback lines on an error in their code.
        seconds: Time of the measurement, shared by checks that share it.
        cached: Whether the measurement came from the cache.
    """

    keys = """
        name spec optimizer lr threshold=threshold.value threshold_name=threshold.name ci95=threshold.ci95
        error=threshold.error ratio provisional status message largest_lr exit_code settings file line notices seconds
        cached baseline? probe?
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
    codes: tuple[str, ...] = ()
    details: str = ""
    seconds: float = 0.0
    cached: bool = False

    @property
    def ratio(self) -> float | None:
        """``lr`` over the threshold; 0 where nothing limits the step size."""
        return None if self.threshold is None else self.threshold.ratio(self.lr)

    @property
    def provisional(self) -> bool:
        """Whether there is a reason to doubt the threshold."""
        return bool(self.doubts)


@dataclass(frozen=True)
class CheckReport(RichResult):
    """The outcomes of all checks, in the order of the configuration.

    Args:
        checks: One result per check.
        config: The configuration file as the user knows it; ``None`` without one.
        seconds: Wall-clock time of everything.
        version: Version of zoscope.
    """

    schema = "zoscope.check/1"
    keys = "schema zoscope=version config checks status exit_code seconds"

    checks: tuple[CheckResult, ...]
    config: str | None = None
    seconds: float = 0.0
    version: str = __version__

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """The notices of all checks."""
        from zoscope.problem import Notice  # late: it takes torch

        pairs = (pair for check in self.checks for pair in zip(check.codes, check.notices, strict=False))
        return tuple(Notice(code, message) for code, message in dict.fromkeys(pairs))

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
