"""What ``zoscope.probe`` returns: frozen dataclasses, and the document ``zoscope.probe/1``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zoscope.analysis.measured import Measured
from zoscope.analysis.optimizer_bounds import number
from zoscope.analysis.probing.edge_results import Edge, EdgePoint, ProbedThreshold
from zoscope.analysis.probing.run_results import Curves, EndState, PredictionError, ProbeRun, RunVerdict, Variant
from zoscope.analysis.results import Estimator

if TYPE_CHECKING:
    from rich.console import RenderableType


__all__ = [
    "SCHEMA",
    "Curves",
    "Edge",
    "EdgePoint",
    "EndState",
    "Outcome",
    "PredictionError",
    "ProbeInterruptedError",
    "ProbeResult",
    "ProbeRun",
    "ProbedThreshold",
    "RunVerdict",
    "Variant",
]

SCHEMA = "zoscope.probe/1"

Outcome = Literal["confirmed", "refuted", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Measured):
    """What a probe found; the other fields are those of every `Measured` result.

    Args:
        optimizer: Name as on the command line, such as ``zo-adam``.
        settings: What identifies the rule.
        estimator: The gradient estimate; ``None`` for a first-order optimizer.
        threshold: The threshold under test.
        linearized: Whether the runs were on the quadratic model.
        growth: Growth factor that a run above has to be long enough for.
        runs: One per step size and variant.
        edge: Where the empirical edge was looked for.
        outcome: The verdict on the threshold.
        reason: One sentence on it.
        together: Whether replicas were stepped together.
        interrupted: Whether it was cut short.
    """

    optimizer: str
    settings: Mapping[str, Any]
    estimator: Estimator | None
    threshold: ProbedThreshold
    linearized: bool
    growth: float
    runs: tuple[ProbeRun, ...]
    edge: Edge | None
    outcome: Outcome
    reason: str
    together: bool
    interrupted: bool

    @property
    def confirmed(self) -> bool:
        """Whether the threshold was confirmed."""
        return self.outcome == "confirmed"

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.probe/1``: JSON numbers, strings and null only."""
        fields = {
            "optimizer": self.optimizer,
            **self.settings,
            "estimator": None if self.estimator is None else self.estimator.to_dict(),
            "linearized": self.linearized,
            "growth": number(self.growth),
            "threshold": self.threshold.to_dict(),
            "runs": [run.to_dict() for run in self.runs],
            "edge": None if self.edge is None else self.edge.to_dict(),
            "confirmed": self.confirmed,
            "outcome": self.outcome,
            "reason": self.reason,
            "interrupted": self.interrupted,
        }
        return self.document(SCHEMA, fields)

    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""
        from zoscope.report.probe import render

        return render(self)


class ProbeInterruptedError(KeyboardInterrupt):
    """The user interrupted a probe.

    Args:
        result: What was known by then.
    """

    def __init__(self, result: ProbeResult) -> None:
        super().__init__()
        self.result = result
