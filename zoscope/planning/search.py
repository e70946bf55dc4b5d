"""Searching step sizes by runs with common random numbers: the best one, the edge, and the risk in between.

Every run r leaves above a step size of its own, since it meets the same random numbers whatever the step size is. So a
run that left at a smaller step size need not be made, nor one that stayed at a larger one. The logarithms of these
edges scatter about normally over runs, so that a few runs give the share that leaves at any step size: a Student
distribution around their mean, wider by what a mean of so few is uncertain. Runs that leave at a step size and stay at
a larger one are no sharp edge: what they say of the risk is as wide as the step sizes at which they did either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

COARSE = 2.0
"""Factor between the first step sizes."""

SETTLING = 8
"""Most step sizes tried for the edges of single runs, once that of half of them is known."""

BEYOND = 3.0
"""How far from the edge of half of the runs the others' edges are looked for."""

WIDER = 1.4
"""Factor between the step sizes at which the edge of a single run is looked for."""

WIDEST = 4.0**9
"""How far from the first guess an edge is looked for, either way."""

SCATTER = 0.03
"""Least scatter of the runs' log edges that a risk is computed with: that of a bracket."""

FALLING = 2.0**0.5
"""Factor between the step sizes among which the lowest loss is looked for."""

FLAT = 1e-3
"""Rise over the loss at the start, relative to it, below which half the step size gains nothing if it rises there, too.

With ``-a·lr + b·lr²`` what can be gained is an eighth of the rise at a step size at half of which the loss still rises.
"""

MISSED = 3
"""Most step sizes at which few runs had a lower loss that all runs are made at."""

NEAR = 1.1
"""Neighbours may be farther from each other than ``FALLING`` by so much."""

RISKY, SAFE = 0.05, 0.01
"""Most risk of the best step size, and of the safe one."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run at one step size.

    Args:
        left: Step by which it had left, or ``None``.
        steps: ``(n,)`` steps at which it was looked at, 0 first.
        losses: ``(n,)`` losses there; infinite from where it has left.
    """

    left: int | None
    steps: Array
    losses: Array

    @property
    def end(self) -> float:
        """Final loss; infinite for a run that left."""
        return math.inf if self.left is not None else float(self.losses[-1])


@dataclass(frozen=True, eq=False)
class Trial:
    """Runs at one step size.

    Args:
        lr: Peak of the step size.
        runs: By number.
    """

    lr: float
    runs: Mapping[int, Run]

    @property
    def ends(self) -> Array:
        """Final losses of the runs that were made."""
        return np.array([run.end for run in self.runs.values()])

    @property
    def mean(self) -> float:
        """Mean final loss; infinite where a run left."""
        return float(self.ends.mean())


Runner = Callable[[float, Sequence[int], int], Mapping[int, Run]]
"""Makes runs of these numbers at a step size, the same for the same one; those that are not decided when so many have
left may be missing."""


