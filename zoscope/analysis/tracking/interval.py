"""When to measure: every so many steps, or more often while the ratio to the threshold moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoscope.analysis.tracking.record import Record
    from zoscope.analysis.tracking.request import TrackRequest

MEASURING_SHARE = 0.2
"""Part of a run's passes that measuring may take."""

PASSES_PER_HVP = 6.0
"""Forward passes that a Hessian-vector product is worth: a backward pass of a backward pass."""

PASSES_PER_GRADIENT = 3.0

PREPARED_PROBES = 8
"""Products with which Adam's preconditioner is compared with the Hessian."""

ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)

MOVED, CALM = 0.1, 0.03
"""Relative change of lr/threshold from which on measurements come closer, and up to which they move apart."""

FINEST, COARSEST = 4, 4
"""How much an adaptive interval may shrink and grow."""


def automatic_interval(request: TrackRequest, *, dimension: int, examples: int) -> int:
    """Steps between measurements so that these take about a fifth of the run; from counts of passes, not from time.

    At least one measurement falls between the first and the last, however short the run is.
    """
    hvps = min(request.max_hvps, dimension) if request.method != "dense" else dimension
    hvps += PREPARED_PROBES if request.family == "adam" else 0
    share = 1.0 if request.batch_size is None else min(request.batch_size / examples, 1.0)
    step = share * (PASSES_PER_GRADIENT if request.first_order else 2.0 * request.queries)
    wanted = hvps * PASSES_PER_HVP / (MEASURING_SHARE * step)
    return max(1, min(_rounded_up(wanted), math.ceil(request.steps / 2)))


def _rounded_up(value: float) -> int:
    if value <= 1:
        return 1
    scale = 10.0 ** math.floor(math.log10(value))
    return math.ceil(next(factor for factor in ROUND if factor * scale >= value * (1 - 1e-9)) * scale)


@dataclass
class Clock:
    """Decides at which steps a run is measured.

    Args:
        base: Interval to start with.
        steps: Length of the run; its end is always measured.
        adaptive: Whether the interval follows the ratio to the threshold.
        interval: Interval now.
        due: Step of the next measurement.
        ratio: ``lr_next / exact`` at the last measurement.
    """

    base: int
    steps: int
    adaptive: bool = False
    interval: int = 0
    due: int = 0
    ratio: float | None = None

    def __post_init__(self) -> None:
        self.interval = self.interval or self.base

    def measured(self, record: Record) -> None:
        """Set the next step, given what was found at this one."""
        if self.adaptive:
            self._adapt(record)
        self.due = min(record.step + self.interval, self.steps)

    def _adapt(self, record: Record) -> None:
        ratio = record.lr_next / record.exact if record.exact else None
        if ratio is not None and self.ratio:
            change = abs(math.log(ratio / self.ratio))
            if change > MOVED:
                self.interval = max(self.interval // 2, self.base // FINEST, 1)
            elif change < CALM:
                self.interval = min(math.ceil(self.interval * 1.5), self.base * COARSEST)
        self.ratio = ratio

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps."""
        return {"interval": self.interval, "due": self.due, "ratio": self.ratio}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Go on from what `state` returned."""
        self.interval, self.due = int(state["interval"] or self.base), int(state["due"] or 0)
        self.ratio = state["ratio"]
