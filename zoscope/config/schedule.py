"""Learning-rate schedules, of which stability asks for the peak only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule.

    Args:
        kind: ``constant``, ``linear`` or ``cosine``.
        peak: Highest learning rate, param²/loss; the one that is checked.
        warmup: Warm-up in steps, or as a fraction of the steps when below 1.
    """

    kind: str
    peak: float
    warmup: float = 0.0

    def warmup_steps(self, steps: int) -> int:
        """Length of the warm-up of a run of ``steps`` steps."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    def describe(self) -> str | None:
        """What to say beside the peak; ``None`` for a plain number."""
        if self.kind == "constant" and not self.warmup:
            return None
        warmup = f", warm-up {self.warmup:g}" if self.warmup else ""
        return f"peak of a {self.kind} schedule{warmup}"
