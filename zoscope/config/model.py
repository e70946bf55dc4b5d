"""What a configuration becomes: frozen, validated, with every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoscope.config.schedule import Schedule


@dataclass(frozen=True)
class Where:
    """A place in a configuration file; lines are ``None`` where they are not known.

    Args:
        file: The file.
        line: The line of ``lr``, else that of the check.
        start: The line where the check begins.
    """

    file: Path
    line: int | None
    start: int | None


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer that training will use."""

    name: str
    schedule: Schedule
    beta: float
    betas: tuple[float, float]
    eps: float

    @property
    def lr(self) -> float:
        """The learning rate that is checked: the peak of the schedule."""
        return self.schedule.peak

    @property
    def zeroth_order(self) -> bool:
        """Whether gradients are estimated from loss values."""
        return self.name.startswith("zo-")

    @property
    def rule(self) -> str:
        """Update rule: ``gd``, ``gdm`` or ``adam``."""
        return self.name.removeprefix("zo-")


@dataclass(frozen=True)
class EstimatorConfig:
    """The zeroth-order gradient estimate."""

    directions: str
    queries: int
    mu: float
    batch_size: int | None


@dataclass(frozen=True)
class CurvatureConfig:
    """How the curvature is measured."""

    rtol: float
    max_hvps: int
    kind: str
    method: str
    hvp: str
    device: str
    dtype: str
    seed: int
    preconditioner: str
    micro_batch: int | None
    max_memory: int | None
    strict: bool


@dataclass(frozen=True)
class PolicyConfig:
    """When a check passes."""

    threshold: str
    margin: float
    on_warn: str
    probe: bool


@dataclass(frozen=True)
class CheckConfig:
    """One named check.

    Args:
        name: Unique in its file.
        spec: Spec with its path made absolute; ``None`` when a problem is passed in.
        shown_spec: The spec as the user wrote it.
        settings: Keyword arguments for the callable that the spec names.
        checkpoint: State dict to load.
        params: Regular expression that selects parameters.
        optimizer: The optimizer that training will use.
        steps: Training steps planned.
        estimator: The gradient estimate.
        curvature: How the curvature is measured.
        policy: When the check passes.
        where: What an annotation points at.
        notices: What the reading of the configuration has to say.
    """

    name: str
    spec: str | None
    shown_spec: str
    settings: Mapping[str, Any]
    checkpoint: Path | None
    params: str | None
    optimizer: OptimizerConfig
    steps: int
    estimator: EstimatorConfig
    curvature: CurvatureConfig
    policy: PolicyConfig
    where: Where | None = None
    notices: tuple[str, ...] = field(default=())
