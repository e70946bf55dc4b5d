"""What is asked of a probe, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zoscope.analysis.request import Request
from zoscope.optim.directions import check_law
from zoscope.optim.replicas import Estimator
from zoscope.theory.moments import EstimatorMoments
from zoscope.theory.rules import OPTIMIZERS
from zoscope.theory.validate import require_count, require_positive

if TYPE_CHECKING:
    from zoscope.theory.rules import UpdateRule

ProbeProgress = Callable[[str, int, int], None]

PROBED: tuple[str, ...] = (*(f"zo-{name}" for name in OPTIMIZERS), *OPTIMIZERS)
FIRST_ORDER = EstimatorMoments(1.0, 0.0)
"""The exact gradient as an estimate: ``E ĝĝᵀ = HΣH``, the limit of infinitely many queries."""


@dataclass(frozen=True)
class ProbeRequest:
    """Options of ``zoscope.probe``; see there for what they mean.

    Raises:
        ValueError: If one is outside of its range.
    """

    measure: Request
    optimizer: str
    mu: float
    replicas: int
    growth: float
    ratios: tuple[float, ...]
    lrs: tuple[float, ...]
    steps: int | None
    max_steps: int
    max_seconds: float
    edge: bool
    edge_rtol: float
    linearized: bool
    assume_threshold: float | None
    batch_size: int | None
    on_progress: ProbeProgress | None = field(repr=False)

    def __post_init__(self) -> None:
        if self.optimizer not in PROBED:
            raise ValueError(f"optimizer must be one of {', '.join(PROBED)}, got {self.optimizer!r}")
        require_positive("mu", self.mu)
        require_count("replicas", self.replicas)
        if not (math.isfinite(self.growth) and self.growth > 1):
            raise ValueError(f"growth must be finite and > 1, got {self.growth!r}")
        for name, values in (("ratios", self.ratios), ("lr", self.lrs)):
            for value in values:
                require_positive(name, value)
        if not (self.ratios or self.lrs or self.edge):
            raise ValueError("nothing to run: give ratios, step sizes, or edge=True")
        if self.steps is not None:
            require_count("steps", self.steps)
        require_count("max_steps", self.max_steps)
        require_positive("max_seconds", self.max_seconds)
        if not 0 < self.edge_rtol < 1:
            raise ValueError(f"edge_rtol must lie in (0, 1), got {self.edge_rtol!r}")
        if self.assume_threshold is not None:
            require_positive("assume_threshold", self.assume_threshold)
        if self.batch_size is not None:
            require_count("batch_size", self.batch_size)
            if self.first_order or self.linearized:
                raise ValueError("batch_size is for zeroth-order runs on the loss itself")

    @property
    def first_order(self) -> bool:
        """Whether the gradient itself is followed."""
        return not self.optimizer.startswith("zo-")

    @property
    def family(self) -> str:
        """``gd``, ``gdm`` or ``adam``."""
        return self.optimizer.removeprefix("zo-")

    @property
    def rule(self) -> UpdateRule:
        """The rule, as theory sees it."""
        return self.measure.rule(self.family)

    def moments(self, *, dimension: int) -> EstimatorMoments:
        """Constants of what the rule is fed with."""
        return FIRST_ORDER if self.first_order else self.measure.moments(dimension=dimension)

    @property
    def estimator(self) -> Estimator:
        """What the rule is fed with."""
        return Estimator(
            order=1 if self.first_order else 0,
            mu=self.mu,
            queries=self.measure.queries,
            directions=check_law(self.measure.directions),
        )
