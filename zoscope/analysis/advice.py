"""From thresholds to advice: what binds, what a step size is compared with, and which one to use.

``bounds`` and ``check`` both take their numbers from here, so that neither says what the other denies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from zoscope.analysis.thresholds import FAR_APART, Binding, Outlook, Pair, ThresholdName, Verdict, ci95
from zoscope.result import JsonObject
from zoscope.theory.quadratic import GradientMeasure
from zoscope.theory.stability import Version, horizon_curve

if TYPE_CHECKING:
    from zoscope.analysis.minibatch import MiniBatchModel
    from zoscope.analysis.thresholds import ForwardBounds
    from zoscope.options import Threshold
    from zoscope.theory.rules import EstimatorMoments, UpdateRule
    from zoscope.theory.spectrum import Estimate, SampledSpectrum
    from zoscope.theory.stability import HorizonPoint


MARGIN = 0.7
"""Share of the limit that is recommended. Runs at 0.8 of it have been seen to sharpen their way past it."""

MID_TRAINING = 0.5
"""The same where the gradient is not small: the run leaves the place that was measured, on fresh networks for one where
the threshold is up to twice lower."""

GATE = 0.8
"""Share of the lower end of the limit up to which a step size passes: what ``check`` has by default. Less where the
gradient is not small, by as much as the recommendation."""

SHORT = 300
"""Steps up to which η* of all eigenvalues says anything.

