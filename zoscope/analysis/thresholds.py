"""What ``zoscope.bounds`` returns: by optimizer its thresholds, what binds, what a given step size would do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zoscope.result import JsonObject, MeasuredResult, encode, pick
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from zoscope.analysis.advice import Advisor, Limit
    from zoscope.analysis.minibatch import ForwardMiniBatch, MiniBatchBounds
    from zoscope.curvature.slq import Curvature, ForwardCurvature
    from zoscope.planning.mu import PerturbationScale
    from zoscope.registry import Directions
    from zoscope.theory.rules import UpdateRule
    from zoscope.theory.stability import HorizonPoint

ThresholdName = Literal["horizon", "descent", "exact", "forward", "short-horizon", "fo"]
Outlook = Literal["stable", "uncertain", "unstable"]
Pair = tuple[float, float]

FAR_APART = 3.0
"""Ratio of the ends of a threshold from which it is shown as a range: no number between them is known."""

ASSUMED = "H is positive semidefinite"
"""What the lower bound of forward passes takes for granted."""


def ci95(estimate: Estimate) -> Pair:
    """The 95 % interval of a positive quantity: the lower end is cut at 0."""
    low, high = estimate.interval
    return max(low, 0.0), high


def outer_ci95(point: HorizonPoint) -> Pair:
    """From the lower 95 % end of the full version to the upper one of the positive version."""
    return ci95(point.lower)[0], ci95(point.upper)[1]


def point_dict(point: HorizonPoint) -> dict[str, Any]:
    """The JSON object of η*(T) at one horizon."""
    return pick(point, "steps lower=lower.value upper=upper.value") | {"ci95": encode(outer_ci95(point))}


@dataclass(frozen=True)
class Horizon(JsonObject):
    """Stable for how many steps: η*(N).

    Args:
        steps: The planned number of steps N.
        lower: η*(N) with all eigenvalues (full).
        upper: η*(N) with the positive ones only (positive).
        ci95: From the lower 95 % end of ``lower`` to the upper 95 % end of ``upper``.
        curve: η*(T) at other horizons, N among them, sorted by steps.
    """

    steps: int
    lower: float
    upper: float
    ci95: Pair
    curve: tuple[HorizonPoint, ...]

    @property
    def planned(self) -> HorizonPoint:
        """The point of the curve at the planned number of steps, with its error bars."""
        return next(point for point in self.curve if point.steps == self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return super().to_dict() | {"curve": [point_dict(point) for point in self.curve]}


@dataclass(frozen=True)
class Binding(JsonObject):
    """The threshold that a run of the planned length meets first; ``inf`` when nothing limits the step size."""

    name: ThresholdName
    value: float


@dataclass(frozen=True)
class Floor(JsonObject):
    """Where runs stall whose steps do not shrink with the gradient: ‖g‖ = κ·lr·Tr(H)/2 on the quadratic model.

    Args:
        lr: Step size whose floor is the present gradient; below it a run goes down from here.
        grad_norm: ‖g‖ here, loss/param.
        asked: The step size asked about.
        grad_norm_at_lr: ‖g‖ at which a run with that stalls.
    """

    keys = "lr grad_norm grad_norm_at_lr?"

    lr: Estimate
    grad_norm: float
    asked: float | None = None
    grad_norm_at_lr: float | None = None


@dataclass(frozen=True)
class Verdict(JsonObject):
    """What a given step size does in the planned number of steps.

    Args:
        lr: The step size asked about.
        steps: The planned number of steps N.
        ratio: ``lr`` over the limit; 0 where nothing limits the step size, ``None`` without a threshold.
        outlook: Where ``lr`` stands to the limit: ``stable`` up to 0.8 of its lower end (0.57 where the gradient is not
            small), ``unstable`` above its upper end, ``uncertain`` between them.
        blow_up: Steps from which the noise feeds itself, the earlier one of all eigenvalues and of the positive ones
            first; ``inf`` for never, ``None`` where the spectrum is not known and the outlook is about infinite time.
            After a few hundred steps negative curvature is not the source of noise that the first one takes it for.
        doubling: Steps after which the loss has doubled, in the mean over runs and in a typical run; ``inf`` for not
            within N; ``None`` where it is not predicted.
        descends: Whether the expected loss falls in the first step; ``None`` without a descent threshold or with
            momentum, where one step says little.
    """

    lr: float
    steps: int
    ratio: float | None
    outlook: Outlook
    blow_up: Pair | None
    doubling: Pair | None
    descends: bool | None


@dataclass(frozen=True)
class ForwardBounds(JsonObject):
    """What forward passes alone say of an optimizer's thresholds, with error bars.

    Args:
        lower: Below the infinite-time threshold if ``H ⪰ 0``.
        upper: Above the infinite-time threshold of the positive part, whatever H is.
        descent: Descent threshold, whatever H is.
        minibatch: The same of mini-batches, where a batch size was asked for, as far as it can be known.
    """

    lower: Estimate
    upper: Estimate
    descent: Estimate
    minibatch: ForwardMiniBatch | None = None

    @property
    def met(self) -> tuple[Estimate, Estimate, Estimate]:
        """Lower bound, upper bound and descent threshold that training meets: those of its mini-batches, if any."""
        if self.minibatch is None:
            return self.lower, self.upper, self.descent
        return self.minibatch.lower, self.minibatch.upper, self.minibatch.descent or self.descent

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        found = pick(self, "lower upper descent")
        return {key: entry | {"assumes": ASSUMED if key == "lower" else None} for key, entry in found.items()}


ZEROTH_ORDER = """
    lower=zo_lower upper=zo_upper lower_tight upper_tight ci95=zo_ci95 tight_ci95 exact=exact.value exact_ci95 horizon
    descent descent_ci95 binding limit recommended recommended_range provisional doubts recommended_reason predicted_lr
    exact_if_commuting? floor?
