"""What a measurement is asked for, and how precise it is."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from zoscope.analysis.advice import Threshold
from zoscope.errors import UsageError
from zoscope.options import CURVATURES
from zoscope.registry import FAMILIES, OPTIMIZERS, Differences, Directions, family_of
from zoscope.theory.rules import EstimatorMoments, UpdateRule, estimator_moments, update_rule
from zoscope.theory.spectrum import Estimate, require_count, require_non_negative, require_positive
from zoscope.theory.stability import StabilityCondition, Version, estimates, thresholds

if TYPE_CHECKING:
    from zoscope.problem import Problem
    from zoscope.theory.spectrum import SampledSpectrum


def propagated(
    function: Callable[[float, float], float], first: Estimate, second: Estimate, *, independent: bool
) -> Estimate:
    """A function of two estimates; its error is how far it moves over their 95 % intervals, one after the other.

    The errors add up where they may go together, and add in squares where they are independent.
    """
    value = function(first.value, second.value)
    if not math.isfinite(value):
        return Estimate(value)
    moves = (
        max(abs(function(end, second.value) - value) for end in first.interval),
        max(abs(function(first.value, end) - value) for end in second.interval),
    )
    return Estimate(value, (math.hypot(*moves) if independent else sum(moves)) / 1.96)


Precision = Callable[["SampledSpectrum"], float]

NEARLY_BINDING = 0.8
"""Infinite time counts from here on: above this share of η*(N) the run is long enough to feel its threshold."""


def relative_half_width(estimate: Estimate) -> float:
    """95 % half-width over the value; 0 for a threshold that is known to be infinite."""
    if not math.isfinite(estimate.value):
        return 0.0 if estimate.half_width == 0 else math.inf
    return estimate.half_width / estimate.value if estimate.value > 0 else math.inf


def wanted_precision(
    rules: Sequence[UpdateRule], *, steps: int, moments: EstimatorMoments, always_exact: bool = False
) -> Precision:
    """The error that a measurement should bring down.

    It is the largest relative 95 % half-width among η*(N), full and positive, of the rules that share an operator. The
    infinite-time threshold joins them where it was asked for or where it is at least ``NEARLY_BINDING`` of η*(N).
    Elsewhere it would cost most of the products without changing what binds: its kink at zero curvature, where networks
    keep most eigenvalues, makes quadrature slow.

    Args:
        rules: Update rules on the same operator.
        steps: Planned number of steps N.
        moments: Constants of the estimator.
        always_exact: Whether the infinite-time threshold was asked for.

    Returns:
        A function from a sampled spectrum to the largest relative half-width.
    """
    near: dict[StabilityCondition, float] = {}  # those of the spectrum before: a measurement asks of similar ones

    def worst(sampled: SampledSpectrum) -> float:
        if sampled.is_exact:
            return 0.0
        return max((_of_rule(rule, sampled) for rule in rules), default=0.0)

    def _of_rule(rule: UpdateRule, sampled: SampledSpectrum) -> float:
        if not rule.is_linear:  # all it depends on
            return relative_half_width(sampled.trace_of(lambda x: x))
        versions: tuple[Version, ...] = ("full", "positive")
        planned = [StabilityCondition(rule, moments, steps, version) for version in versions]
        forever = StabilityCondition(rule, moments)
        found = estimates(planned, sampled, near=near)
        near.update(zip(planned, (estimate.value for estimate in found), strict=True))
        (late,) = thresholds([forever], sampled.fine, near=near)
        near[forever] = late
        if always_exact or late >= NEARLY_BINDING * found[1].value:
            found += estimates([forever], sampled)
        return max(map(relative_half_width, found))

    return worst


Progress = Callable[[str, int, float | None], None]
"""Called with the stage of the measurement, the products spent and the precision reached, if there is one."""

Method = Literal["auto", "dense", "deflated-slq"]
STATE_PREFIX = "state:"


@dataclass(frozen=True)
class Request:
    """Options of ``zoscope.bounds``; see there for what they mean.

    Raises:
        ValueError: If one is outside of its range.
    """

    optimizers: tuple[str, ...]
    steps: int
    rtol: float
    seed: int
    max_hvps: int
    directions: Directions
    queries: int
    beta: float
    betas: tuple[float, float]
    eps: float
    curvature: str
    preconditioner: str
    method: Method
    hvp: str
    threshold: Threshold
    lr: float | None
    strict: bool
    on_progress: Progress | None = field(repr=False)
    batch_size: int | None = None
    dampening: float = 0.0
    weight_decay: float = 0.0
    differences: Differences = "central"

    def __post_init__(self) -> None:
        if not _below_one(self.beta):
            raise ValueError(f"beta must be a number in [0, 1), got {self.beta!r}")
        if len(self.betas) != 2 or not all(map(_below_one, self.betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        if not self.optimizers:
            raise ValueError(f"optimizers is empty: expected some of {', '.join(FAMILIES)}")
        for name in self.optimizers:
            self.rule(name)
        require_count("steps", self.steps)
        require_positive("rtol", self.rtol)
        require_count("max_hvps", self.max_hvps)
        require_count("seed", self.seed, least=0)
        if self.batch_size is not None:
            require_count("batch_size", self.batch_size)
        if self.lr is not None:
            require_positive("lr", self.lr)
        require_non_negative("eps", self.eps)
        if self.preconditioner != "expected" and not self.preconditioner.removeprefix(STATE_PREFIX):
            raise ValueError("preconditioner is 'state:' without a file: expected 'state:FILE'")
        if self.preconditioner != "expected" and not self.preconditioner.startswith(STATE_PREFIX):
            raise ValueError(f"preconditioner must be 'expected' or 'state:FILE', got {self.preconditioner!r}")
        _require_one_of("curvature", self.curvature, CURVATURES)
        _require_one_of("differences", self.differences, get_args(Differences))
        _require_one_of("method", self.method, get_args(Method))
        _require_one_of("threshold", self.threshold, get_args(Threshold))
        self.moments(dimension=1)

    @property
    def rules(self) -> dict[str, UpdateRule]:
        """Update rules by name, each once, in the order asked for."""
        return {name: self.rule(name) for name in self.optimizers}

    @property
    def state_file(self) -> Path | None:
        """File of a stored preconditioner."""
        if self.preconditioner == "expected":
            return None
        return Path(self.preconditioner.removeprefix(STATE_PREFIX)).expanduser()

    def rule(self, name: str) -> UpdateRule:
        """The update rule of an optimizer."""
        return update_rule(
            name, beta=self.beta, betas=self.betas, dampening=self.dampening, weight_decay=self.weight_decay
        )

    def settings(self, name: str) -> dict[str, Any]:
        """What identifies an optimizer in the result."""
        return OPTIMIZERS[name].settings(vars(self))

    def moments(self, *, dimension: int) -> EstimatorMoments:
        """Constants of the gradient estimate."""
        return estimator_moments(self.directions, queries=self.queries, dimension=dimension)

    def precision(self, rules: list[UpdateRule], *, moments: EstimatorMoments) -> Precision:
        """The error that measuring an operator for these rules should bring down."""
        return wanted_precision(rules, steps=self.steps, moments=moments, always_exact=self.threshold == "exact")


def _below_one(value: object) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < 1


def rule_names(optimizers: str | Iterable[str]) -> tuple[str, ...]:
    """Update rules of the optimizers named, each once; ``"zo-gd"``, as the command line has it, is ``"gd"`` here.

    Raises:
        ValueError: If it is not a list of names.
    """
    names = (optimizers,) if isinstance(optimizers, str) else tuple(optimizers)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"optimizers must be names out of {', '.join(FAMILIES)}, got {optimizers!r}")
    return tuple(dict.fromkeys(family_of(name) for name in names))


def subject_of(problem: Problem, params: str | None) -> Problem:
    """The problem with the parameters asked for.

    Raises:
        ValueError: If it is no problem.
        SpecError: If the pattern selects nothing.
    """
    from zoscope.problem import Problem  # late: it loads torch

    if not isinstance(problem, Problem):
        raise ValueError(
            f"problem must be a zoscope.Problem, got {problem!r}: make one from a model, batches and a loss, or load a "
            "spec file with zoscope.spec.load_spec(file).problem"
        )
    return problem if params is None else problem.with_params(params)


@contextmanager
def sharded_basis(wanted: bool) -> Iterator[None]:
    """Have each process of this job hold a slice of the Lanczos vectors, instead of the first one all of them.

    Raises:
        UsageError: If there is only one process.
    """
    runtime = sys.modules.get("zoscope.runtime")  # loaded wherever there are several
    ranks = None if runtime is None else runtime.current_ranks()
    if ranks is None:
        if wanted:
            raise UsageError(
                "--shard-basis spreads Lanczos vectors over several processes, and this is one by itself. Start it "
                "with torchrun --nproc-per-node N -m zoscope …, or leave the option out."
            )
        yield
        return
    before, ranks.shard_basis = ranks.shard_basis, wanted or ranks.shard_basis
    try:
        yield
    finally:
        ranks.shard_basis = before


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
