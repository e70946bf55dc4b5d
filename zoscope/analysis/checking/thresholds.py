"""The thresholds that a check may be held against, taken from a ``BoundsResult`` and kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zoscope.analysis.checking.results import Threshold
from zoscope.analysis.optimizer_bounds import ci95
from zoscope.analysis.recommend import choose_binding
from zoscope.errors import UsageError
from zoscope.theory.horizons import horizon_curve
from zoscope.theory.moments import estimator_moments

if TYPE_CHECKING:
    from zoscope.analysis.minibatch_results import MiniBatchBounds
    from zoscope.analysis.optimizer_bounds import OptimizerBounds
    from zoscope.analysis.results import BoundsResult
    from zoscope.theory.horizons import HorizonPoint


@dataclass(frozen=True)
class OptimizerThresholds:
    """What is known of one update rule.

    Args:
        known: Thresholds that hold for any number of steps, by name; ``inf`` where nothing limits the step size.
        horizons: η*(N) by number of steps.
        minibatch: Whether they are those of mini-batches. Between their descent threshold and their horizon the noise
            of gradients lifts the loss: to a floor, or out of the valley. What binds is an interval from one to the
            other, so that a step size in it is warned of.
    """

    known: Mapping[str, Threshold]
    horizons: Mapping[int, Threshold]
    minibatch: bool = False

    def choose(self, policy: str, *, zeroth_order: bool, steps: int, curvature: str) -> Threshold:
        """The threshold that the policy names; the first-order one for a first-order optimizer.

        Raises:
            UsageError: If it cannot be known from this kind of curvature, or is not defined at this point.
        """
        known = self._of(steps)
        name = "fo" if not zeroth_order else self._binding(known) if policy == "binding" else policy
        if name in known:
            widened = self.minibatch and policy == "binding" and name in ("horizon", "forward") and "descent" in known
            low = min(known[name].low, known["descent"].low) if widened else known[name].low
            return replace(known[name], low=low)
        available = ", ".join(other for other in known if (other == "fo") != zeroth_order) or "none"
        raise UsageError(
            f"the {name} threshold is not known here with curvature kind {curvature!r} (known: {available}). Choose "
            "one that is, as policy.threshold; forward passes know no spectrum, and a stationary point has no descent."
        )

    def _of(self, steps: int) -> dict[str, Threshold]:
        return {**self.known, **({"horizon": self.horizons[steps]} if steps in self.horizons else {})}

    def _binding(self, known: Mapping[str, Threshold]) -> str:
        values = {name: known[name].value if name in known else None for name in ("horizon", "descent", "exact")}
        if self.minibatch:
            values["descent"] = None
        binding = choose_binding("binding", **values)
        forward = known.get("forward")
        if forward is not None and (binding is None or forward.value < binding.value):
            return "forward"
        return "forward" if binding is None else binding.name

    def to_dict(self) -> dict[str, Any]:
        """For the cache file."""
        return {
            "known": {name: _row(threshold) for name, threshold in self.known.items()},
            "horizons": {str(steps): _row(threshold) for steps, threshold in self.horizons.items()},
            "minibatch": self.minibatch,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> OptimizerThresholds:
        """From the cache file.

        Raises:
            ValueError, KeyError, TypeError: If it is not what ``to_dict`` wrote.
        """
        known = {name: _threshold(name, row) for name, row in document["known"].items()}
        horizons = {int(steps): _threshold("horizon", row) for steps, row in document["horizons"].items()}
        return cls(known, horizons, bool(document["minibatch"]))


def _row(threshold: Threshold) -> list[float | str]:
    parts = (threshold.value, threshold.low, threshold.high, threshold.error)
    return [part if math.isfinite(part) else str(part) for part in parts]  # JSON has no infinity


def _threshold(name: str, row: Sequence[Any]) -> Threshold:
    value, low, high, error = (float(part) for part in row)
    return Threshold(name, value, low, high, error)


@dataclass(frozen=True)
class Measurement:
    """One call of ``bounds``, reduced to what the gate needs.

    Args:
        optimizers: Thresholds by update rule.
        num_examples: Examples in the problem's data.
        notices: Warnings of the measurement.
        seconds: Its wall-clock time.
        cached: Whether it was read from the cache.
    """

    optimizers: Mapping[str, OptimizerThresholds]
    num_examples: int
    notices: tuple[str, ...]
    seconds: float
    cached: bool = False

    @classmethod
    def of(cls, result: BoundsResult, *, steps: Sequence[int], seconds: float) -> Measurement:
        """From the result of ``bounds``, with horizons of its spectrum at other numbers of steps."""
        return cls(
            optimizers={name: _thresholds(result, entry, steps) for name, entry in result.optimizers.items()},
            num_examples=result.problem.num_examples,
            notices=tuple(notice.message for notice in result.warnings),
            seconds=seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """For the cache file."""
        return {
            "optimizers": {name: entry.to_dict() for name, entry in self.optimizers.items()},
            "num_examples": self.num_examples,
            "notices": list(self.notices),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Measurement:
        """From the cache file.

        Raises:
            ValueError, KeyError, TypeError: If it is not what ``to_dict`` wrote.
        """
        return cls(
            optimizers={name: OptimizerThresholds.from_dict(row) for name, row in document["optimizers"].items()},
            num_examples=int(document["num_examples"]),
            notices=tuple(str(notice) for notice in document["notices"]),
            seconds=float(document["seconds"]),
            cached=True,
        )


def _thresholds(result: BoundsResult, bounds: OptimizerBounds, steps: Sequence[int]) -> OptimizerThresholds:
    if bounds.minibatch is not None:
        return _minibatch(_first_order(result, bounds), bounds.minibatch, steps)
    rows: list[Threshold | None] = [_first_order(result, bounds), _forward(bounds)]
    of_batches = bounds.forward is not None and bounds.forward.minibatch is not None
    if bounds.exact is not None and bounds.exact_ci95 is not None:
        rows.append(Threshold("exact", bounds.exact.value, *bounds.exact_ci95, bounds.exact.half_width))
    if bounds.forward is not None:
        _, _, descent = bounds.forward.met
        rows.append(Threshold("descent", descent.value, *ci95(descent), descent.half_width))
    elif bounds.descent is not None:
        low, high = bounds.descent_ci95 or (bounds.descent, bounds.descent)
        error = high - bounds.descent if math.isfinite(bounds.descent) else 0.0
        rows.append(Threshold("descent", bounds.descent, low, high, error))
    known = {row.name: row for row in rows if row is not None}
    return OptimizerThresholds(known, _horizons(result, bounds, steps), minibatch=of_batches)


def _horizons(result: BoundsResult, bounds: OptimizerBounds, steps: Sequence[int]) -> dict[int, Threshold]:
    if bounds.horizon is None:
        return {}
    estimator = result.estimator
    moments = estimator_moments(estimator.directions, queries=estimator.queries, dimension=result.problem.num_params)
    spectrum = result.curvature[bounds.operator].spectrum
    points = horizon_curve(spectrum, sorted(steps), rule=bounds.rule, moments=moments)
    return {point.steps: _of_point(point) for point in points}


def _minibatch(first_order: Threshold | None, found: MiniBatchBounds, steps: Sequence[int]) -> OptimizerThresholds:
    rows = [] if first_order is None else [first_order]
    for name, estimate in (("exact", found.exact), ("descent", found.descent)):
        if estimate is not None:
            rows.append(Threshold(name, estimate.value, *ci95(estimate), estimate.half_width))
    points = [found.model.at(number) for number in sorted(steps)]
    return OptimizerThresholds({row.name: row for row in rows}, {p.steps: _of_point(p) for p in points}, minibatch=True)


def _of_point(point: HorizonPoint) -> Threshold:
    low, high = ci95(point.lower)[0], ci95(point.upper)[1]
    return Threshold("horizon", point.upper.value, low, high, point.upper.half_width)


def _first_order(result: BoundsResult, bounds: OptimizerBounds) -> Threshold | None:
    """A Ritz value lies below λ_max by at most its residual, so the threshold below ``fo`` by as much."""
    if bounds.fo is None:
        return None
    sharpest = result.curvature[bounds.operator].lambda_max
    low = bounds.fo if math.isinf(bounds.fo) else bounds.fo * sharpest.value / (sharpest.value + sharpest.residual)
    return Threshold("fo", bounds.fo, low, bounds.fo, error=0.0 if math.isinf(bounds.fo) else bounds.fo - low)


def _forward(bounds: OptimizerBounds) -> Threshold | None:
    """From two moments alone, where the spectrum is not known: the interval is the pair of bounds."""
    if bounds.forward is None:
        return None
    lower, upper, _ = bounds.forward.met
    return Threshold("forward", upper.value, ci95(lower)[0], ci95(upper)[1], upper.half_width)
