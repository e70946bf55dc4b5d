"""The thresholds that a check may be held against, taken from a ``BoundsResult`` and kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from zoscope.analysis.notices import PROVISIONAL
from zoscope.analysis.recommend import FORWARD, Limit, Threshold, forward_limit
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.optimizer_bounds import OptimizerBounds
    from zoscope.analysis.results import BoundsResult


@dataclass(frozen=True)
class Held:
    """What a step size is held against.

    Args:
        limit: The threshold with its interval.
        doubts: Codes of why it is provisional; empty where it is not.
    """

    limit: Limit
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerThresholds:
    """What is known of one update rule.

    Args:
        first_order: The first-order threshold; ``None`` where it is not known.
        zeroth_order: By number of steps and by policy: what ``bounds`` says there.
        minibatch: Whether they are those of mini-batches.
    """

    first_order: Limit | None
    zeroth_order: Mapping[int, Mapping[str, Held]] = field(default_factory=dict)
    minibatch: bool = False

    def choose(self, policy: str, *, zeroth_order: bool, steps: int, curvature: str) -> Held:
        """What the policy names; the first-order threshold for a first-order optimizer.

        Raises:
            UsageError: If it cannot be known from this kind of curvature, or is not defined at this point.
        """
        if not zeroth_order and self.first_order is not None:
            return Held(self.first_order)
        known = self.zeroth_order.get(steps, {}) if zeroth_order else {}
        if policy in known and zeroth_order:
            return known[policy]
        raise UsageError(
            f"the {policy if zeroth_order else 'fo'} threshold is not known here with curvature kind {curvature!r} "
            f"(known: {', '.join(known) or 'none'}). Choose one that is, as policy.threshold; forward passes know no "
            "spectrum, and a stationary point has no descent."
        )

    def to_dict(self) -> dict[str, Any]:
        """For the cache file."""
        return {
            "first_order": None if self.first_order is None else _row(self.first_order),
            "zeroth_order": {
                str(steps): {policy: [_row(held.limit), list(held.doubts)] for policy, held in known.items()}
                for steps, known in self.zeroth_order.items()
            },
            "minibatch": self.minibatch,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> OptimizerThresholds:
        """From the cache file.

        Raises:
            ValueError, KeyError, TypeError: If it is not what ``to_dict`` wrote.
        """
        first = document["first_order"]
        known = {
            int(steps): {policy: Held(_limit(row), tuple(map(str, doubts))) for policy, (row, doubts) in rows.items()}
            for steps, rows in document["zeroth_order"].items()
        }
        return cls(None if first is None else _limit(first), known, bool(document["minibatch"]))


def _row(limit: Limit) -> list[float | str | None]:
    parts = (limit.value, limit.low, limit.high, limit.error, limit.edge)
    return [limit.name, *(part if part is None or math.isfinite(part) else str(part) for part in parts)]  # no infinity


def _limit(row: Sequence[Any]) -> Limit:
    name, value, low, high, error, edge = row
    numbers = [float(part) for part in (value, low, high, error)]
    return Limit(str(name), numbers[0], numbers[1], numbers[2], numbers[3], None if edge is None else float(edge))


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
            # Whether a threshold is provisional depends on the steps: each check says so of its own.
            notices=tuple(notice.message for notice in result.warnings if notice.code != PROVISIONAL),
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
    first = _first_order(result, bounds)
    if bounds.forward is not None:
        held: dict[str, Held] = {wanted: Held(forward_limit(wanted, bounds.forward)) for wanted in FORWARD}
        return OptimizerThresholds(first, dict.fromkeys(steps, held), minibatch=bounds.forward.minibatch is not None)
    assert bounds.advisor is not None
    known: dict[int, dict[str, Held]] = {}
    for number in sorted(steps):
        advice = bounds.advisor.for_each(number, get_args(Threshold))
        known[number] = {name: Held(one.limit, one.doubts) for name, one in advice.items() if one.limit is not None}
    return OptimizerThresholds(first, known, minibatch=bounds.minibatch is not None)


def _first_order(result: BoundsResult, bounds: OptimizerBounds) -> Limit | None:
    """A Ritz value lies below λ_max by at most its residual, so the threshold below ``fo`` by as much."""
    if bounds.fo is None:
        return None
    sharpest = result.curvature[bounds.operator].lambda_max
    low = bounds.fo if math.isinf(bounds.fo) else bounds.fo * sharpest.value / (sharpest.value + sharpest.residual)
    return Limit("fo", bounds.fo, low, bounds.fo, error=0.0 if math.isinf(bounds.fo) else bounds.fo - low)
