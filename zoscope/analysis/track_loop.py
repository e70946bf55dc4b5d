"""A tracked run: steps, measurements between them, and how it stops."""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoscope.analysis.monitor import ForwardMonitor, ForwardRecord, log_values
from zoscope.analysis.track_folder import Known
from zoscope.analysis.track_measuring import Measurer, Moment
from zoscope.config.load import AutomaticStepSize
from zoscope.curvature.operators import gradient
from zoscope.errors import UsageError
from zoscope.files import reason
from zoscope.optim import optimizers
from zoscope.optim.auto_lr import AutoLR, Log
from zoscope.optim.optimizers import ZeroOrderOptimizer
from zoscope.optim.rules import new_state, rule_from_options
from zoscope.problem.distributed import MiniBatch
from zoscope.problem.objective import Examples
from zoscope.registry import OPTIMIZERS
from zoscope.runtime import is_out_of_memory

if TYPE_CHECKING:
    from zoscope.analysis.track_folder import RunFolder
    from zoscope.analysis.track_results import Record, Status, TrackRequest
    from zoscope.problem import Objective, Shard
    from zoscope.problem.core import Measurable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether someone wants the run to stop."""

    wanted: bool = False


@contextmanager
def gentle_interrupts() -> Iterator[Stop]:
    """Turn the first interrupt (Ctrl-C, or the TERM that clusters send) into a wish; the second one acts at once.

    Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = True

    for number, old in before.items():
        if old is not signal.SIG_IGN and old is not None:  # ignored on purpose, or set outside of Python
            signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in before.items():
            if old is not None:
                signal.signal(number, cast(Any, old))


class Batches(Protocol):
    """The loss that the step starting at ``step`` sees; the same for every evaluation of that step."""

    def value(self, step: int) -> float:
        """Its value."""

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """Its value and its gradient ``(d,)``."""


class FullBatch:
    """All examples at every step.

    Args:
        objective: The prepared problem.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def value(self, step: int) -> float:
        """See `Batches.value`."""
        return self._objective.value()

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """See `Batches.gradient`."""
        return gradient(self._objective)


class MiniBatches:
    """Mini-batches without replacement: every epoch is a new random order of the examples.

    Epoch e is ordered by a generator of its own, seeded with (seed, e), so that nothing has to be stored to go on from
    a step. What is left over at the end of an epoch, fewer than ``batch_size`` examples, is left out of it.

    Args:
        objective: The prepared problem. Where its batches are cut along their rows, examples are mixed across batches;
            where they cannot be, they are taken whole in random order.
        batch_size: Examples per step.
        seed: Seed of the orders.

    Raises:
        UsageError: If there are fewer examples.
    """

    def __init__(self, objective: Objective, *, batch_size: int, seed: int) -> None:
        if batch_size > objective.num_examples:
            raise UsageError(
                f"--batch-size {batch_size}: the problem has {objective.num_examples:,} example"
                f"{'' if objective.num_examples == 1 else 's'}. Expected at most as many; leave it out to use all of "
                "them at every step."
            )
        self._objective, self._seed = objective, seed
        self._examples = Examples(objective)
        self._size = 1 if self._examples.whole else batch_size
        if self._examples.whole:
            objective.notify(
                "whole-batches",
                f"The batches cannot be cut into examples: every step takes one of the {self._examples.count} batches "
                "of the spec, in random order.",
            )
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._step = -1
        self._batch: MiniBatch | None = None

    def value(self, step: int) -> float:
        """See `Batches.value`."""
        return self._at(step).value()

    def gradient(self, step: int) -> tuple[float, Tensor]:
        """See `Batches.gradient`."""
        return self._at(step).gradient()

    def shards(self, step: int) -> tuple[Shard, ...]:
        """The examples of a step, as far as this rank of a job evaluates them."""
        return self._at(step).shards

    def _at(self, step: int) -> MiniBatch:
        if self._batch is None or step != self._step:
            self._step, self._batch = step, MiniBatch(self._objective, self._examples, self._indices(step))
        return self._batch

    def _indices(self, step: int) -> NDArray[np.int64]:
        epoch, place = divmod(step, self._examples.count // self._size)
        if epoch != self._epoch:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
            self._epoch, self._order = epoch, np.random.default_rng(sequence).permutation(self._examples.count)
        return self._order[place * self._size : (place + 1) * self._size]


@dataclass
class Losses:
    """The losses of the steps since the last measurement."""

    total: float = 0.0
    largest: float = -math.inf
    count: int = 0
    path: list[tuple[int, float, float]] = field(default_factory=list)
    since: float = 0.0
    steps: int = 0

    def add(self, loss: float, *, step: int, lr: float, each: int) -> None:
        """One more, of the step that ends at ``step``; every ``each`` of them are one point of the path."""
        self.total += loss
        self.count += 1
        if not loss <= self.largest:  # also what is not a number
            self.largest = loss
        self.since, self.steps = self.since + loss, self.steps + 1
        if self.steps == each:
            self.path.append((step, self.since / each, lr))
            self.since, self.steps = 0.0, 0

    def described(self, record: Record) -> Record:
        """A record with them in it."""
        if not self.count:
            return record
        return replace(record, loss_mean=self.total / self.count, loss_max=self.largest, path=tuple(self.path))

    def after(self) -> Losses:
        """Those of the steps that follow a measurement; a point of the path goes on across it."""
        return Losses(since=self.since, steps=self.steps)


POINTS = 400
"""Points of the path of a whole run."""

MEASURING_SHARE = 0.2
"""Part of a run's passes that measuring may take."""

