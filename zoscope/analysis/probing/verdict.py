"""From trajectories to verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoscope.analysis.probing.results import Curves, Outcome, PredictionError, ProbeRun, RunVerdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zoscope.optim.trajectory import Trajectory

MAJORITY = 0.75
"""Share of the replicas that has to agree."""

STILL = 0.05
"""A replica that ends within this share of the starting loss above it counts as stable."""

FEW_MODES_REMARK = (
    "few modes carry the curvature: typical runs survive beyond the mean-square threshold, because rare directions "
    "carry the mean, so that runs can neither confirm it nor speak against it from above"
)

FALLEN = 0.25
"""Share of the loss up to whose loss the predicted curve is compared with the runs."""

SIGMAS = 2.0
"""Standard errors from zero at which the sign of a mean change is known."""


@dataclass(frozen=True)
class Fates:
    """What became of the replicas.

    Args:
        diverged_at: The step at which each left the valley or rose above twice the loss for good, or ``None``.
        stable: How many ended no higher than they started.
        changes: ``(R,)`` change of the loss over the run; infinite for those that left.
    """

    diverged_at: tuple[float | None, ...]
    stable: int
    changes: NDArray[np.float64]

    @property
    def diverged(self) -> int:
        """How many diverged."""
        return sum(step is not None for step in self.diverged_at)

    @property
    def left_at(self) -> float | None:
        """Median step at which those that diverged did."""
        steps = [step for step in self.diverged_at if step is not None]
        return float(np.median(steps)) if steps else None


def fates(trajectory: Trajectory, *, loss: float, scale: float) -> Fates:
    """Sort the replicas: left the valley, risen to twice the loss at the end, or no higher than at the start."""
    tail = max(1, len(trajectory.steps) // 10)
    with np.errstate(invalid="ignore"):
        ends = trajectory.losses[-tail:].mean(axis=0)
    diverged_at: list[float | None] = []
    stable = 0
    for replica, left in enumerate(trajectory.left):
        if left is not None:
            diverged_at.append(float(left))
        elif not ends[replica] <= loss + scale:
            inside = np.flatnonzero(trajectory.losses[:, replica] <= loss + scale)
            diverged_at.append(float(trajectory.steps[min(inside[-1] + 1, len(trajectory.steps) - 1)]))
        else:
            diverged_at.append(None)
            stable += bool(ends[replica] <= loss + STILL * scale)
    return Fates(tuple(diverged_at), stable, ends - loss)


def growth_verdict(found: Fates, trajectory: Trajectory, *, noisy: bool = False) -> RunVerdict:
    """Diverged or stable, where three quarters of the replicas agree.

    With ``noisy`` gradients, as of mini-batches, a loss that rises and stays in the valley is stable: they hold it up.
    """
    count = len(trajectory.left)
    if found.diverged >= MAJORITY * count:
        return "diverged"
    if trajectory.capped:
        return "inconclusive"
    stable = count - found.diverged if noisy else found.stable
    return "stable" if stable >= MAJORITY * count else "inconclusive"


def descent_verdict(found: Fates, trajectory: Trajectory) -> RunVerdict:
    """The sign of the mean change of the loss, where it is known."""
    if found.diverged >= MAJORITY * len(trajectory.left):
        return "rises"
    if trajectory.capped or not np.isfinite(found.changes).all():
        return "inconclusive"
    mean, count = float(found.changes.mean()), len(found.changes)
    error = float(found.changes.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    if abs(mean) < SIGMAS * error:
        return "inconclusive"
    return "falls" if mean < 0 else "rises"


def judge_run(
    verdict: RunVerdict, *, above: bool, growth: float | None, wanted: float, capped: bool, few_modes: bool
) -> tuple[bool | None, str]:
    """Whether a verdict is what the threshold says (``None``: it does not count), and why."""
    if verdict in ("falls", "rises"):
        return (verdict == "rises") == above, f"the mean loss {verdict}"
    if verdict == "sharpened":
        return None, "stable at first; the landscape sharpened past this step size on the way, which does not count"
    if verdict == "diverged":
        return above, "left the valley" if above else "left the valley although the curvature did not rise past it"
    if verdict == "inconclusive":
        why = "the time or step cap came first" if capped else "the replicas disagree, or the run is too short to tell"
        return None, why
    if not above:
        return True, "stayed in the valley"
    if few_modes:
        return None, FEW_MODES_REMARK
    if growth is None:
        return None, "stayed in the valley, which does not count: how fast the noise of mini-batches grows is not known"
    if growth < wanted:
        return None, f"stayed, but the predicted growth of only {growth:.3g} might not show yet; --steps gives more"
    return False, f"stayed in the valley although the mean square should have grown by {growth:.3g}"


def outcome(runs: Sequence[ProbeRun], *, few_modes: bool) -> tuple[Outcome, str]:
    """The verdict on the threshold from all runs that count."""
    counted = [run for run in runs if run.as_predicted is not None]
    against = [run for run in counted if run.as_predicted is False]
    if against:
        worst = against[0]
        return "refuted", f"the run at {worst.ratio:.3g} of the threshold {worst.reason}"
    if few_modes:
        return "inconclusive", FEW_MODES_REMARK
    if not counted:
        return "inconclusive", "no run counts"
    below = any(run.side == "below" for run in counted)
    above = any(run.side == "above" for run in counted)
    if not (below and above):
        return "inconclusive", f"only runs {'below' if below else 'above'} the threshold count; it takes both sides"
    return "confirmed", "runs below the threshold did as predicted, and so did runs above"


def prediction_error(
    trajectory: Trajectory, predicted: NDArray[np.float64] | None, *, quadratic: NDArray[np.float64] | None
) -> PredictionError | None:
    """The predicted curve against the mean of the replicas, up to where the loss has fallen by a quarter."""
    if predicted is None or quadratic is None or len(trajectory.steps) < 2:
        return None
    count = len(trajectory.left)
    inside = np.isfinite(trajectory.losses).all(axis=1) & np.isfinite(predicted[trajectory.steps])
    last = len(inside) if inside.all() else int(np.argmin(inside))
    if last < 2:
        return None
    start = trajectory.losses[0, 0]
    means = trajectory.losses[:last].mean(axis=1)
    fallen = np.flatnonzero(means <= start - FALLEN * abs(start))
    index = int(fallen[0]) if fallen.size else last - 1
    step = int(trajectory.steps[index])
    changes = trajectory.losses[index] - trajectory.losses[0]
    return PredictionError(
        step=step,
        predicted_change=float(predicted[step] - predicted[0]),
        quadratic_change=float(quadratic[step] - quadratic[0]),
        measured_change=float(changes.mean()),
        stderr=float(changes.std(ddof=1)) / math.sqrt(count) if count > 1 else None,
    )


def curves(trajectory: Trajectory, predicted: NDArray[np.float64] | None) -> Curves:
    """The recorded points as plain numbers."""
    steps = tuple(int(step) for step in trajectory.steps)
    return Curves(
        steps=steps,
        losses=tuple(tuple(map(_finite, row)) for row in trajectory.losses),
        distances=tuple(tuple(map(_finite, row)) for row in trajectory.distances),
        predicted=tuple(None if predicted is None else _finite(predicted[step]) for step in steps),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