"""


@dataclass(frozen=True)
class OptimizerBounds(JsonObject):
    """Step-size bounds of one update rule, first- and zeroth-order.

    Args:
        name: Its name, such as ``adam``.
        rule: The update rule of theory.
        operator: Key of the curvature that the bounds come from.
        settings: What identifies the rule: ``beta``; or ``betas``, ``eps`` and ``preconditioner``.
        fo: First-order threshold.
        zo_lower: The paper's lower bound (assumes ``H ⪰ 0``).
        zo_upper: The paper's upper bound (assumes ``H ⪰ 0``).
        lower_tight: Lower bound from two moments of the positive part.
        upper_tight: Upper bound from two moments of the positive part.
        exact: Infinite-time threshold of the positive part.
        horizon: η*(N) and its curve; ``None`` where the spectrum is not known (forward passes only).
        descent: Largest step size with a falling expected loss; ``None`` at a stationary point.
        binding: The threshold that binds for the planned steps; ``None`` where neither is known.
        recommended: Suggested step size; ``None`` when nothing limits it, or its limit is not known.
        recommended_reason: One sentence on where it comes from.
        predicted_lr: Step size with the lowest predicted loss after the planned steps; ``None`` in doubt.
        commutator: ``‖PH−HP‖_F/‖PH‖_F`` of a preconditioned rule.
        verdict: On the step size asked about, if any.
        forward: Where only forward passes were made: ``zo_lower``, ``zo_upper`` and ``descent`` with their errors. The
            first two then come from ``Tr H`` and ``‖H‖_F²``.
        minibatch: Thresholds with mini-batches, where a batch size was asked for; ``binding``, ``recommended`` and
            ``verdict`` go by them then.
        zo_ci95: From the lower 95 % end of ``zo_lower`` to the upper one of ``zo_upper``.
        tight_ci95: The same of ``lower_tight`` and ``upper_tight``.
        descent_ci95: 95 % interval of ``descent``.
        limit: What ``recommended`` keeps below and ``verdict`` compares with.
        doubts: Codes of why the recommendation is provisional; empty where it is not.
        exact_if_commuting: What ``exact`` would be if P and H commuted, where they do not and ``exact`` says so.
        floor: Where adaptive runs stall; ``None`` for other optimizers, for a zero gradient, and with a stored P.
        advisor: Advice for other numbers of steps and other thresholds; ``None`` where only forward passes were made.
    """

    name: str
    rule: UpdateRule
    operator: str
    settings: Mapping[str, Any]
    fo: float | None
    zo_lower: float | None
    zo_upper: float | None
    lower_tight: float | None
    upper_tight: float | None
    exact: Estimate | None
    horizon: Horizon | None
    descent: float | None
    binding: Binding | None
    recommended: float | None
    recommended_reason: str
    predicted_lr: float | None = None
    commutator: Estimate | None = None
    verdict: Verdict | None = None
    forward: ForwardBounds | None = None
    minibatch: MiniBatchBounds | None = None
    zo_ci95: Pair | None = None
    tight_ci95: Pair | None = None
    descent_ci95: Pair | None = None
    limit: Limit | None = None
    doubts: tuple[str, ...] = ()
    exact_if_commuting: float | None = None
    floor: Floor | None = None
    advisor: Advisor | None = field(default=None, repr=False, compare=False)

    @property
    def exact_ci95(self) -> Pair | None:
        """95 % interval of the infinite-time threshold."""
        return None if self.exact is None else ci95(self.exact)

    @property
    def ends(self) -> Pair | None:
        """The ends of what limits the step size, where they are too far apart for one number; else ``None``.

        They are those of its 95 % interval, or those of η*(N).
        """
        point = self.minibatch.horizon if self.minibatch else self.horizon.planned if self.horizon else None
        if self.limit is None or point is None or not math.isfinite(self.limit.value):
            return None
        low = high = self.limit.value
        if self.limit.is_wide:
            low, high = max(low - self.limit.error, 0.0), high + self.limit.error
        if FAR_APART * point.lower.value < point.upper.value:
            low, high = min(low, point.lower.value), max(high, point.upper.value)
        return (low, high) if FAR_APART * low < high else None

    @property
    def recommended_range(self) -> Pair | None:
        """Step sizes by both ends of what limits them, up to the recommended one; ``None`` for a single number."""
        if self.recommended is None or self.limit is None or self.ends is None:
            return None
        low = self.recommended * self.ends[0] / self.limit.value
        return (low, self.recommended) if low < (1 - 1e-9) * self.recommended else None

    @property
    def times_below_fo(self) -> float | None:
        """How many times smaller than the first-order threshold the binding one is; ``None`` unless both are finite."""
        if self.fo is None or self.binding is None or not math.isfinite(self.fo) or self.binding.value <= 0:
            return None
        return self.fo / self.binding.value if math.isfinite(self.binding.value) else None

    @property
    def provisional(self) -> bool:
        """Whether there is a reason to doubt the recommendation."""
        return bool(self.doubts)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        found = self if self.forward is None else self.forward
        zeroth_order = pick(self, ZEROTH_ORDER) | pick(found, "minibatch?")
        first = pick(self, "operator") | dict(self.settings) | pick(self, "fo")
        return first | {"zo": zeroth_order} | pick(self, "commutator? forward? verdict?")


CURVATURE = """
    trace frobenius_sq lambda_max lambda_min trace_positive negative_mass effective_rank method hvp num_hvps seconds
