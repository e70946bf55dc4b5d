"""What is asked of a probe, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
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


def check_optimizer(name: object) -> None:
    """Refuse what is not the name of an optimizer.

    Raises:
        ValueError: If it is not one of ``PROBED``.
    """
    if name not in PROBED:
        raise ValueError(f"optimizer must be one of {', '.join(PROBED)}, got {name!r}")


def numbers(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    """One number or several, as a tuple; their range is checked by the request.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(values, Real):
        return (float(values),)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a number or several, got {values!r}")
    return tuple(values)


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
        check_optimizer(self.optimizer)
        require_positive("mu", self.mu)
        require_count("replicas", self.replicas)
        require_positive("growth", self.growth)
        if self.growth <= 1:
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
        require_positive("edge_rtol", self.edge_rtol)
        if self.edge_rtol >= 1:
            raise ValueError(f"edge_rtol must lie in (0, 1), got {self.edge_rtol!r}")
        for name, flag in (("edge", self.edge), ("linearized", self.linearized)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
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
