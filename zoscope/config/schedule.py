"""Learning-rate schedules: what a run takes at every step, and the peak, which stability asks for."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class StepSizes(Protocol):
    """A step size for every step of a run."""

    @property
    def peak(self) -> float:
        """The largest one."""

    def lr_at(self, step: int, *, steps: int) -> float:
        """Step size of the step that starts at ``step`` (from 0) in a run of ``steps`` steps; above 0."""

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """Steps at which it jumps."""

    def to_config(self) -> Any:
        """The same as a value of a configuration file."""


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

    def lr_at(self, step: int, *, steps: int) -> float:
        """See `StepSizes.lr_at`: rises linearly to the peak in the warm-up, then falls towards 0 after the last step.

        No step has size 0: the first of w warm-up steps takes ``peak/w``, the last of n falling ones ``peak/n``
        (linear).
        """
        warmup = self.warmup_steps(steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.kind == "constant":
            return self.peak
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return self.peak * (1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """See `StepSizes.changes`; none."""
        return ()

    def to_config(self) -> Any:
        """See `StepSizes.to_config`."""
        if self.kind == "constant" and not self.warmup:
            return self.peak
        return {"schedule": self.kind, "peak": self.peak, "warmup": self.warmup}


@dataclass(frozen=True)
class Piecewise:
    """A step size that jumps: ``values[i]`` from step ``starts[i]`` on.

    Args:
        starts: Steps, rising, 0 first.
        values: Step sizes, param²/loss.

    Raises:
        ValueError: If they do not fit together.
    """

    starts: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.starts or self.starts[0] != 0 or len(self.starts) != len(self.values):
            raise ValueError("a piecewise step size needs one value per start, the first at step 0")
        if any(later <= earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError(f"the steps at which it changes must rise, got {', '.join(map(str, self.starts))}")
        for value in self.values:
            _require_lr(value)

    @property
    def peak(self) -> float:
        """The largest one."""
        return max(self.values)

    def lr_at(self, step: int, *, steps: int) -> float:
        """See `StepSizes.lr_at`."""
        return self.values[bisect_right(self.starts, step) - 1]

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """See `StepSizes.changes`."""
        return tuple(start for start in self.starts[1:] if start < steps)

    def to_config(self) -> Any:
        """See `StepSizes.to_config`."""
        later = [f"{start}:{value!r}" for start, value in zip(self.starts[1:], self.values[1:], strict=True)]
        return ",".join([repr(self.values[0]), *later])


def parse_step_sizes(text: str) -> StepSizes:
    """Read ``0.001``, or ``0.001,20000:0.007,30000:0.008``: 0.007 from step 20,000 on.

    Raises:
        ValueError: If it is neither.
    """
    starts: list[int] = []
    values: list[float] = []
    for part in text.split(","):
        start, colon, value = part.strip().rpartition(":")
        if bool(colon) != bool(starts):
            raise ValueError(_expected(text))
        try:
            starts.append(_whole(start) if colon else 0)
            values.append(float(value))
        except ValueError:
            raise ValueError(_expected(text)) from None
    return step_sizes(starts, values)


def step_sizes(starts: Sequence[int], values: Sequence[float]) -> StepSizes:
    """A constant for one value, else one that jumps.

    Raises:
        ValueError: If they do not fit together.
    """
    if len(values) == 1 and list(starts) == [0]:
        _require_lr(values[0])
        return Schedule("constant", float(values[0]))
    return Piecewise(tuple(starts), tuple(float(value) for value in values))


def _whole(text: str) -> int:
    number = float(text)  # 2e4 is a step, too
    if not number.is_integer():
        raise ValueError
    return int(number)


def _require_lr(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a step size must be a finite number above 0, got {value!r}")


def _expected(text: str) -> str:
    return f"got {text!r}, expected a number, or numbers from a step on such as 0.001,20000:0.007,30000:0.008"
