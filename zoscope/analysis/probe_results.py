"""What ``zoscope.probe`` is asked for, and what it returns: the document ``zoscope.probe/1``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Unpack

from zoscope.analysis.request import OneOptimizer, Progress, Request
from zoscope.analysis.thresholds import Estimator, Pair
from zoscope.optim.directions import check_law
from zoscope.optim.replicas import ZerothOrderEstimator
from zoscope.options import ProbeOptions, keywords
from zoscope.registry import family_of
from zoscope.result import JsonObject, MeasuredResult, encode, pick, thinned
from zoscope.theory.rules import FIRST_ORDER, EstimatorMoments

if TYPE_CHECKING:
    from zoscope.theory.rules import UpdateRule

ProbeProgress = Callable[[str, int, int], None]

DEFAULT_RATIOS = (0.8, 1.25)


def numbers(values: float | Sequence[float] | None) -> tuple[float, ...]:
    """One number or several, as a tuple."""
    if values is None:
        return ()
    return tuple(values) if isinstance(values, Iterable) else (float(values),)


@dataclass(frozen=True)
class ProbeRequest(OneOptimizer):
    """Options of ``zoscope.probe``; those that ``zoscope.bounds`` has too are in ``measure``.

    Raises:
        ValueError: If they do not fit together.
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
    on_progress: ProbeProgress | None = field(repr=False)

    def __post_init__(self) -> None:
        if not (self.ratios or self.lrs or self.edge):
            raise ValueError("nothing to run: give ratios, step sizes, or edge=True")
        if self.linearized and self.measure.weight_decay:
            raise ValueError("weight_decay is for runs on the loss itself: its quadratic model has no origin")
        if self.batch_size is not None and (self.first_order or self.linearized):
            raise ValueError("batch_size is for zeroth-order runs on the loss itself")

    @classmethod
    def of(
        cls,
        *,
        on_progress: Progress | None = None,
        on_run: ProbeProgress | None = None,
        **options: Unpack[ProbeOptions],
    ) -> ProbeRequest:
        """From keyword arguments of ``zoscope.probe``.

        Raises:
            TypeError: For one that it does not take.
            ValueError: For one that is out of range, or several that do not fit together.
        """
        found = keywords("probe", options)
        lrs, ratios = numbers(found.pop("lr")), found.pop("ratios")
        if ratios is None:
            ratios = () if lrs or found["edge"] else DEFAULT_RATIOS
        own = {entry.name for entry in fields(cls)} & found.keys()
        measured = {name: found[name] for name in found.keys() - own} | {"steps": found["steps"] or 1000}
        measured["optimizers"] = (family_of(found["optimizer"]),)
        return cls(
            measure=Request(**measured, on_progress=on_progress),
            ratios=numbers(ratios),
            lrs=lrs,
            on_progress=on_run,
            **{name: found[name] for name in own},
        )

    @property
    def batch_size(self) -> int | None:
        """Examples per step, drawn at random; ``None`` for all of them."""
        return self.measure.batch_size

    @property
    def rule(self) -> UpdateRule:
        """The rule, as theory sees it."""
        return self.measure.rule_of(self.family)

    def moments(self, *, dimension: int) -> EstimatorMoments:
        """Constants of what the rule is fed with."""
        return FIRST_ORDER if self.first_order else self.measure.moments(dimension=dimension)

    @property
    def estimator(self) -> ZerothOrderEstimator:
        """What the rule is fed with."""
        return ZerothOrderEstimator(
            order=1 if self.first_order else 0,
            mu=self.mu,
            queries=self.measure.queries,
            directions=check_law(self.measure.directions),
            one_sided=self.measure.differences == "one-sided",
        )


@dataclass(frozen=True)
class ProbedThreshold(JsonObject):
    """The threshold under test and those beside it; step sizes in param²/loss.

    Args:
        name: ``exact``, ``descent``, ``horizon``, ``first-order`` or ``assumed``.
        value: Its value, which the ratios refer to.
        exact: Infinite-time threshold of the mean square.
        exact_ci95: Its 95 % interval.
        horizon: η*(steps), full and positive version; ``None`` for a first-order optimizer.
        horizon_ci95: Ends of their 95 % intervals: the lower one of the first, the upper one of the second.
        descent: Descent threshold.
    """

    keys = "name value exact ci95=exact_ci95 horizon horizon_ci95 descent"

    name: str
    value: float
    exact: float | None
    exact_ci95: Pair | None
    horizon: Pair | None
    horizon_ci95: Pair | None
    descent: float | None