PASSES_PER_HVP = 6.0
"""Forward passes that a Hessian-vector product is worth: a backward pass of a backward pass."""

PASSES_PER_GRADIENT = 3.0

PREPARED_PROBES = 8
"""Products with which Adam's preconditioner is compared with the Hessian."""

ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)

MOVED, CALM = 0.1, 0.03
"""Relative change of lr/threshold from which on measurements come closer, and up to which they move apart."""

FINEST, COARSEST = 4, 4
"""How much an adaptive interval may shrink and grow."""


def automatic_interval(request: TrackRequest, *, dimension: int, examples: int) -> int:
    """Steps between measurements so that these take about a fifth of the run; from counts of passes, not from time.

    At least one measurement falls between the first and the last, however short the run is.
    """
    hvps = min(request.max_hvps, dimension) if request.method != "dense" else dimension
    hvps += PREPARED_PROBES if request.rule.preconditioned else 0
    share = 1.0 if request.batch_size is None else min(request.batch_size / examples, 1.0)
    step = share * (PASSES_PER_GRADIENT if request.first_order else 2.0 * request.queries)
    wanted = hvps * PASSES_PER_HVP / (MEASURING_SHARE * step)
    return max(1, min(_rounded_up(wanted), math.ceil(request.steps / 2)))


def _rounded_up(value: float) -> int:
    if value <= 1:
        return 1
    scale = 10.0 ** math.floor(math.log10(value))
    return math.ceil(next(factor for factor in ROUND if factor * scale >= value * (1 - 1e-9)) * scale)


