"""The losses that a run sees between two measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoscope.analysis.tracking.record import Record


@dataclass
class Losses:
    """The losses of the steps since the last measurement."""

    total: float = 0.0
    largest: float = -math.inf
    count: int = 0

    def add(self, loss: float) -> None:
        """One more."""
        self.total += loss
        self.count += 1
        if not loss <= self.largest:  # also what is not a number
            self.largest = loss

    def described(self, record: Record) -> Record:
        """A record with them in it."""
        if not self.count:
            return record
        return replace(record, loss_mean=self.total / self.count, loss_max=self.largest)