@dataclass(frozen=True)
class EdgePoint(JsonObject):
    """One step size of the bisection.

    Args:
        lr: Step size.
        diverged: How many replicas did.
        replicas: Of how many.
        left_at: Their median step; ``None`` unless the majority did.
        blow_up: Predicted time to blow-up, full and positive version.
    """

    keys = "lr diverged replicas left_at blow_up_predicted=blow_up"

    lr: float
    diverged: int
    replicas: int
    left_at: float | None
    blow_up: Pair

    @property
    def lost(self) -> bool:
        """Whether half of the replicas diverged."""
        return 2 * self.diverged >= self.replicas


@dataclass(frozen=True)
class Edge(JsonObject):
    """The empirical edge: where half of the replicas diverge within ``steps``.

    Args:
        lo: Largest step size tried at which all replicas below the edge stayed.
        hi: Smallest at which all above it diverged.
        value: The edge, geometric mean of the last bracket of the bisection.
        steps: Steps of every run.
        ratio_to_exact: ``value`` over the infinite-time threshold.
        ratio_to_horizon: Over η*(steps), full and positive; ``None`` for a first-order optimizer.
        predicted: The edge of single runs of the quadratic model by the same rule and over the same steps: above the
            threshold of the mean square, which rare runs carry. ``None`` where it is not known.
        found: Whether the bisection closed its bracket.
        points: Every step size tried, ascending.
        end: Curvature where the first replica to diverge, at the smallest step size at which half of them did, was
            before it did.
        sharpened: Whether the threshold had come down past that step size by then.
    """

    keys = """
        lo hi value steps ratio_to_exact ratio_to_horizon predicted ratio_to_predicted found points end sharpened
    """

    lo: float
    hi: float
    value: float
    steps: int
    ratio_to_exact: float | None
    ratio_to_horizon: Pair | None
    predicted: float | None
    found: bool
    points: tuple[EdgePoint, ...]
    end: EndState | None = None
    sharpened: bool = False

    @property
    def ratio_to_predicted(self) -> float | None:
        """``value`` over ``predicted``: what the landscape adds to the quadratic model."""
        return None if self.predicted is None or not self.found else self.value / self.predicted


RunVerdict = Literal["stable", "diverged", "sharpened", "inconclusive", "falls", "rises"]
Variant = Literal["first-order", "zeroth-order", "frozen", "adaptive"]


@dataclass(frozen=True)
class EndState(JsonObject):
    """The curvature measured again, where a replica was last seen before it diverged.

    Args:
        step: The step of that.
        threshold: Threshold there, for the rule that ran (frozen or current P for Adam); with mini-batches that of all
            examples, times the ratio of the two at the start.
        trace: Trace of the operator that the rule acts through, there.
        lambda_max: Its largest eigenvalue.
        term: What the paper's band is compared with: ``2/η``, ``2(1−β)/η`` for momentum.
        preconditioner_mean: Mean diagonal of P_t, for an adaptive run.
    """

    step: int
    threshold: float
    trace: float
    lambda_max: float
    term: float
    preconditioner_mean: float | None = None


POINTS = 60
"""Most points of a curve in the document."""


