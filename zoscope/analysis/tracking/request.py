"""What is asked of a tracked run, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from zoscope.optim.directions import check_law
from zoscope.theory.moments import Directions, EstimatorMoments, estimator_moments
from zoscope.theory.rules import UpdateRule, update_rule
from zoscope.theory.validate import require_count, require_positive

if TYPE_CHECKING:
    from zoscope.config.schedule import StepSizes

FAMILIES = ("gd", "gdm", "adam")
OPTIMIZERS = (*FAMILIES, *(f"zo-{name}" for name in FAMILIES))
CURVATURES = ("hessian", "ggn")
Every = int | Literal["auto", "adaptive"]
Method = Literal["auto", "dense", "deflated-slq"]


@dataclass(frozen=True, kw_only=True)
class TrackRequest:
    """Options of ``zoscope.track`` that make a run what it is; see there for what they mean.

    Raises:
        ValueError: If one is outside of its range.
    """

    lr: StepSizes
    optimizer: str = "zo-gd"
    steps: int = 1000
    every: Every = "auto"
    mu: float = 1e-3
    queries: int = 1
    directions: Directions = "gaussian"
    beta: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    batch_size: int | None = None
    target_loss: float | None = None
    divergence: float = 1e6
    checkpoint_every: int | None = None
    forward_every: int | None = None
    seed: int = 0
    rtol: float = 0.05
    max_hvps: int = 150
    method: Method = "auto"
    curvature: str = "hessian"
    hvp: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        _require_one_of("optimizer", self.optimizer, OPTIMIZERS)
        _require_one_of("curvature", self.curvature, CURVATURES)
        _require_one_of("method", self.method, get_args(Method))
        check_law(self.directions)
        for name in ("steps", "queries", "max_hvps"):
            require_count(name, getattr(self, name))
        for name in ("batch_size", "checkpoint_every", "forward_every", "micro_batch"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if isinstance(self.every, str):
            _require_one_of("every", self.every, ("auto", "adaptive"))
        else:
            require_count("every", self.every)
        if self.forward_every is not None and self.first_order:
            raise ValueError(
                "forward_every watches the loss values of zeroth-order steps and needs a zo- optimizer, got "
                f"{self.optimizer!r}; leave it out"
            )
        require_count("seed", self.seed, least=0)
        for name in ("mu", "rtol", "divergence"):
            require_positive(name, getattr(self, name))
        if self.divergence <= 1:
            raise ValueError(f"divergence must be above 1, got {self.divergence!r}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and >= 0, got {self.eps!r}")
        if self.target_loss is not None and not math.isfinite(self.target_loss):
            raise ValueError(f"target_loss must be finite, got {self.target_loss!r}")
        if len(self.betas) != 2 or not 0 <= self.betas[1] < 1:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        _ = self.rule

    @property
    def family(self) -> str:
        """``gd``, ``gdm`` or ``adam``."""
        return self.optimizer.removeprefix("zo-")

    @property
    def first_order(self) -> bool:
        """Whether updates use the gradient itself."""
        return not self.optimizer.startswith("zo-")

    @property
    def rule(self) -> UpdateRule:
        """The update rule as theory sees it."""
        return update_rule(self.family, beta=self.beta, betas=self.betas)

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the optimizer beside its name."""
        if self.family == "gdm":
            return {"beta": self.beta}
        return {"betas": list(self.betas), "eps": self.eps} if self.family == "adam" else {}

    def moments(self, *, dimension: int) -> EstimatorMoments:
        """Constants of what the rule is fed with; a = 1, b = 0 for the gradient itself."""
        if self.first_order:
            return EstimatorMoments(1.0, 0.0)
        return estimator_moments(self.directions, queries=self.queries, dimension=dimension)

    def lr_at(self, step: int) -> float:
        """Step size of the step that starts at ``step``; past the end, that of the last one."""
        return self.lr.lr_at(min(step, self.steps - 1), steps=self.steps)


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
