"""A step size that sets itself: numbers in, a step size out; no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Schedule = Literal["constant", "linear", "cosine"]
Limit = Literal["start", "edge", "progress", "growth", "rollback"]

MARGIN = 0.8  # of the edge: at the edge itself the noise of the estimate eats all progress
PEAK: dict[Schedule, float] = {"constant": 1.0, "linear": 1.3, "cosine": 1.25}
# how much higher a falling schedule may start: at equal largest mean loss, in runs of 300 to 3,000 steps
SHARE = 0.35  # of the measured damage of the noise that the loss must have fallen by to go on
PATIENT = 0.07  # the same, where most of the damage will be won back
RELAXATIONS = 60.0  # relaxation times that this takes
CLOSING = 0.1  # of the steps, at the end: no time to win anything back
DAMAGE = 0.001  # of the loss that the first window may cost where nothing is known yet
LOOK = 4  # measurements before the first step
RISE, LEAP, FALL, WAIT = 1.3, 2.0, 0.5, 0.85  # factors of the step size: fell, fell by far, did not, cannot tell
CLEARLY = 1.5  # standard errors
WINDOWS = 12  # windows after which "cannot tell" is an answer
TOLERANCE = 0.3  # rise of the loss over its best that is left alone: sharp landscapes go up before they go down
CLIP = 4.0  # root mean squares at which a slope is cut: a batch gone wrong does not end a run
CURVATURES, SLOPES, RECENT = 12, 32, 8  # lengths of the running means
EVERY = 5  # steps between measurements of the curvature
REACH = 2.0  # steps: how far away the curvature is measured, since that is where the run will be


@dataclass(frozen=True)
class Decision:
    """What to do with a step.

    Args:
        lr: Step size η of plain ZO-GD, param²/loss.
        slopes: The slopes to use, cut where they are out of all proportion.
        limit: What holds the step size where it is.
        keep: Whether the parameters after this step are worth coming back to.
        leave: Whether the loss has left: go back to what was last worth keeping.
    """

    lr: float
    slopes: tuple[float, ...]
    limit: Limit
    keep: bool = False
    leave: bool = False


@dataclass
class Running:
    """An exponential mean that starts as a plain one.

    Args:
        length: Values that count.
        mean: Their mean.
        count: Values seen.
    """

    length: int
    mean: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One value more."""
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, self.length)


@dataclass
class Level:
    """A loss and its standard error."""

    mean: float
    stderr: float