Further on negative curvature would have to feed the noise for longer than a run stays where it was measured.
"""

APART = 0.8
"""η*(N) of all eigenvalues over that of the positive ones, below which the former is a reason for doubt."""


@dataclass(frozen=True)
class Limit(JsonObject):
    """What a step size is compared with, param²/loss, and its 95 % interval; ``inf`` for "stable at every step size".

    Args:
        name: The threshold: ``short-horizon`` is η*(min(N, 300)) of all eigenvalues.
        value: The threshold.
        low: Lower end of the interval; ``value`` where no error is known.
        high: Upper end. Above it the model is sure that a run of the planned length leaves.
        error: 95 % half-width of ``value`` itself. An interval may be wider: it spans every threshold that counts.
        edge: Where runs are expected to leave, without the caution of a provisional limit; ``value`` by default.
    """

    keys = "name value ci95"

    name: str
    value: float
    low: float
    high: float
    error: float = 0.0
    edge: float | None = None

    def ratio(self, lr: float) -> float:
        """A step size over it; 0 where nothing limits the step size."""
        return lr / self.value if self.value else math.inf

    @property
    def is_wide(self) -> bool:
        """Whether the ends of the 95 % interval of the threshold itself are far apart."""
        return math.isfinite(self.value) and self.value + self.error > FAR_APART * (self.value - self.error)

    @property
    def ci95(self) -> Pair:
        """The 95 % interval."""
        return self.low, self.high


@dataclass(frozen=True)
class Advice:
    """What to do about a number of planned steps: the one account that ``bounds`` and ``check`` both go by.

    Args:
        binding: The threshold that the model meets first; ``None`` where none is known.
        limit: What a step size is compared with: ``binding``, or something lower where that is in doubt.
        recommended: Suggested step size; ``None`` when nothing limits it, or nothing is known.
        reason: Where it comes from, one sentence without a full stop.
        doubts: Codes of why it is provisional; empty where it is not.
    """

    binding: Binding | None
    limit: Limit | None
    recommended: float | None
    reason: str
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thresholds:
    """What is known of an optimizer for a planned number of steps, param²/loss.

    Args:
        horizon: η*(N), all eigenvalues and positive ones.
        short: η*(min(N, 300)) of all eigenvalues; ``None`` where it is not asked for, which only doubts do.
        descent: Descent threshold; ``None`` at a stationary point.
        exact: Infinite-time threshold; ``None`` where there is none.
        minibatch: Whether they are those of mini-batches.
    """

    horizon: HorizonPoint
    descent: Estimate | None
    exact: Estimate | None
    short: Estimate | None = None
    minibatch: bool = False

    @property
    def ends_are_apart(self) -> bool:
        """Whether negative curvature leaves η*(N) open."""
        return self.horizon.lower.value < APART * self.horizon.upper.value

    def asked(self, wanted: Threshold) -> list[tuple[ThresholdName, Estimate]]:
        """Those that a name stands for, by name."""
        known: dict[ThresholdName, Estimate | None] = {
            "horizon": self.horizon.upper,
            "descent": self.descent,
            "exact": self.exact,
        }
        names: tuple[ThresholdName, ...] = ("horizon", "descent") if wanted == "binding" else (wanted,)
        return [(name, value) for name in names if (value := known[name]) is not None]


def choose_binding(wanted: Threshold, thresholds: Thresholds) -> Binding | None:
    """The threshold that the model meets first.

    Args:
        wanted: ``"binding"`` takes the smaller one of horizon and descent; any other name takes that one.
        thresholds: What is known.

    Returns:
        ``None`` where the threshold is not defined.
    """
    asked = thresholds.asked(wanted)
    if not asked:
        return None
    name, estimate = min(asked, key=lambda pair: pair[1].value)
    return Binding(name, estimate.value)


def find_limit(wanted: Threshold, thresholds: Thresholds) -> Limit | None:
    """What a step size is compared with: the smallest of what was asked for, in doubt with η*(300) of all eigenvalues.

    Its interval goes from the lowest lower end of all of these to the upper end of η*(N), from which on the model is
    sure, or of the one that was asked for.
    """
    asked = thresholds.asked(wanted)
    if not asked:
        return None
    counted = asked if thresholds.short is None else [*asked, ("short-horizon", thresholds.short)]
    name, smallest = min(counted, key=lambda pair: pair[1].value)
    edge = asked[0][1] if thresholds.minibatch else min((e for _, e in asked), key=lambda e: e.value)
    return Limit(
        name=name,
        value=smallest.value,
        low=min(ci95(estimate)[0] for _, estimate in counted),
        high=ci95(asked[0][1])[1],
        error=smallest.half_width,
        edge=edge.value,  # above its descent threshold a run with mini-batches only gets noisy
    )


FORWARD: tuple[Threshold, ...] = ("binding", "descent")
"""Names that forward passes know something of."""


def forward_limit(wanted: Threshold, bounds: ForwardBounds) -> Limit:
    """What a step size is compared with where forward passes know no spectrum: the pair of bounds is its interval."""
    lower, upper, descent = bounds.met
    name, least = ("forward", upper)
    if wanted == "descent" or descent.value <= upper.value:
        name, least = "descent", descent
    low = min(ci95(lower)[0], ci95(descent)[0])
    edge = least if bounds.minibatch is None else upper
    return Limit(name, least.value, low, max(ci95(upper)[1], low), least.half_width, edge.value)


def recommended_by_forward(limit: Limit, bounds: ForwardBounds) -> float | None:
    """A step size below both bounds; ``None`` where nothing limits it, or nothing is known."""
    if not math.isfinite(limit.value):
        return None
    lr = min(MARGIN * min(limit.value, bounds.met[0].value), GATE * limit.low)
    return lr if lr > 0 else None


def stand(lr: float, limit: Limit, *, margin: float = GATE, doubts: Sequence[str] = ()) -> Outlook:
    """How a step size stands to its limit; of ``check`` this is pass, warn or fail.

    Args:
        lr: Step size, param²/loss.
        limit: What it is compared with.
        margin: Share of the lower end that is left to it, in (0, 1].
        doubts: Codes of why the limit is provisional.
    """
    if lr <= passing(margin, doubts) * limit.low:
        return "stable"
    return "unstable" if lr > limit.high else "uncertain"


def advise(wanted: Threshold, thresholds: Thresholds, doubts: Sequence[str] = ()) -> Advice:
    """What binds, what a step size is compared with, and the step size to use.

    Args:
        wanted: Which threshold counts.
        thresholds: What is known, with ``short`` where there are doubts.
        doubts: Codes of why the binding threshold may be too high: keys of ``DOUBTS``.
    """
    binding = choose_binding(wanted, thresholds)
    limit = find_limit(wanted, thresholds)
    if limit is None:
        return Advice(binding, None, None, "no threshold is known here", tuple(doubts))
    if math.isinf(limit.value):
        return Advice(binding, limit, None, "nothing limits the step size on this quadratic model", tuple(doubts))
    lr = margin_of(doubts) * limit.value
    most = passing(GATE, doubts) * limit.low
    cautious = most < lr
    lr = min(lr, most)
    if lr <= 0:
        reason = "the 95 % interval of the threshold reaches down to 0: raise --max-hvps, or measure at another point"
        return Advice(binding, limit, None, reason, tuple(doubts))
    return Advice(binding, limit, lr, _reason(wanted, thresholds, doubts, cautious=cautious), tuple(doubts))


def margin_of(doubts: Sequence[str]) -> float:
    """Share of the limit that is recommended."""
    return MID_TRAINING if "gradient-not-small" in doubts else MARGIN


def passing(margin: float, doubts: Sequence[str]) -> float:
    """Share of the lower end of the limit up to which a step size passes."""
    return margin * (margin_of(doubts) / MARGIN)


DOUBTS = {
    "gradient-not-small": "the gradient is not small",
    "kinks": "the loss bends where the Hessian does not see it",
    "ends-apart": "negative curvature leaves η*(N) open",
    "little-curvature": "the curvature rises within the first steps",
    "piecewise-constant": "the loss is piecewise constant",
}
"""Why a recommendation is provisional, by the code of its notice or of the doubt."""

JUMPS = "piecewise-constant"
"""The doubt that leaves no threshold."""

NAMES: dict[str, str] = {
    "horizon": "η*(N)",
    "descent": "the descent threshold",
    "exact": "the infinite-time threshold",
}


def _reason(wanted: Threshold, thresholds: Thresholds, doubts: Sequence[str], *, cautious: bool) -> str:
    if not doubts:
        if cautious:
            return f"{GATE:g} × the lower end of the binding threshold's 95 % interval, because it is not known better"
        return f"{MARGIN:g} × the binding threshold, because curvature usually rises while a network trains"
    names = [NAMES[name] for name, _ in thresholds.asked(wanted)]
    steps = min(thresholds.horizon.steps, SHORT)
    names.append(f"η*({steps}) of all eigenvalues")
    share = f"{margin_of(doubts):g} × the smallest"
    if cautious:
        share = f"{passing(GATE, doubts):.2g} × the smallest lower 95 % end"
    return f"{share} of {joined(names)}; provisional, because {joined([DOUBTS[code] for code in doubts])}"


def joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


LONG_WAY = 1.1
"""Decrease of the loss over the planned run, relative to the loss, that no quadratic model with a minimum can mean."""


@dataclass(frozen=True)
class Advisor:
    """Advice for an update rule at a measured point.

    Args:
        rule: Update rule.
        moments: Constants of the estimator.
        spectrum: Of the operator that the rule acts through, all examples.
        gradient: Spectral measure of the gradient in the operator's coordinates; ``None`` for a zero gradient.
        loss: Loss at the point.
        descent: Descent threshold, that of mini-batches where training uses them; ``None`` for a zero gradient.
        exact: Infinite-time threshold, likewise; ``None`` where there is none.
        batches: η*(T) with mini-batches; ``None`` where every step sees all examples.
        doubts: Codes of what speaks against the point whatever the number of steps.
        points: Points of η*(T) that are known already.
    """

    rule: UpdateRule
    moments: EstimatorMoments
    spectrum: SampledSpectrum
    gradient: GradientMeasure | None
    loss: float
    descent: Estimate | None
    exact: Estimate | None
    batches: MiniBatchModel | None = None
    doubts: tuple[str, ...] = ()
    points: tuple[HorizonPoint, ...] = ()

    def at(self, steps: int, wanted: Threshold) -> Advice:
        """Advice for a planned number of steps, by the threshold that is wanted."""
        return self.for_each(steps, (wanted,))[wanted]

    def for_each(self, steps: int, names: Sequence[Threshold]) -> dict[Threshold, Advice]:
        """Advice for a planned number of steps, by each of several thresholds."""
        point = self._point(steps)
        plain = Thresholds(point, self.descent, self.exact, minibatch=self.batches is not None)
        doubted: Thresholds | None = None
        found = {}
        for wanted in names:
            advice = advise(wanted, plain)
            doubts = tuple(self._doubts(plain, advice.recommended))
            if doubts:
                doubted = doubted or replace(plain, short=self._short(point))
                advice = advise(wanted, doubted, doubts)
            found[wanted] = advice
        return found

    def _short(self, planned: HorizonPoint) -> Estimate:
        """η*(min(N, 300)) of all eigenvalues."""
        if planned.steps <= SHORT:
            return planned.lower
        return self._point(SHORT).lower if self.batches is None else self.batches.of_all(SHORT)

    def _point(self, steps: int) -> HorizonPoint:
        for point in self.points:
            if point.steps == steps:
                return point
        if self.batches is not None:
            return self.batches.at(steps)
        (point,) = horizon_curve(self.spectrum, [steps], rule=self.rule, moments=self.moments)
        return point

    def _doubts(self, thresholds: Thresholds, lr: float | None) -> Iterator[str]:
        """Codes; those of the run are about the step size that would be recommended without any."""
        if self.share(lr, thresholds.horizon.steps) > LONG_WAY:
            yield "gradient-not-small"
        yield from self.doubts
        if thresholds.ends_are_apart:
            yield "ends-apart"

    def share(self, lr: float | None, steps: int) -> float:
        """Part of the loss that gradient descent of a step size gains on the quadratic model within some steps."""
        if self.gradient is None or lr is None or self.loss == 0:
            return 0.0
        step = lr * self.rule.lr_scale / (1 - self.rule.momentum)
        if not self.rule.is_linear:
            step /= math.sqrt(self.gradient.weights.sum())
        return decrease(self.gradient, step=step, steps=steps) / abs(self.loss)


def decrease(gradient: GradientMeasure, *, step: float, steps: int) -> float:
    """What gradient descent gains on the quadratic model: ``Σ c (1 − (1 − ηθ)^2N) / 2θ``."""
    theta = np.where(gradient.nodes == 0, np.finfo(float).tiny, gradient.nodes)
    with np.errstate(over="ignore", divide="ignore"):  # along negative curvature the gain has no bound
        gains = -np.expm1(2 * steps * np.log(np.abs(1 - step * theta))) / (2 * theta)
        gains = np.where(np.abs(step * theta) < 1e-12, step * steps, gains)
    found = float(gradient.weights @ gains)
    return found if not math.isnan(found) else math.inf


def judge(
    lr: float,
    *,
    steps: int,
    momentum: float,
    blow_up: Callable[[Version], float],
    advice: Advice,
    descent: float | None,
    doubling: tuple[float, float] | None = None,
) -> Verdict:
    """What a step size does within the planned steps.

    Args:
        lr: Step size asked about, param²/loss.
        steps: Planned number of steps N.
        momentum: Of the update rule; with it the descent threshold is not about one step.
        blow_up: Steps after which its noise feeds itself, by version.
        advice: Whose limit it is compared with.
        descent: Descent threshold.
        doubling: What ``QuadraticModel.doubling_times`` says.
    """
    limit, ends = advice.limit, (blow_up("full"), blow_up("positive"))
    first, last = min(ends), max(ends)
    outlook: Outlook = "unstable" if last <= steps else "uncertain" if first <= steps else "stable"
    return Verdict(
        lr=lr,
        steps=steps,
        ratio=None if limit is None else limit.ratio(lr),
        outlook=outlook if limit is None else stand(lr, limit, doubts=advice.doubts),
        blow_up=(first, last),
        doubling=doubling,
        descends=None if descent is None or momentum > 0 else lr < descent,
    )
