"""What ``zoscope.track`` is asked for, and what it returns: the document ``zoscope.track/1``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Required,
    TypedDict,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from zoscope._version import __version__
from zoscope.analysis.request import OneOptimizer, RuleRequest
from zoscope.config.load import AutomaticStepSize, StepSizes, step_sizes, training_step_sizes
from zoscope.errors import NumericalError
from zoscope.options import TrackOptions, keywords
from zoscope.registry import OPTIMIZERS
from zoscope.result import JsonObject, RichResult, encode, pick
from zoscope.theory.rules import FIRST_ORDER, EstimatorMoments

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem import Notice
    from zoscope.theory.rules import UpdateRule

CONFIG = """
    lr optimizer steps every mu queries directions beta betas eps dampening weight_decay differences batch_size
    target_loss divergence checkpoint_every forward_every seed rtol max_hvps method curvature hvp device dtype
    micro_batch
"""
"""Options that make a run what it is, in the order in which ``config.yaml`` has them."""


@dataclass(frozen=True, kw_only=True)
class TrackRequest(OneOptimizer, RuleRequest):
    """Options of ``zoscope.track``.

    Raises:
        ValueError: If they do not fit together.
    """

    lr: StepSizes
    optimizer: str
    steps: int
    every: int | Literal["auto", "adaptive"]
    mu: float
    batch_size: int | None = None
    target_loss: float | None = None
    divergence: float = math.inf
    max_seconds: float | None = None
    checkpoint_every: int | None = None
    forward_every: int | None = None
    run: str | PathLike[str] | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.forward_every is not None and self.differences != "central":
            raise ValueError("forward_every compares losses on both sides: expected differences='central'")
        if self.forward_every is not None and self.first_order:
            raise ValueError(
                "forward_every watches the loss values of zeroth-order steps and needs a zo- optimizer, got "
                f"{self.optimizer!r}; leave it out"
            )

        if self.automatic and self.first_order:
            raise ValueError(f"lr='auto' sets the step size of zo- optimizers, got {self.optimizer!r}; give a number")
        if self.automatic and self.forward_every is not None:
            raise ValueError("lr='auto' watches the loss values by itself; leave forward_every out")

    @classmethod
    def of(cls, **options: Unpack[TrackOptions]) -> TrackRequest:
        """From keyword arguments of ``zoscope.track``.

        Raises:
            TypeError: For one that it does not take.
            ValueError: For one that is out of range, or several that do not fit together.
        """
        found = keywords("track", options)
        return cls(**found | {"lr": as_step_sizes(found["lr"])})

    @property
    def automatic(self) -> bool:
        """Whether the step size sets itself."""
        return isinstance(self.lr, AutomaticStepSize)

    @property
    def folder(self) -> Path | None:
        """Folder of the run."""
        return None if self.run is None else Path(self.run)

    @property
    def rule(self) -> UpdateRule:
        """The update rule as theory sees it."""
        return self.rule_of(self.family)

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the optimizer beside its name."""
        return OPTIMIZERS[self.family].settings(vars(self))

    def moments(self, *, dimension: int) -> EstimatorMoments:
        """Constants of what the rule is fed with; a = 1, b = 0 for the gradient itself."""
        return FIRST_ORDER if self.first_order else super().moments(dimension=dimension)

    def lr_at(self, step: int) -> float:
        """Step size of the step that starts at ``step``; past the end, that of the last one; NaN for ``auto``."""
        return self.lr.lr_at(min(step, self.steps - 1), steps=self.steps)

    def config(self) -> dict[str, Any]:
        """The options that make the run what it is, as keys of a configuration."""
        config = {name: getattr(self, name) for name in CONFIG.split()}
        config |= {"lr": self.lr.to_config(), "betas": list(self.betas)}
        return {key: value for key, value in config.items() if value is not None}


