"""The run itself: step, measure, keep, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from zoscope.analysis.tracking.batches import Batches, FullBatch, MiniBatches
from zoscope.analysis.tracking.interrupt import Stop
from zoscope.analysis.tracking.interval import Clock, automatic_interval
from zoscope.analysis.tracking.losses import Losses
from zoscope.analysis.tracking.measuring import Measurer, Moment
from zoscope.analysis.tracking.stepping import Stepper, new_stepper
from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.analysis.tracking.folder import RunFolder
    from zoscope.analysis.tracking.record import Record
    from zoscope.analysis.tracking.request import TrackRequest
    from zoscope.analysis.tracking.results import Status
    from zoscope.problem import Objective
    from zoscope.problem.precision import Measurable

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
        self.clock = Clock(self.every, request.steps, adaptive=request.every == "adaptive")
        self._losses = Losses()
        self._bytes = 0
        self._began = time.perf_counter()
        self._earlier = 0.0
        self._limit = math.inf

    @property
    def seconds(self) -> float:
        """Wall time over all sessions."""
        return self._earlier + time.perf_counter() - self._began

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
        self._losses.add(loss)
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
            lr=request.lr_at(max(step - 1, 0)),
            lr_next=request.lr_at(step),
            remaining=request.steps - step,
            second_moment=self.stepper.second_moment(),
            steps_of_moment=step,
        )

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
        record, seen = self._losses.described(record), self.stepper.forward()
        if seen is not None:
            record = replace(record, forward=seen.to_dict())
        self._losses = Losses()
        self.records.append(record)
        if self.folder is not None:
            self._bytes = self.folder.append(record)
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
                    "losses": [self._losses.total, self._losses.largest, self._losses.count],
                    "clock": self.clock.state(),
                    "measurer": self.measurer.state(),
                    "metrics_bytes": self._bytes,
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

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: If it belongs to another problem.
        """
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
        if abs(loss - run["loss"]) > AGREEMENT * max(abs(loss), abs(run["loss"])):
            raise UsageError(
                f"--resume {where}: the loss at the checkpoint is {loss:.6g}, and was {run['loss']:.6g} when it was "
                "written: the data or the loss function have changed. Expected the problem as it was."
            )
        self.step, self._limit, self._bytes = run["step"], run["limit"], run["metrics_bytes"]
        self._losses = Losses(*run["losses"])
        self.clock.restore(run["clock"])
        self.measurer.restore(run["measurer"])
        self._earlier, self.measuring_seconds = run["seconds"], run["measuring_seconds"]
        self.folder.truncate_metrics(self._bytes)
        self.records = list(self.folder.read_records())
