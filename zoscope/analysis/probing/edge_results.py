"""The threshold under test, and the empirical edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoscope.analysis.optimizer_bounds import Pair, number
from zoscope.analysis.probing.run_results import EndState


@dataclass(frozen=True)
class ProbedThreshold:
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

    name: str
    value: float
    exact: float | None
    exact_ci95: Pair | None
    horizon: Pair | None
    horizon_ci95: Pair | None
    descent: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "name": self.name,
            "value": number(self.value),
            "exact": number(self.exact),
            "ci95": _pair(self.exact_ci95),
            "horizon": _pair(self.horizon),
            "horizon_ci95": _pair(self.horizon_ci95),
            "descent": number(self.descent),
        }


@dataclass(frozen=True)
class EdgePoint:
    """One step size of the bisection.

    Args:
        lr: Step size.
        diverged: How many replicas did.
        replicas: Of how many.
        left_at: Their median step; ``None`` unless the majority did.
        blow_up: Predicted time to blow-up, full and positive version.
    """

    lr: float
    diverged: int
    replicas: int
    left_at: float | None
    blow_up: Pair

    @property
    def lost(self) -> bool:
        """Whether half of the replicas diverged."""
        return 2 * self.diverged >= self.replicas

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "lr": self.lr,
            "diverged": self.diverged,
            "replicas": self.replicas,
            "left_at": number(self.left_at),
            "blow_up_predicted": [number(end) for end in self.blow_up],
        }


@dataclass(frozen=True)
class Edge:
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
        end: Curvature where the first replica to leave, at the smallest step size at which half of them did, was last
            in the valley.
        sharpened: Whether the threshold had come down past that step size by then.
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

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "lo": number(self.lo),
            "hi": number(self.hi),
            "value": number(self.value),
            "steps": self.steps,
            "ratio_to_exact": number(self.ratio_to_exact),
            "ratio_to_horizon": _pair(self.ratio_to_horizon),
            "predicted": number(self.predicted),
            "ratio_to_predicted": number(self.ratio_to_predicted),
            "found": self.found,
            "points": [point.to_dict() for point in self.points],
            "end": None if self.end is None else self.end.to_dict(),
            "sharpened": self.sharpened,
        }


def _pair(pair: Pair | None) -> list[float | None] | None:
    return None if pair is None else [number(end) for end in pair]