def as_step_sizes(lr: float | str | StepSizes) -> StepSizes:
    """Step sizes from what a user may give.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(lr, str):
        return training_step_sizes(lr)
    return step_sizes([0], [lr]) if isinstance(lr, int | float) else lr


@dataclass(frozen=True)
class Record(JsonObject):
    """One measurement. Numbers that are not defined or not finite are ``None``.

    Curvature is that of the operator that the optimizer acts through: H in loss/param², for Adam ``P⁻¹H``.
    ``lower``, ``upper`` and ``threshold`` share its unit, so that the edge of stability is
    ``lower ≤ threshold ≤ upper``.

    Args:
        step: Steps done.
        loss: Loss over all examples.
        loss_mean: Mean of the losses seen at every step since the measurement before.
        loss_max: Largest of them.
        metrics: The problem's own metrics.
        lr: Step size that led here.
        lr_next: Step size of the next step.
        grad_norm: ``‖g‖``, loss/param.
        operator: ``hessian``, ``ggn``, or one of them after ``preconditioned_``.
        trace: ``Tr``.
        trace_stderr: Its standard error.
        trace_positive: Sum of the positive eigenvalues.
        lambda_max: Largest eigenvalue.
        lambda_max_residual: Some eigenvalue lies within this distance of it.
        lambda_max_converged: Whether that is at most 1 %.
        lambda_min: Smallest eigenvalue.
        lambda_min_residual: Likewise.
        lambda_min_converged: Likewise.
        frobenius_sq: ``‖·‖_F²``.
        frobenius_sq_stderr: Its standard error.
        lower: The paper's lower term, ``Tr``; for first-order optimizers ``λ_max``.
        upper: The paper's upper term, ``Tr + 2λ_max`` for ZO-GD; for first-order optimizers ``λ_max``.
        threshold: What the step size allows: ``2/η`` for ZO-GD and GD, ``2(1−β)/η`` for ZO-GDM, ``2(1+β)/η`` for GDM.
        exact: Largest stable step size η* in infinite time, of the positive part; 2/λ_max and the like for first order.
        exact_ci95: Its 95 % interval.
        exact_batches: The same with the mini-batches of the run, which add noise; zeroth order only.
        exact_batches_ci95: Its 95 % interval.
        ratio: ``lr / exact``, or ``lr / exact_batches`` where that is known and lower.
        horizon: η* of the steps that remain: with all eigenvalues, with the positive ones; zeroth order only.
        blow_up: Steps until ``lr_next`` is no longer stable, with all and with the positive eigenvalues; zeroth order
            only; ``None`` for never.
        precision: Relative 95 % half-width reached, the larger one of trace and exact threshold.
        method: How the spectrum was measured.
        num_hvps: Hessian-vector products spent.
        preconditioner: Smallest, median and largest entry of Adam's P, or of that of step sizes by parameter group.
        commutator: ``‖PH−HP‖_F/‖PH‖_F``.
        forward: What the loss values of the last steps say by themselves (``zoscope.ForwardMonitor``), if asked for:
            ``trace`` with ``trace_stderr``, ``lower`` and ``upper`` end of the threshold, ``ratio`` and so on.
        floor: Gradient norm at which ``lr_next`` stalls, of optimizers whose steps do not shrink with the gradient.
        path: What the steps since the measurement before saw: ``(steps done, mean loss of
            neighbours, step size)``, a few hundred of them in a whole run.
        auto: With ``lr="auto"`` what `zoscope.AutoLR` knew (`zoscope.AutoLRRecord`, without loss and step size).
    """

    step: int
    loss: float | None
    loss_mean: float | None = None
    loss_max: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    lr: float = 0.0
    lr_next: float = 0.0
    grad_norm: float | None = None
    operator: str = "hessian"
    trace: float | None = None
    trace_stderr: float | None = None
    trace_positive: float | None = None
    lambda_max: float | None = None
    lambda_max_residual: float | None = None
    lambda_max_converged: bool | None = None
    lambda_min: float | None = None
    lambda_min_residual: float | None = None
    lambda_min_converged: bool | None = None
    frobenius_sq: float | None = None
    frobenius_sq_stderr: float | None = None
    lower: float | None = None
    upper: float | None = None
    threshold: float | None = None
    exact: float | None = None
    exact_ci95: tuple[float | None, float | None] | None = None
    exact_batches: float | None = None
    exact_batches_ci95: tuple[float | None, float | None] | None = None
    ratio: float | None = None
    horizon: tuple[float | None, float | None] | None = None
    blow_up: tuple[float | None, float | None] | None = None
    precision: float | None = None
    method: str | None = None
    num_hvps: int = 0
    preconditioner: tuple[float, float, float] | None = None
    commutator: float | None = None
    forward: Mapping[str, float | None] | None = None
    floor: float | None = None
    path: tuple[tuple[int, float | None, float | None], ...] = ()
    auto: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; what few runs have is left out where there is none."""
        found = super().to_dict()
        rare = ("floor", "auto", "exact_batches", "exact_batches_ci95")
        return {key: value for key, value in found.items() if value is not None or key not in rare}

    @property
    def in_band(self) -> bool | None:
        """Whether the threshold term lies in ``[0.9 lower, 1.1 upper]``; ``None`` where a term is not known."""
        if self.lower is None or self.upper is None or self.threshold is None:
            return None
        return 0.9 * self.lower <= self.threshold <= 1.1 * self.upper

    @property
    def reaches_edge(self) -> bool:
        """Whether the curvature has risen to what the step size allows: ``threshold ≤ 1.1 upper``."""
        return self.threshold is not None and self.upper is not None and self.threshold <= 1.1 * self.upper

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Record:
        """What ``to_dict`` wrote; keys of newer versions are left out.

        Raises:
            ValueError: If it is anything else.
        """
        if not isinstance(document, Mapping) or "step" not in document or "loss" not in document:
            raise ValueError("a measurement has a step and a loss")
        hints = get_type_hints(cls)
        for key, value in document.items():
            if key in hints and not conforms(value, hints[key]):
                raise ValueError(f"{key} is {value!r}")
        if document["step"] < 0:
            raise ValueError(f"step is {document['step']}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**{key: value for key, value in values.items() if key in hints})


class SummaryProblem(TypedDict, total=False):
    """What ``summary.json`` says of the problem."""

    num_params: int
    num_examples: int


class SummaryNotice(TypedDict):
    """A warning in ``summary.json``."""

    code: str
    message: str


class Summary(TypedDict, total=False):
    """What a reader takes from ``summary.json``, of a run or of a sweep."""

    schema: Required[str]
    spec: str | None
    device: str
    dtype: str
    problem: SummaryProblem
    every: int
    status: str
    reason: str
    steps: int
    seconds: float | None
    measuring_seconds: float | None
    warnings: list[SummaryNotice]


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value out of a JSON document is of a type: what annotates a field of a result, or a ``TypedDict``."""
    if hint is Any:
        return True
    if is_typeddict(hint):
        hints = get_type_hints(hint)
        return (
            isinstance(value, Mapping)
            and hint.__required_keys__ <= value.keys()
            and all(conforms(item, hints[key]) for key, item in value.items() if key in hints)
        )
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(conforms(value, choice) for choice in args)
    if origin is tuple and args[-1] is Ellipsis:
        return isinstance(value, list | tuple) and all(conforms(item, args[0]) for item in value)
    if origin is tuple:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(args)
            and all(conforms(item, kind) for item, kind in zip(value, args, strict=True))
        )
    if origin is list:
        return isinstance(value, list) and all(conforms(item, args[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(conforms(item, args[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def require_precision(records: Sequence[Record], rtol: float) -> None:
    """Refuse measurements that are less precise than asked for.

    Raises:
        NumericalError: With the first of them that missed ``rtol``.
    """
    reached = {record.step: record.precision for record in records if record.precision is not None}
    missed = {step: precision for step, precision in reached.items() if not precision <= rtol}
    for step, precision in missed.items():
        raise NumericalError(
            f"The precision asked for (--rtol {rtol:g}) was not reached in {len(missed):,} of {len(reached):,} "
            f"measurements, first at step {step:,} (± {100 * precision:.3g} %). The records are honest, only less "
            "precise; raise --max-hvps or --rtol."
        )


SCHEMA = "zoscope.track/1"

Status = Literal["finished", "target", "diverged", "time", "interrupted"]
OVER: tuple[str, ...] = ("finished", "target", "diverged")
"""How a run ends that cannot go on; the others can be resumed."""


@dataclass(frozen=True)
class Band(JsonObject):
    """How often the threshold term lies in ``[0.9 lower, 1.1 upper]`` once the curvature has risen to it.

    Args:
        inside: Measurements inside.
        of: Measurements since the first one with ``threshold ≤ 1.1 upper``.
        since: Step of that one; ``None`` where the edge was never reached.
    """

    keys = "inside of share since"

    inside: int
    of: int
    since: int | None

    @property
    def share(self) -> float | None:
        """Their ratio."""
        return self.inside / self.of if self.of else None


def band_of(records: Sequence[Record]) -> Band:
    """See `Band`."""
    known = [record for record in records if record.in_band is not None]
    reached = next((n for n, record in enumerate(known) if record.reaches_edge), None)
    if reached is None:
        return Band(0, 0, None)
    return Band(sum(bool(record.in_band) for record in known[reached:]), len(known) - reached, known[reached].step)


@dataclass(frozen=True)
class TrackResult(RichResult):
    """A run, or as much of it as there is.

    Args:
        spec: Name of the problem.
        optimizer: ``zo-gd`` and so on.
        config: Every option that makes the run what it is, as ``config.yaml`` holds it.
        device: Where it ran.
        dtype: Floating-point type.
        num_params: Number of trained parameters.
        num_examples: Examples of the problem.
        every: Steps between measurements; the first interval of an adaptive run.
        status: ``finished``; ``target``: the loss asked for was reached; ``diverged``; ``time``: time ran out;
            ``interrupted``.
        reason: One sentence on it.
        steps_done: Steps done.
        records: The measurements, in order.
        folder: Where the run is kept; ``None`` for a run without a folder.
        seconds: Wall time, over all sessions of the run.
        measuring_seconds: Part of it spent on measurements.
        parameters: The parameters at the end, on the CPU, by name.
        warnings: What to know before trusting a number.
        version: Version of zoscope.
    """

    spec: str | None
    optimizer: str
    config: Mapping[str, Any]
    device: str
    dtype: str
    num_params: int
    num_examples: int
    every: int
    status: Status
    reason: str
    steps_done: int
    records: tuple[Record, ...]
    folder: Path | None
    seconds: float
    measuring_seconds: float
    parameters: Mapping[str, Tensor] = field(repr=False)
    warnings: tuple[Notice, ...] = ()
    version: str = field(default=__version__)

    @property
    def num_hvps(self) -> int:
        """Hessian-vector products spent in all."""
        return sum(record.num_hvps for record in self.records)

    @property
    def band(self) -> Band:
        """How many measurements lie in the band, from the first one on that reached it."""
        return band_of(self.records)

    @property
    def checkpoint(self) -> Path | None:
        """File with the last complete state."""
        return None if self.folder is None else self.folder / "checkpoint.pt"

    def summary(self) -> dict[str, Any]:
        """The document without its measurements, as ``summary.json`` holds it."""
        last = self.records[-1].loss if self.records else None
        return {
            "schema": SCHEMA,
            **pick(self, "zoscope=version spec optimizer status reason steps=steps_done"),
            "loss": encode(last),
            "every": self.every,
            "measurements": len(self.records),
            **pick(self, "in_band=band num_hvps seconds measuring_seconds device dtype"),
            "problem": pick(self, "num_params num_examples"),
            **pick(self, "config warnings"),
        }

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.track/1``: JSON numbers, strings and null only."""
        folder = None if self.folder is None else str(self.folder)
        return self.summary() | {"folder": folder} | pick(self, "records")


class TrackInterruptedError(KeyboardInterrupt):
    """A run that was interrupted, with what it has found.

    Args:
        result: Its status is ``interrupted``.
    """

    def __init__(self, result: TrackResult) -> None:
        super().__init__()
        self.result = result