@dataclass
class StepSizeController:
    """Chooses the step size of every step of ZO-GD from the losses that the step evaluates, and a few more.

    A step evaluates ``f(θ ± μu)``; every fifth one also ``f(θ + su)`` on the same batch. From them come the slopes
    ``c = (f₊ − f₋)/2μ``, with ``E c² = ‖g_B‖²`` (the noise of mini-batches included), and the curvatures
    ``k = uᵀHu`` at the distance s, with ``E k = Tr H`` and ``Var k = 2‖H‖²``. Two things limit the step size:

    * the edge of stability, ``η ≤ m · 2/(Tr/q + (1 + 1/q)‖H‖²/Tr)`` for q queries (theory: Song et al.,
      arXiv:2604.14669), the standard error of the trace on top of it;
    * the noise. A step of size η raises the loss by ``D = η² ‖g_B‖² Tr/2q`` while its mean direction lowers it. Windows
      of steps tell how fast the loss falls, with a standard error. It must fall by at least a share of D: by D the
      fall is as fast as it can be, by 0 the noise eats it all. So D is kept to an allowance, which goes up when the
      loss falls fast enough, by the more the faster, and down when it does not or when nobody can tell:
      ``η ≤ √(2qD/(‖g_B‖² Tr))``. The share is smaller while the run has time to win the damage back.

    When the loss has risen clearly above its best level, the run is to go back there, and the margin shrinks.

    Args:
        steps: Steps N of the run.
        schedule: Factor on top: 1, or falling to 0 at N along a line or half a cosine.
        margin: m, of the edge.
        queries: Directions q averaged in a step.
        rounding: Relative rounding of a loss.
    """

    steps: int
    schedule: Schedule = "constant"
    margin: float = MARGIN
    queries: int = 1
    rounding: float = 6e-8
    step: int = 0
    lr: float = 0.0
    limit: Limit = "start"
    rollbacks: int = 0
    clipped: int = 0
    trace: Running = field(default_factory=lambda: Running(CURVATURES))
    spread: Running = field(default_factory=lambda: Running(4 * CURVATURES))
    slope_sq: Running = field(default_factory=lambda: Running(SLOPES))
    allowance: float | None = None
    noise: float | None = None
    best: Level | None = None
    last: Level | None = None
    reduced: float = 1.0
    resting: int = LOOK
    recent: list[float] = field(default_factory=list)
    window: list[float] = field(default_factory=list)
    means: list[tuple[float, float, float]] = field(default_factory=list)
    damage: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0.0 < self.margin <= 1.0:
            raise ValueError(f"margin must lie in (0, 1], got {self.margin}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be constant, linear or cosine, got {self.schedule!r}")

    @property
    def length(self) -> int:
        """Steps of a window."""
        return min(max(10, self.steps // 60), 100)

    @property
    def measures(self) -> bool:
        """Whether the coming step is to measure the curvature."""
        return self.resting > 0 or self.step < self.steps // 10 or self.step % EVERY == 0

    @property
    def gradient_sq(self) -> float:
        """``E c² = ‖g_B‖²``, loss²/param²; the noise of mini-batches included."""
        return self.slope_sq.mean

    @property
    def trace_stderr(self) -> float:
        """Standard error of ``trace.mean``."""
        return math.sqrt(self.spread.mean / max(min(self.trace.count, CURVATURES), 1))

    @property
    def edge(self) -> float | None:
        """``2/(Tr/q + (1 + 1/q)‖H‖²/Tr)``, param²/loss, as measured lately; ``None`` before there is a measurement."""
        if not self.trace.count or not self._curvature:
            return None
        return 2.0 / self._sharpness(self._curvature)

    @property
    def _curvature(self) -> float:
        # Where the trace drowns in its own noise, or is negative, its error is what is known of it.
        return max(self.trace.mean, 0.5 * self.trace_stderr)

    def _sharpness(self, trace: float) -> float:
        norm = min(0.5 * self.spread.mean, trace * trace)
        return trace / self.queries + (1.0 + 1.0 / self.queries) * norm / trace

    def reach(self, mu: float) -> float:
        """Distance s along u at which to evaluate the loss for the curvature, in the unit of μ.

        About where the next steps lead; farther where rounding would swamp the curvature.

        Args:
            mu: μ of the step.
        """
        s = REACH * self.lr * math.sqrt(self.gradient_sq)
        typical = max(self.trace.mean, 0.3 * math.sqrt(0.5 * self.spread.mean))
        if typical > 0.0 and self.recent:
            s = max(s, 20.0 * self.rounding * abs(self.recent[-1]) / (mu * typical))
        return min(max(s, 3.0 * mu), 300.0 * mu)

    def observe(self, slopes: Sequence[float], loss: float, curvatures: Sequence[float] = ()) -> Decision:
        """A step's evaluations; decides on its step size.

        Args:
            slopes: c of every query, loss/param.
            loss: Loss of the batch at θ.
            curvatures: k of queries that were measured, loss/param².
        """
        self.step += 1
        if not (math.isfinite(loss) and all(map(math.isfinite, slopes))):
            return self._leave(len(slopes))
        cut = self._cut(slopes)
        for curvature in filter(math.isfinite, curvatures):
            self._add_curvature(curvature)
        self.recent = [*self.recent, loss][-RECENT:]
        if self.resting:
            return self._rest(len(slopes))
        if self._has_left():
            return self._leave(len(slopes))
        self.window.append(loss)
        keep = len(self.window) >= self.length and self._close_window()
        return Decision(self._next_lr(), cut, self.limit, keep)

    def ended_worse(self) -> bool:
        """Whether the last window's loss is clearly above that of the best one: then that is the one to keep."""
        if self.best is None or self.last is None:
            return False
        return self.last.mean > self.best.mean + 2.0 * math.hypot(self.last.stderr, self.best.stderr)

    def _cut(self, slopes: Sequence[float]) -> tuple[float, ...]:
        known = self.slope_sq.count >= 10 * self.queries
        most = CLIP * math.sqrt(self.gradient_sq) if known else math.inf
        for slope in slopes:
            # What is cut counts for more than it does in the step: a gradient that has grown for good is soon believed.
            self.slope_sq.add(min(slope * slope, 4.0 * most * most))
        self.clipped += any(abs(slope) > most for slope in slopes)
        return tuple(min(max(slope, -most), most) for slope in slopes)

    def _add_curvature(self, value: float) -> None:
        off = value - self.trace.mean if self.trace.count else value / math.sqrt(2.0)
        self.trace.add(value)
        self.spread.add(off * off)

    def _rest(self, queries: int) -> Decision:
        """Measure without moving: at the start, and after going back."""
        self.resting -= 1
        if not self.resting and self.rollbacks:
            now, before = self._level_now(), self.best
            if self.allowance is not None and before is not None and before.mean and now.mean / before.mean > 0:
                self.allowance *= now.mean / before.mean  # the same place: it is the landscape that has changed
            self.best = now
        return Decision(0.0, (0.0,) * queries, self.limit)

    def _level_now(self) -> Level:
        n = len(self.recent)
        mean = sum(self.recent) / n
        stderr = math.sqrt(sum((f - mean) ** 2 for f in self.recent) / (n * max(n - 1, 1)))
        return Level(mean, stderr)

    def _has_left(self) -> bool:
        if self.best is None or self.noise is None or len(self.recent) < RECENT // 2:
            return False
        # The median of a few steps: one odd batch is not a loss that has left.
        now = sorted(self.recent)[len(self.recent) // 2]
        error = math.hypot(1.25 * self.noise / math.sqrt(len(self.recent)), self.best.stderr)
        return now > self.best.mean + TOLERANCE * abs(self.best.mean) + 4.0 * error

    def _leave(self, queries: int) -> Decision:
        self.rollbacks += 1
        self.reduced = max(0.8 * self.reduced, 0.25)
        if self.allowance is not None:
            self.allowance *= FALL**2
        self.lr *= FALL
        self.limit = "rollback"
        self.resting, self.damage = RECENT, 0.0
        self.window, self.means, self.recent = [], [], []
        self.trace, self.spread, self.slope_sq = Running(CURVATURES), Running(4 * CURVATURES), Running(SLOPES)
        return Decision(0.0, (0.0,) * queries, "rollback", leave=True)

    def _close_window(self) -> bool:
        """Take the mean of a window; whether it is the best so far."""
        n, times = len(self.window), [i - 0.5 * (len(self.window) - 1) for i in range(len(self.window))]
        mean = sum(self.window) / n
        slope = sum(t * f for t, f in zip(times, self.window, strict=True)) / sum(t * t for t in times)
        rest = [f - mean - slope * t for t, f in zip(times, self.window, strict=True)]
        variance = sum(r * r for r in rest) / (n - 2)
        self.noise = math.sqrt(variance if self.noise is None else 0.7 * self.noise**2 + 0.3 * variance)
        self.last = Level(mean, self.noise / math.sqrt(n))
        self.means.append((self.step - 0.5 * n, mean, self.damage / n))
        self.window, self.damage = [], 0.0
        if len(self.means) > 1:
            self._judge(self.last.stderr)
        self.reduced = min(1.02 * self.reduced, 1.0)
        if self.best is None or mean < self.best.mean - self.last.stderr:
            self.best = self.last
            return True
        return False

    def _judge(self, stderr: float) -> None:
        """Compare how fast the loss fell since the last verdict with the damage of the noise."""
        if self.allowance is None:
            return
        count = len(self.means)
        middle = sum(t for t, _, _ in self.means) / count
        width = sum((t - middle) ** 2 for t, _, _ in self.means)
        rate = sum((t - middle) * f for t, f, _ in self.means) / width
        damage = sum(d for _, _, d in self.means) / count
        error = stderr / math.sqrt(width) + 1e-300
        z = (rate + self._share() * damage) / error
        if z > CLEARLY:
            self.allowance *= FALL**2
        elif z < -CLEARLY:
            # The fall goes with η and D with η²: where the fall is r·D, a step r times as long is the best one.
            sure = (-rate - CLEARLY * error) / (damage + 1e-300)
            rise = min(max(RISE, 0.5 * sure), LEAP)
            # What is not used must not pile up: the edge may be what limits the step size.
            self.allowance = min(self.allowance * rise**2, 4.0 * self._damage(self.lr))
        elif count >= WINDOWS:
            self.allowance *= WAIT**2
        else:
            return
        self.means = self.means[-1:]

    def _share(self) -> float:
        """Share of the damage that the fall must make up for.

        What noise does in a direction of curvature λ is gone after 1/2ηλ steps of smaller size, and the damage lies
        where λ is large: after some ``τ = Tr/(2η‖H‖²)`` steps most of it is. Only what is left at the end counts.
        """
        left, norm = (1.0 - CLOSING) * self.steps - self.step, 0.5 * self.spread.mean
        if left <= 0.0 or not norm or not self.lr:
            return SHARE
        relaxation = self._curvature / (2.0 * self.lr * norm)
        return min(SHARE, max(PATIENT, SHARE * RELAXATIONS * relaxation / left))

    def _damage(self, lr: float) -> float:
        """What the noise of one step costs, loss."""
        return 0.5 * lr * lr * self.gradient_sq * self._curvature / self.queries

    def _next_lr(self) -> float:
        trace = self._curvature
        if not trace or not self.gradient_sq:
            return self.lr * self._factor()
        error = self.trace_stderr * (1.0 + 8.0 / self.trace.count)
        edge = PEAK[self.schedule] * self.margin * self.reduced * 2.0 / (self._sharpness(trace) + error / self.queries)
        if self.allowance is None:
            self.allowance = DAMAGE * abs(sum(self.recent)) / len(self.recent) / self.length
        choices: dict[Limit, float] = {"edge": edge, "progress": math.sqrt(self.allowance / self._damage(1.0))}
        choices["growth"] = self.lr * 4.0 ** (40.0 / self.steps) if self.lr else 0.25 * edge
        self.limit = min(choices, key=choices.__getitem__)
        self.lr = choices[self.limit]
        scheduled = self.lr * self._factor()
        self.damage += self._damage(scheduled)
        return scheduled

    def _factor(self) -> float:
        done = min((self.step - 1) / self.steps, 1.0)
        if self.schedule == "constant":
            return 1.0
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers, as plain numbers."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> StepSizeController:
        """What `state_dict` returned, alive again."""
        values = dict(state)
        for name in ("trace", "spread", "slope_sq"):
            values[name] = Running(**values[name])
        for name in ("best", "last"):
            values[name] = None if values[name] is None else Level(**values[name])
        values["means"] = [tuple(row) for row in values["means"]]
        return cls(**values)