"""
"""What is told of a measured operator."""


@dataclass(frozen=True)
class Estimator(JsonObject):
    """The zeroth-order gradient estimate: direction law and number of averaged queries.

    Args:
        directions: Law of the directions.
        queries: Queries averaged.
        one_sided_mu: With one-sided differences, μ at which the noise that they add is as large as that of directions.
    """

    keys = "directions queries one_sided_mu?"

    directions: Directions
    queries: int
    one_sided_mu: float | None = None


@dataclass(frozen=True, kw_only=True)
class BoundsResult(MeasuredResult):
    """Curvature and step-size bounds of a problem; the other fields are those of every `MeasuredResult`.

    Args:
        steps: The planned number of training steps N.
        rtol: Relative 95 % half-width asked for.
        curvature: One entry per operator measured.
        optimizers: One entry per update rule.
        estimator: The zeroth-order gradient estimate.
        forward: The Hessian as forward passes see it, where only those were made; ``curvature`` is empty then.
        mu: μ to judge.
        perturbation: At which μ slopes are right, with the batch and in the dtype that train, if one was to be judged.
    """

    schema = "zoscope.bounds/1"

    steps: int
    rtol: float
    curvature: Mapping[str, Curvature]
    optimizers: Mapping[str, OptimizerBounds]
    estimator: Estimator
    forward: ForwardCurvature | None = None
    mu: float | None = None
    perturbation: PerturbationScale | None = None

    def body(self) -> dict[str, Any]:
        """What only this kind of result has."""
        curvature = {name: pick(entry, CURVATURE) for name, entry in self.curvature.items()}
        if self.forward is not None:
            curvature["hessian"] = _forward_dict(self.forward)
        found = {"checks": {"num_hvps": self.num_check_hvps}, "curvature": curvature}
        return pick(self, "steps rtol") | found | pick(self, "optimizers estimator mu? perturbation?")

    @property
    def num_check_hvps(self) -> int:
        """The part of ``num_hvps`` that no operator lists.

        It went into whether products repeat, what kinks add to the trace, and how far P and H are from commuting.
        """
        if self.forward is not None:
            return 0
        batches = {row.operator: row.minibatch.num_hvps for row in self.optimizers.values() if row.minibatch}
        return self.num_hvps - sum(c.num_hvps for c in self.curvature.values()) - sum(batches.values())


def _forward_dict(found: ForwardCurvature) -> dict[str, Any]:
    unknown = ("lambda_max", "lambda_min", "trace_positive", "negative_mass", "effective_rank")
    more = "rayleigh gradient_sq step step_disagreement=disagreement method num_hvps num_evaluations seconds"
    return pick(found, "trace frobenius_sq") | dict.fromkeys(unknown) | pick(found, more)