@dataclass(frozen=True, eq=False)
class Edge:
    """Where runs leave.

    Args:
        brackets: ``(R, 2)`` for every run a step size at which it stays and one at which it leaves; 0 and infinity
            where none was found.
        spans: ``(R, 2)`` step sizes below which it always stayed, and above which it always left.
    """

    brackets: Array
    spans: Array

    @property
    def found(self) -> bool:
        """Whether half of the runs leave somewhere."""
        return len(self.logs) > 0 and 2 * len(self.logs) >= len(self.brackets)

    @property
    def logs(self) -> Array:
        """Logarithms of the edges of the runs that have one."""
        found: Array = np.log(self.brackets[self._inside]).mean(axis=1)
        return found

    @property
    def _inside(self) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = (self.brackets[:, 0] > 0) & np.isfinite(self.brackets[:, 1])
        return inside

    @property
    def lr(self) -> float | None:
        """Step size at which half of the runs leave."""
        return math.exp(float(self.logs.mean())) if self.found else None

    @property
    def scatter(self) -> float:
        """Standard deviation of the log edges."""
        return max(float(self.logs.std(ddof=1)) if len(self.logs) > 1 else 0.0, SCATTER)

    @property
    def ci95(self) -> tuple[float, float] | None:
        """95 % interval of ``lr``."""
        if self.lr is None or len(self.logs) < 2:
            return None
        return self.lr * math.exp(-self.half_width), self.lr * math.exp(self.half_width)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of log ``lr``; infinite for fewer than two runs."""
        count = len(self.logs)
        return float(stats.t.ppf(0.975, count - 1)) * self.scatter / math.sqrt(count) if count > 1 else math.inf

    @property
    def _spread(self) -> float:
        """Standard deviation of the log step size at which a new run leaves: anywhere in the span of one of these."""
        spans, count = np.log(self.spans[self._inside]), len(self.logs)
        off = spans.mean(axis=1) - self.logs.mean()
        square = float((np.square(off) + np.square(np.diff(spans)[:, 0]) / 12).sum()) / max(count - 1, 1)
        return max(self.scatter, math.sqrt(square)) * math.sqrt(1 + 1 / count)

    def risk(self, lr: float) -> float:
        """Share of new runs that leave at a step size."""
        if self.lr is None:
            return 0.0
        return float(stats.t.cdf(math.log(lr / self.lr) / self._spread, max(len(self.logs) - 1, 1)))

    def at_risk(self, risk: float) -> float | None:
        """The step size of a risk."""
        if self.lr is None:
            return None
        return self.lr * math.exp(float(stats.t.ppf(risk, max(len(self.logs) - 1, 1))) * self._spread)


@dataclass
class Search:
    """Trials so far, and what they say.

    Args:
        runner: Makes runs.
        replicas: Runs R that an answer is from.
        trials: By step size.
    """

    runner: Runner
    replicas: int
    trials: dict[float, Trial] = field(default_factory=dict)

    def trial(self, lr: float) -> Trial:
        """All runs at a step size."""
        return self._made(lr, range(self.replicas), self.replicas)

    def _made(self, lr: float, runs: Sequence[int], enough: int) -> Trial:
        lr = _met_again(lr)
        known = self.trials[lr].runs if lr in self.trials else {}
        missing = [run for run in runs if run not in known]
        if missing or lr not in self.trials:
            self.trials[lr] = Trial(lr, {**known, **self.runner(lr, missing, enough)})
        return self.trials[lr]

    def fates(self, lr: float) -> list[bool | None]:
        """Whether each run leaves, as far as it is known from this step size, a smaller or a larger one."""
        lr = _met_again(lr)
        found: list[bool | None] = []
        for run in range(self.replicas):
            known = {trial.lr: trial.runs[run].left is not None for trial in self.trials.values() if run in trial.runs}
            left = any(gone and tried <= lr for tried, gone in known.items())
            stayed = any(not gone and tried >= lr for tried, gone in known.items())
            found.append(known.get(lr, left or (False if stayed else None)))
        return found

    def half_leave(self, lr: float) -> bool:
        """Whether half of the runs leave; makes those whose fate is not known."""
        half, known = -(-self.replicas // 2), self.fates(lr)
        if known.count(True) < half <= self.replicas - known.count(False):
            unknown = [run for run, fate in enumerate(known) if fate is None]
            self._made(lr, unknown, half - known.count(True))
            known = self.fates(lr)
        return known.count(True) >= half

    def bracket(self, guess: float, *, factor: float = COARSE) -> tuple[float | None, float | None]:
        """Step sizes at which fewer than half of the runs leave and at which half or more do."""
        leave = self.half_leave(guess)
        inner = guess
        while max(inner / guess, guess / inner) < WIDEST:
            outer = inner / factor if leave else inner * factor
            if self.half_leave(outer) != leave:
                return (outer, inner) if leave else (inner, outer)
            inner, factor = outer, min(factor * 1.5, 8.0)
        return (None, inner) if leave else (inner, None)

    def refine(self, low: float, high: float, *, rtol: float) -> tuple[float, float]:
        """Bisect until the bracket around the edge of half of the runs is as narrow as ``rtol``."""
        while high / low > 1 + rtol:
            middle = math.sqrt(low * high)
            if self.half_leave(middle):
                high = middle
            else:
                low = middle
        return low, high

    def settle(self, *, rtol: float) -> Edge:
        """Find the edges of all runs, each to ``rtol`` as far as ``SETTLING`` step sizes go."""
        for _ in range(SETTLING):
            edge = self.edge()
            wide = [pair for pair in edge.brackets if self._worth(pair, edge, rtol)]
            if not wide:
                return edge
            low, high = max(wide, key=lambda pair: pair[1] / pair[0] if pair[0] > 0 else math.inf)
            if low > 0 and math.isfinite(high):
                lr = math.sqrt(low * high)
            else:
                lr = WIDER * low if low > 0 else high / WIDER if math.isfinite(high) else edge.lr or min(self.trials)
            between = [run for run, pair in enumerate(edge.brackets) if pair[0] < lr < pair[1]]
            self._made(lr, between, len(between))
        return self.edge()

    def _worth(self, pair: Array, edge: Edge, rtol: float) -> bool:
        """Whether the bracket of a run is wide, and not open far from the others' edges."""
        low, high = pair
        if low > 0 and math.isfinite(high):
            return bool(high / low > 1 + rtol)
        known = edge.lr or (low if low > 0 else high)
        return bool(low < BEYOND * known / WIDER and high > known * WIDER / BEYOND)

    def edge(self) -> Edge:
        """What the trials say of every run: the step size that splits them with the fewest exceptions."""
        brackets, spans = [], []
        for run in range(self.replicas):
            tried = sorted((t.lr, t.runs[run].left is not None) for t in self.trials.values() if run in t.runs)
            lrs, gone = [lr for lr, _ in tried], np.array([left for _, left in tried], dtype=bool)
            # A run that stays above where it left once, or the other way round, is rare: the fewest exceptions decide.
            wrong = [int(gone[:cut].sum() + (~gone[cut:]).sum()) for cut in range(len(lrs) + 1)]
            cuts = np.flatnonzero(np.array(wrong) == min(wrong))
            cut = int(cuts[len(cuts) // 2])
            ends = [0.0, *lrs, np.inf]
            brackets.append((ends[cut], ends[cut + 1]))
            first, last = min([cut, *np.flatnonzero(gone)]), max([cut - 1, *np.flatnonzero(~gone)])
            # Open ends are for brackets alone: they say that nothing was tried there.
            spans.append((ends[first] or brackets[-1][0], ends[last + 2] if last + 1 < len(lrs) else brackets[-1][1]))
        return Edge(np.array(brackets), np.array(spans))

    def lowest(self, top: float) -> Trial:
        """The trial with the lowest mean final loss up to ``top``: one with neighbours no farther than ``FALLING``.

        Between those the vertex of a parabola through all three is tried, too.
        """
        self.trial(top)
        while True:
            whole = [trial for trial in self.trials.values() if len(trial.runs) >= self.replicas]
            tried = sorted((trial for trial in whole if trial.lr <= top * (1 + 1e-3)), key=lambda trial: trial.lr)
            best = min(tried, key=lambda t: t.mean)
            place = tried.index(best)
            below, above = tried[place - 1] if place else None, tried[place + 1] if place + 1 < len(tried) else None
            if above is not None and math.isfinite(best.mean) and above.lr / best.lr > NEAR * FALLING:
                self.trial(math.sqrt(above.lr * best.lr))
            elif best.lr * WIDEST < top or _nothing_below(best, tried):
                return best
            elif below is None or not math.isfinite(best.mean):
                self.trial(tried[0].lr / FALLING)
            elif best.lr / below.lr > NEAR * FALLING:
                self.trial(max(best.lr / FALLING, math.sqrt(best.lr * below.lr)))
            else:
                break
        if below is None or above is None or not math.isfinite(above.mean):
            return best
        x, y = np.log([below.lr, best.lr, above.lr]), np.array([below.mean, best.mean, above.mean])
        square, slope, _ = np.polyfit(x - x[1], y, 2)
        if square <= 0:
            return best
        return min(best, self.trial(best.lr * math.exp(-slope / (2 * square))), key=lambda t: t.mean)

    def lower(self, best: Trial, top: float) -> Trial:
        """The best trial of all runs, where others up to ``top`` have a lower mean by the runs made there so far.

        Few runs may have missed what one in several does at a large step size.
        """
        others = sorted((t for t in self.trials.values() if t.lr <= top and t.mean < best.mean), key=lambda t: t.mean)
        for other in others[:MISSED]:
            whole = self.trial(other.lr)
            if whole.mean < best.mean:
                best = whole
        return best


def _nothing_below(best: Trial, tried: Sequence[Trial]) -> bool:
    """Whether the loss rises a little at twice the best step size, and rises there still."""
    start = float(next(iter(best.runs.values())).losses[0])
    twice = [trial.mean for trial in tried if trial.lr > 1.99 * best.lr]
    return best.mean > start and bool(twice) and min(twice) - start <= FLAT * abs(start)


def _met_again(lr: float) -> float:
    """A step size rounded so that one that was tried is met again."""
    return float(f"{lr:.4g}")


def loss_stderr(trial: Trial, start: float) -> float:
    """Standard error of the mean change of the loss; infinite for one run."""
    ends = trial.ends - start
    return float(ends.std(ddof=1)) / math.sqrt(len(ends)) if len(ends) > 1 else math.inf


def finite_range(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Least and largest of the finite ones."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (None, None)