@dataclass
class MeasurementSchedule:
    """Decides at which steps a run is measured.

    Args:
        base: Interval to start with.
        steps: Length of the run; its end is always measured.
        adaptive: Whether the interval follows the ratio to the threshold.
        interval: Interval now.
        due: Step of the next measurement.
        ratio: ``lr_next / exact`` at the last measurement.
    """

    base: int
    steps: int
    adaptive: bool = False
    interval: int = 0
    due: int = 0
    ratio: float | None = None

    def __post_init__(self) -> None:
        self.interval = self.interval or self.base

    def measured(self, record: Record) -> None:
        """Set the next step, given what was found at this one."""
        if self.adaptive:
            self._adapt(record)
        self.due = min(record.step + self.interval, self.steps)

    def _adapt(self, record: Record) -> None:
        ratio = record.lr_next / record.exact if record.exact else None
        if ratio is not None and self.ratio:
            change = abs(math.log(ratio / self.ratio))
            if change > MOVED:
                self.interval = max(self.interval // 2, self.base // FINEST, 1)
            elif change < CALM:
                self.interval = min(math.ceil(self.interval * 1.5), self.base * COARSEST)
        self.ratio = ratio

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps."""
        return {"interval": self.interval, "due": self.due, "ratio": self.ratio}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Go on from what `state` returned."""
        self.interval, self.due = int(state["interval"] or self.base), int(state["due"] or 0)
        self.ratio = state["ratio"]


class Stepper(ABC):
    """Moves the parameters of a prepared problem, with the optimizer of a request.

    Attributes:
        lr: Step size of the last step, where the stepper sets it itself; ``None`` where the request does.
    """

    lr: float | None = None

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    @abstractmethod
    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """Take the step that starts at ``number``.

        Returns:
            The loss that it saw, before it moved.
        """

    @abstractmethod
    def second_moment(self) -> Tensor | None:
        """Adam's v as ``(d,)``; ``None`` before the first step, and for other rules."""

    def watched(self) -> dict[str, Any]:
        """Fields of a record: what the loss values of the steps themselves say, where they are watched."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


def new_stepper(objective: Objective, request: TrackRequest) -> Stepper:
    """The stepper of an optimizer."""
    if isinstance(request.lr, AutomaticStepSize):
        return Automatic(objective, request, kind=request.lr.kind)
    return FirstOrder(objective, request) if request.first_order else ZerothOrder(objective, request)


class ZerothOrder(Stepper):
    """Steps with `zoscope.ZOGD` and its like."""

    def __init__(self, objective: Objective, request: TrackRequest) -> None:
        super().__init__(objective)
        self._optimizer = _optimizer(objective, request)
        self._monitor: ForwardMonitor | None = None
        if request.forward_every is not None:
            self._monitor = ForwardMonitor(self._optimizer, every=request.forward_every)

    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """See `Stepper.step`; the mean of the losses at the two points of each query."""
        self._optimizer.param_groups[0]["lr"] = lr
        if self._monitor is None:
            return self._optimizer.step(lambda: batches.value(number))
        self._monitor.step(lambda: batches.value(number))
        seen = [loss for pair in self._optimizer.evaluations for loss in pair]
        return sum(seen) / len(seen)

    def watched(self) -> dict[str, Any]:
        """See `Stepper.watched`."""
        seen: ForwardRecord | None = None if self._monitor is None else self._monitor.record
        return {} if seen is None else {"forward": seen.to_dict()}

    def second_moment(self) -> Tensor | None:
        """See `Stepper.second_moment`."""
        states = [self._optimizer.state[p].get("exp_avg_sq") for p in self._objective.params]
        return None if any(state is None for state in states) else self._objective.flatten(states)

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        state = self._optimizer.state_dict()
        return state if self._monitor is None else {**state, "monitor": self._monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        own = dict(state)
        if self._monitor is not None:
            self._monitor.load_state_dict(own.pop("monitor"))
        self._optimizer.load_state_dict(own)


class Automatic(ZerothOrder):
    """Zeroth-order steps whose size sets itself.

    Args:
        objective: The prepared problem.
        request: The optimizer and its constants.
        kind: Schedule on top.
    """

    def __init__(self, objective: Objective, request: TrackRequest, *, kind: Any) -> None:
        super().__init__(objective, request)
        self._auto = AutoLR(self._optimizer, steps=request.steps, schedule=kind)
        self.lr = 0.0

    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """See `Stepper.step`; ``lr`` plays no part."""
        loss = self._auto.step(lambda: batches.value(number))
        self.lr = self._auto.lr
        return loss

    def watched(self) -> dict[str, Any]:
        """See `Stepper.watched`."""
        last = self._auto.last
        return (
            {} if last is None else {"auto": {k: v for k, v in vars(last).items() if k not in ("step", "loss", "lr")}}
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        return {**super().state_dict(), "auto": self._auto.state_dict(), "lr": self.lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        own = dict(state)
        self._auto.load_state_dict(own.pop("auto"))
        self.lr = own.pop("lr")
        super().load_state_dict(own)


def _optimizer(objective: Objective, request: TrackRequest) -> ZeroOrderOptimizer:
    common: Any = {"mu": request.mu, "queries": request.queries, "directions": request.directions, "seed": request.seed}
    common["one_sided"] = request.differences == "one-sided"
    record = OPTIMIZERS[request.family]
    constants = {name: getattr(request, name) for name in record.options}
    kind: Callable[..., ZeroOrderOptimizer] = getattr(optimizers, record.public)
    lr = 1.0 if request.automatic else request.lr_at(0)
    return kind(objective.params, lr, **constants, **common)


class FirstOrder(Stepper):
    """Steps along the gradient with the same rules; it sees one loss a step and no curvature."""

    def __init__(self, objective: Objective, request: TrackRequest) -> None:
        super().__init__(objective)
        self._rule = rule_from_options(request.family, vars(request))
        self._state = new_state(self._rule, objective.params)
        self._steps = 0

    def step(self, batches: Batches, number: int, *, lr: float) -> float:
        """See `Stepper.step`."""
        loss, flat = batches.gradient(number)
        self._steps += 1
        with torch.no_grad():
            gradients = self._objective.unflatten(flat)
            self._rule.update(self._objective.params, gradients, self._state, lr=lr, step=self._steps)
        return loss

    def second_moment(self) -> Tensor | None:
        """See `Stepper.second_moment`."""
        return (
            self._objective.flatten(self._state["exp_avg_sq"]) if "exp_avg_sq" in self._state and self._steps else None
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        return {"state": self._state, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        self._steps = int(state["steps"])
        for slot, tensors in self._state.items():
            for own, stored in zip(tensors, state["state"][slot], strict=True):
                own.copy_(stored)


AGREEMENT = 1e-3
"""Relative difference between the loss of a checkpoint and that of its parameters now, from which data have changed."""


class _MeasuredEnoughError(Exception):
    """Out of the middle of a measurement."""


class Observer(Protocol):
    """Someone who watches a run: a terminal, a log."""

    def begun(self, run: Run) -> None:
        """The run is ready; its earlier records are there."""

    def stepped(self, step: int, loss: float) -> None:
        """``step`` steps are done; the last one saw ``loss``."""

    def measuring(self, step: int) -> None:
        """A measurement begins."""

    def measured(self, record: Record) -> None:
        """A measurement was made and kept."""


class Logged:
    """An observer that hands each measurement to a log, and the losses of the steps before it.

    Args:
        log: Called as ``log(values, step)``; a few hundred times in a whole run.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def begun(self, run: Run) -> None:
        """See `Observer`."""

    def stepped(self, step: int, loss: float) -> None:
        """See `Observer`; a call for every step would cost more than the step."""

    def measuring(self, step: int) -> None:
        """See `Observer`."""

    def measured(self, record: Record) -> None:
        """See `Observer`."""
        for step, loss, lr in record.path:
            seen = {"zoscope/step_loss": loss, "zoscope/lr": lr}
            self._log({name: value for name, value in seen.items() if value is not None}, step)
        metrics = {f"zoscope/metrics/{name}": value for name, value in record.metrics.items() if value is not None}
        self._log({**log_values(record), **metrics}, record.step)


@dataclass
class Run:
    """A run under way.

    Args:
        objective: The prepared problem; its parameters move.
        measurable: What of it is measured.
        request: What is asked.
        folder: Where the run is kept; ``None`` keeps nothing, which is also what all processes but the first do.
        stop: Set by someone who wants the run to stop.
        max_seconds: Time for this session of the run.
        observers: Who watches.
        config: The options as ``config.yaml`` holds them; a checkpoint goes on with no others.
    """

    objective: Objective
    measurable: Measurable
    request: TrackRequest
    folder: RunFolder | None
    stop: Stop
    max_seconds: float | None = None
    observers: tuple[Observer, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    step: int = 0
    measuring_seconds: float = 0.0
    every: int = field(init=False)

    def __post_init__(self) -> None:
        objective, request = self.objective, self.request
        self.stepper: Stepper = new_stepper(objective, request)
        self.batches: Batches = FullBatch(objective)
        if request.batch_size is not None:
            self.batches = MiniBatches(objective, batch_size=request.batch_size, seed=request.seed)
        self.measurer = Measurer(self.measurable, request)
        self.every = (
            request.every
            if isinstance(request.every, int)
            else automatic_interval(request, dimension=objective.num_params, examples=objective.num_examples)
        )
        self.clock = MeasurementSchedule(self.every, request.steps, adaptive=request.every == "adaptive")
        self._losses = Losses()
        self._checksum = 0
        self._began = time.perf_counter()
        self._earlier = 0.0
        self._limit = math.inf

    @property
    def seconds(self) -> float:
        """Wall time over all sessions."""
        return self._earlier + time.perf_counter() - self._began

    @property
    def lr(self) -> float:
        """Step size of the next step; where it sets itself, of the last one."""
        return self._lr(self.step)

    def go(self) -> tuple[Status, str]:
        """Run to the end, or to where it has to stop.

        Returns:
            How it ended, and one sentence on it.
        """
        for observer in self.observers:
            observer.begun(self)
        request = self.request
        while True:
            if self.step >= self.clock.due and (not self.records or self.records[-1].step != self.step):
                ended = self._measure()
                if ended is not None:
                    return ended
            if self.step >= request.steps:
                return "finished", f"all {request.steps:,} steps are done"
            ended = self._wanted_stop() or self._advance()
            if ended is not None:
                return ended

    # --- one step -------------------------------------------------------------------------------------------------

    def _advance(self) -> tuple[Status, str] | None:
        request = self.request
        loss = self.stepper.step(self.batches, self.step, lr=request.lr_at(self.step))
        self.step += 1
        self._losses.add(loss, step=self.step, lr=self._lr(self.step - 1), each=max(request.steps // POINTS, 1))
        for observer in self.observers:
            observer.stepped(self.step, loss)
        if not abs(loss) <= self._limit:
            return self._diverged(loss)
        if request.target_loss is not None and request.batch_size is None and loss <= request.target_loss:
            return self._measure() or ("target", f"the loss reached {request.target_loss:g} at step {self.step:,}")
        every = request.checkpoint_every
        if every is not None and self.step % every == 0 and self.step < self.clock.due:
            self.checkpoint()
        return None

    def _wanted_stop(self) -> tuple[Status, str] | None:
        if self.stop.wanted:
            self.checkpoint()
            return "interrupted", f"interrupted after step {self.step:,}"
        if self.max_seconds is not None and time.perf_counter() - self._began >= self.max_seconds:
            self.checkpoint()
            return "time", f"the {self.max_seconds:g} s were over after step {self.step:,}"
        return None

    def _diverged(self, loss: float) -> tuple[Status, str]:
        # The last checkpoint stays: it is the last state worth having.
        self._keep(self.measurer.without_curvature(self._moment(), loss=loss))
        return "diverged", f"the loss was {loss:.4g} at step {self.step:,}"

    # --- one measurement ------------------------------------------------------------------------------------------

    def _moment(self) -> Moment:
        request, step = self.request, self.step
        return Moment(
            step=step,
            lr=self._lr(max(step - 1, 0)),
            lr_next=self._lr(step),
            remaining=request.steps - step,
            second_moment=self.stepper.second_moment(),
            steps_of_moment=step,
        )

    def _lr(self, step: int) -> float:
        """Step size of the step that starts at ``step``; where it sets itself, that of the last one."""
        return self.request.lr_at(step) if self.stepper.lr is None else self.stepper.lr

    def _measure(self) -> tuple[Status, str] | None:
        """Measure, keep, and see whether that ends the run."""
        for observer in self.observers:
            observer.measuring(self.step)
        began = time.perf_counter()
        try:
            record = self.measurer.at(self._moment(), on_progress=self._look_up)
        except _MeasuredEnoughError:
            return self._wanted_stop()
        record = replace(record, metrics=self.objective.metric_values())
        self.measuring_seconds += time.perf_counter() - began
        loss = math.nan if record.loss is None else record.loss
        if math.isinf(self._limit) and math.isfinite(loss):
            self._limit = self.request.divergence * abs(loss) if loss else math.inf
        self.clock.measured(record)
        if not abs(loss) <= self._limit:
            self._keep(record)
            return "diverged", f"the loss was {loss:.4g} at step {self.step:,}"
        self._keep(record)
        self.checkpoint(None if self.measurable.apart else loss)  # which a run that goes on compares with its own
        if self.request.target_loss is not None and loss <= self.request.target_loss:
            return "target", f"the loss was {loss:.4g} at step {self.step:,}"
        return None

    def _look_up(self, stage: str, num_hvps: int, precision: float | None) -> None:
        """Leave a measurement that takes long when the run is to stop; it is made when the run goes on."""
        if self.stop.wanted:
            raise _MeasuredEnoughError

    def _keep(self, record: Record) -> None:
        record = replace(self._losses.described(record), **self.stepper.watched())
        self._losses = self._losses.after()
        self.records.append(record)
        if self.folder is not None:
            self._checksum = self.folder.append(record, after=self._checksum)
        for observer in self.observers:
            observer.measured(record)

    # --- the checkpoint -------------------------------------------------------------------------------------------

    def checkpoint(self, loss: float | None = None) -> None:
        """Keep everything that the rest of the run depends on.

        Args:
            loss: Loss over all examples where the parameters stand, if known.
        """
        if self.folder is None:
            return
        self.folder.write_checkpoint(
            {
                "model": self.parameters(copies=False),
                "optimizer": self.stepper.state_dict(),
                "config": dict(self.config),
                "run": {
                    "step": self.step,
                    "trained": list(self.objective.names),
                    "loss": self.objective.value() if loss is None else loss,
                    "limit": self._limit,
                    "losses": list(vars(self._losses).values()),
                    "clock": self.clock.state(),
                    "measurer": self.measurer.state(),
                    "metrics_checksum": self._checksum,
                    "metrics_lines": len(self.records),
                    "seconds": self.seconds,
                    "measuring_seconds": self.measuring_seconds,
                },
            }
        )

    @torch.no_grad()
    def parameters(self, *, copies: bool = True) -> dict[str, Tensor]:
        """The whole state dict, on the CPU; where most of it is frozen, what is trained and the buffers.

        Args:
            copies: Whether tensors that are on the CPU already are copied, too.
        """
        objective = self.objective
        state = dict(objective.model.state_dict())
        trained = dict(zip(objective.names, objective.params, strict=True))
        if 2 * objective.num_params < sum(t.numel() for t in state.values() if isinstance(t, Tensor)):
            state = {}
        everything = {**state, **dict(objective.model.named_buffers()), **trained}
        return {name: t.detach().to("cpu", copy=copies) for name, t in everything.items() if isinstance(t, Tensor)}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: If it belongs to another problem, or is not what `checkpoint` writes.
        """
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            assert self.folder is not None
            raise UsageError(
                f"--resume {self.folder.path}: the checkpoint is not what zoscope track wrote ({type(error).__name__}: "
                f"{reason(error)}). Put a copy of checkpoint.pt back, or start anew with --overwrite."
            ) from error

    @torch.no_grad()
    def _restore(self, content: Mapping[str, Any]) -> None:
        assert self.folder is not None
        where, run = self.folder.path, content["run"]
        own = {
            **dict(self.objective.model.named_buffers()),
            **dict(zip(self.objective.names, self.objective.params, strict=True)),
        }
        model = content["model"]
        different = [n for n, t in own.items() if n not in model or model[n].shape != t.shape]
        different += sorted(set(self.objective.names) ^ set(run["trained"]))
        if different:
            raise UsageError(
                f"--resume {where}: the checkpoint has other parameters than the problem has now ({different[0]!r} and "
                "the like). Expected the spec and the --set of the run's config.yaml, unchanged."
            )
        for name, tensor in own.items():
            tensor.copy_(model[name])
        self.stepper.load_state_dict(content["optimizer"])
        loss = self.objective.value()
        apart = abs(loss - run["loss"]) / max(abs(loss), abs(run["loss"]), math.ulp(0.0))
        if not apart <= AGREEMENT and not math.isnan(loss):
            raise UsageError(
                f"--resume {where}: the loss at the checkpoint is {loss:.6g}, and was {run['loss']:.6g} when it was "
                "written: the data or the loss function have changed. Expected the problem as it was."
            )
        self.step, self._limit = _step_of(run["step"], self.request.steps), float(run["limit"])
        total, largest, count, *rest = run["losses"]
        path, since, steps = rest or ([], 0.0, 0)  # older checkpoints have no path
        points = [(int(step), float(loss), float(lr)) for step, loss, lr in path]
        self._losses = Losses(float(total), float(largest), int(count), points, float(since), int(steps))
        self.clock.restore(run["clock"])
        self.measurer.restore(run["measurer"])
        self._earlier, self.measuring_seconds = float(run["seconds"]), float(run["measuring_seconds"])
        known = Known(int(run["metrics_lines"]), run.get("metrics_checksum"))
        records, self._checksum = self.folder.recover_metrics(known)
        self.records = list(records)
        if len(self.records) < known.lines:
            self.objective.notify(
                "metrics-lost",
                f"{self.folder.metrics} had lost its end: {known.lines - len(self.records):,} of the {known.lines:,} "
                f"measurements before step {self.step:,} are missing. The training itself goes on from where it was.",
            )


def _step_of(value: Any, steps: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= steps:
        raise ValueError(f"step is {value!r} of {steps}")
    return value
