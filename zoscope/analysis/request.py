"""What the functions of zoscope are asked for, how precisely, and the session in which they measure it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from zoscope.errors import NumericalError, UsageError
from zoscope.options import BoundsOptions, CurvatureKind, Hvp, Method, Threshold, keywords
from zoscope.registry import DEFAULT_FAMILIES, FAMILIES, OPTIMIZERS, Differences, Directions, family_of, is_zeroth_order
from zoscope.result import ProblemInfo
from zoscope.theory.rules import EstimatorMoments, UpdateRule, estimator_moments, update_rule
from zoscope.theory.spectrum import Estimate
from zoscope.theory.stability import StabilityCondition, Version, estimates, thresholds

if TYPE_CHECKING:
    from zoscope.problem import Notice, Objective, Problem
    from zoscope.problem.core import Measurable
    from zoscope.result import Header
    from zoscope.theory.spectrum import SampledSpectrum

    ProblemLike = Problem | str | PathLike[str] | Callable[[], Problem]
    """A problem, or where it comes from."""


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

STATE_PREFIX = "state:"


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """How a curvature is measured, and where; ``examples/guide/options.md`` says what the options mean.

    The values are those of `zoscope.options.keywords`, which has checked them.
    """

    rtol: float
    max_hvps: int
    method: Method
    curvature: CurvatureKind
    hvp: Hvp
    device: str
    dtype: str
    seed: int
    micro_batch: int | None
    max_memory: int | None
    strict: bool
    shard_basis: bool
    params: str | None = None
    spec: str | None = None
    on_progress: Progress | None = field(default=None, repr=False)

    @property
    def budget(self) -> dict[str, Any]:
        """When a measurement ends, and whom it tells: keyword arguments of ``measure`` and its like."""
        return {name: getattr(self, name) for name in ("rtol", "max_hvps", "seed", "on_progress")}


@dataclass(frozen=True, kw_only=True)
class RuleRequest(MeasureRequest):
    """The same, for optimizers with constants of their own."""

    beta: float
    betas: tuple[float, float]
    eps: float
    directions: Directions
    queries: int
    dampening: float
    weight_decay: float
    differences: Differences

    def rule_of(self, name: str) -> UpdateRule:
        """The update rule of an optimizer."""
        return update_rule(
            name, beta=self.beta, betas=self.betas, dampening=self.dampening, weight_decay=self.weight_decay
        )

    def moments(self, *, dimension: int) -> EstimatorMoments:
        """Constants of the gradient estimate."""
        return estimator_moments(self.directions, queries=self.queries, dimension=dimension)


class OneOptimizer:
    """What a request about a single optimizer knows of it by its name."""

    optimizer: str

    @property
    def family(self) -> str:
        """Its name without ``zo-``."""
        return family_of(self.optimizer)

    @property
    def first_order(self) -> bool:
        """Whether updates use the gradient itself."""
        return not is_zeroth_order(self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Request(RuleRequest):
    """Options of ``zoscope.bounds``.

    Raises:
        ValueError: If there is no optimizer among them, or one that is not known.
    """

    optimizers: tuple[str, ...]
    steps: int
    preconditioner: str
    threshold: Threshold
    lr: float | None = None
    mu: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.optimizers:
            raise ValueError(f"optimizers is empty: expected some of {', '.join(FAMILIES)}")
        _ = self.rules

    @classmethod
    def of(cls, *, on_progress: Progress | None = None, **options: Unpack[BoundsOptions]) -> Request:
        """From keyword arguments of ``zoscope.bounds``.

        Raises:
            TypeError: For one that it does not take.
            ValueError: For one that is out of range.
        """
        found = keywords("bounds", options)
        asked = found["optimizers"]
        return cls(
            **found | {"optimizers": rule_names(DEFAULT_FAMILIES if asked is None else asked)}, on_progress=on_progress
        )

    @property
    def rules(self) -> dict[str, UpdateRule]:
        """Update rules by name, each once, in the order asked for."""
        return {name: self.rule_of(name) for name in self.optimizers}

    @property
    def state_file(self) -> Path | None:
        """File of a stored preconditioner."""
        if self.preconditioner == "expected":
            return None
        return Path(self.preconditioner.removeprefix(STATE_PREFIX)).expanduser()

    def settings(self, name: str) -> dict[str, Any]:
        """What identifies an optimizer in the result."""
        return OPTIMIZERS[name].settings(vars(self))

    def precision(self, rules: list[UpdateRule], *, moments: EstimatorMoments) -> Precision:
        """The error that measuring an operator for these rules should bring down."""
        return wanted_precision(rules, steps=self.steps, moments=moments, always_exact=self.threshold == "exact")


def rule_names(optimizers: str | Iterable[str]) -> tuple[str, ...]:
    """Update rules of the optimizers named, each once; ``"zo-gd"``, as the command line has it, is ``"gd"`` here."""
    names = (optimizers,) if isinstance(optimizers, str) else tuple(optimizers)
    return tuple(dict.fromkeys(family_of(name) for name in names))


def subject_of(problem: ProblemLike, params: str | None) -> Problem:
    """The problem with the parameters asked for.

    Args:
        problem: The problem, a function that returns one, or a spec, such as ``"model.py"`` or ``"model.py:name"``.
        params: Regular expression on names of parameters.

    Raises:
        ValueError: If it is none of these.
        SpecError: If the spec cannot be loaded, or the pattern selects nothing.
    """
    from zoscope.problem import Problem  # late: it loads torch

    if isinstance(problem, (str, PathLike)) or (callable(problem) and not hasattr(problem, "parameters")):
        from zoscope.spec.load import problem_from

        problem = problem_from(problem)
    if not isinstance(problem, Problem):
        raise ValueError(
            f"problem must be a zoscope.Problem, got {problem!r}: make one from a model, batches and a loss, or give a "
            "function that returns one, or the path of a spec file"
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


@dataclass(frozen=True)
class CurvatureSession:
    """A problem that is prepared as a request says, until the context of `curvature_session` ends.

    Args:
        objective: The prepared problem.
        request: How it is measured.
        spec: Name of the problem in the result.
        subject: The problem itself.
        started: When the work began, on the clock of ``time.perf_counter``.
        measurable: What of it is measured while it trains; ``None`` for one that does not.
    """

    objective: Objective
    request: MeasureRequest
    spec: str | None
    subject: Problem
    started: float
    measurable: Measurable | None = None

    @property
    def trained(self) -> Measurable:
        """What is measured of a problem that trains."""
        assert self.measurable is not None
        return self.measurable

    @property
    def dtype(self) -> str:
        """Name of the floating-point type of the measurement."""
        return str(self.objective.dtype).removeprefix("torch.")

    def header(self, *, loss: float, grad_norm: float, num_hvps: int, warnings: Iterable[Notice]) -> Header:
        """What the results of all measurements share."""
        objective = self.objective
        return {
            "spec": self.spec,
            "device": str(objective.device),
            "dtype": self.dtype,
            "seed": self.request.seed,
            "problem": ProblemInfo(objective.num_params, objective.num_examples, loss, grad_norm),
            "num_hvps": num_hvps,
            "warnings": tuple(dict.fromkeys(warnings)),
            "seconds": time.perf_counter() - self.started,
        }

    def missed(self, found: Iterable[Notice]) -> tuple[Notice, ...]:
        """Notices of a precision that was not reached.

        Raises:
            NumericalError: With the first of them, where the request is strict.
        """
        notices = tuple(found)
        if notices and self.request.strict:
            raise NumericalError(notices[0].message)
        return notices


@contextmanager
def curvature_session(
    problem: ProblemLike, request: MeasureRequest, *, dtype: str | None = None, trains: bool = False, **how: Any
) -> Iterator[CurvatureSession]:
    """Prepare a problem for a measurement; it comes back as it was.

    Args:
        problem: As for `subject_of`.
        request: Device, floating-point type, memory and what else concerns the measurement.
        dtype: In place of the floating-point type of the request.
        trains: Whether the parameters will move; then ``trained`` is what may be differentiated twice.
        **how: Further options of `Problem.prepare`.

    Raises:
        ValueError: If it is no problem.
        UsageError, SpecError, NumericalError: If it cannot be prepared like this.
    """
    started = time.perf_counter()
    subject = subject_of(problem, request.params)
    where: dict[str, Any] = {
        "device": request.device,
        "micro_batch": request.micro_batch,
        "max_memory": request.max_memory,
    }
    with ExitStack() as stack:
        stack.enter_context(sharded_basis(request.shard_basis))
        objective = stack.enter_context(subject.prepare(dtype=dtype or request.dtype, trains=trains, **where, **how))
        measured = None
        if trains:
            from zoscope.problem.core import measurable  # late: it loads torch

            measured = stack.enter_context(measurable(subject, objective, **where))
        name = subject.name if request.spec is None else request.spec
        yield CurvatureSession(objective, request, name, subject, started, measured)