@dataclass(frozen=True)
class Curves(JsonObject):
    """A run over its steps.

    Args:
        steps: Steps looked at, 0 first.
        losses: For every step the losses of the replicas; ``None`` from where one left.
        distances: Squared distances from the start, likewise.
        predicted: The predicted mean loss, ``None`` where it overflows or is not known.
    """

    steps: tuple[int, ...]
    losses: tuple[tuple[float | None, ...], ...]
    distances: tuple[tuple[float | None, ...], ...]
    predicted: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: points evenly spread over the steps looked at, the first and the last among them."""
        return {name: encode(thinned(values, POINTS)) for name, values in vars(self).items()}


@dataclass(frozen=True)
class PredictionError(JsonObject):
    """The predicted loss curve against the replicas' mean.

    Args:
        step: Where they are compared: when the mean loss has fallen by a quarter, or at the end.
        predicted_change: Predicted change of the loss up to there, around the measured mean path where that is known.
        quadratic_change: The same from the quadratic model at the start alone.
        measured_change: Mean change of the replicas.
        stderr: Its standard error.
    """

    keys = "step predicted_change quadratic_change measured_change stderr relative"

    step: int
    predicted_change: float
    quadratic_change: float
    measured_change: float
    stderr: float | None

    @property
    def relative(self) -> float | None:
        """Error relative to the measured change."""
        if self.measured_change == 0:
            return None
        return abs(self.predicted_change - self.measured_change) / abs(self.measured_change)


@dataclass(frozen=True)
class ProbeRun(JsonObject):
    """All replicas at one step size.

    Args:
        lr: Step size.
        ratio: To the probed threshold.
        side: Which side of it.
        variant: ``frozen`` or ``adaptive`` P for Adam; the order of the method otherwise.
        rate_predicted: Growth rate ρ of the mean square, per step; not known with mini-batches.
        growth_predicted: ``ρ^steps``.
        steps: Steps asked for.
        steps_done: Steps that the slowest surviving replica reached.
        replicas: Number of replicas.
        diverged: How many diverged, or rose to twice the loss.
        left_at: The median step at which they did.
        loss_start: Loss at the start.
        loss_end: Mean loss of the replicas that stayed, at the end; ``None`` when none did.
        verdict: What happened.
        as_predicted: Whether that is what the threshold says; ``None`` where the run does not count.
        reason: One sentence on the verdict.
        prediction: The predicted loss curve against the measured one.
        end: The curvature at the end.
        curves: Loss and distance over the steps.
        seconds: Wall time.
    """

    lr: float
    ratio: float
    side: Literal["below", "above"]
    variant: Variant
    rate_predicted: float | None
    growth_predicted: float | None
    steps: int
    steps_done: int
    replicas: int
    diverged: int
    left_at: float | None
    loss_start: float
    loss_end: float | None
    verdict: RunVerdict
    as_predicted: bool | None
    reason: str
    prediction: PredictionError | None
    end: EndState | None
    curves: Curves = field(repr=False)
    seconds: float


Outcome = Literal["confirmed", "refuted", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class ProbeResult(MeasuredResult):
    """What a probe found; the other fields are those of every `MeasuredResult`.

    Args:
        optimizer: Name as on the command line, such as ``zo-adam``.
        settings: What identifies the rule.
        estimator: The gradient estimate; ``None`` for a first-order optimizer.
        threshold: The threshold under test.
        linearized: Whether the runs were on the quadratic model.
        growth: Growth factor that a run above has to be long enough for.
        runs: One per step size and variant.
        edge: Where the empirical edge was looked for.
        outcome: The verdict on the threshold.
        reason: One sentence on it.
        recommended: Step size to use instead, where runs below the threshold were lost on the way.
        together: Whether replicas were stepped together.
        interrupted: Whether it was cut short.
    """

    schema = "zoscope.probe/1"

    optimizer: str
    settings: Mapping[str, Any]
    estimator: Estimator | None
    threshold: ProbedThreshold
    linearized: bool
    growth: float
    runs: tuple[ProbeRun, ...]
    edge: Edge | None
    outcome: Outcome
    reason: str
    together: bool
    interrupted: bool
    recommended: float | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the threshold was confirmed."""
        return self.outcome == "confirmed"

    def body(self) -> dict[str, Any]:
        """What only this kind of result has."""
        runs = [run.to_dict() | {"curves": run.curves.to_dict()} for run in self.runs]
        found = pick(self, "optimizer") | dict(self.settings) | pick(self, "estimator linearized growth threshold")
        return found | {"runs": runs} | pick(self, "edge confirmed outcome reason recommended? interrupted")


class ProbeInterruptedError(KeyboardInterrupt):
    """The user interrupted a probe.

    Args:
        result: What was known by then.
    """

    def __init__(self, result: ProbeResult) -> None:
        super().__init__()
        self.result = result
