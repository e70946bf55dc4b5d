"""``zoscope.StabilityMonitor``: curvature and threshold measured every so often in a user's own training loop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from zoscope.analysis.monitoring.optimizers import differing, second_moment, setup_of, spread_out, step_sizes
from zoscope.analysis.tracking.measuring import Measurer, Moment
from zoscope.analysis.tracking.request import TrackRequest
from zoscope.config.schedule import Schedule
from zoscope.errors import UsageError
from zoscope.problem.precision import Measurable
from zoscope.theory.validate import require_count, require_positive

if TYPE_CHECKING:
    from zoscope.analysis.tracking.record import Record
    from zoscope.problem import Notice, Objective, Problem


class StabilityMonitor:
    """Measures the curvature where a training loop stands, and compares its step size with what that allows.

    The model of ``problem`` is the one that the loop trains; it comes back from every measurement as it was. Every
    measurement starts anew: bases kept from the one before were tried, and saved no products. Parameter groups may have
    step sizes of their own; the record is then about that of the first one, with the others in proportion.

        monitor = zoscope.StabilityMonitor(problem, optimizer, every=500, steps=20_000)
        for batch in loader:
            loss = optimizer.step(...)
            record = monitor.step(loss=loss)
            if record is not None and record.ratio is not None and record.ratio > 1:
                ...

    Args:
        problem: The model that is trained, and the batches on which its loss is measured.
        optimizer: The loop's optimizer (``SGD``, ``Adam``, ``AdamW``, ``zoscope.ZOGD``, ``ZOGDM`` or ``ZOAdam``), from
            which the step size, the constants and Adam's state are read; or one of the names ``"zo-gd"``,
            ``"zo-gdm"``, ``"zo-adam"``, ``"gd"``, ``"gdm"``, ``"adam"``.
        every: Steps between measurements; the first one is made at step 0, by the first call.
        steps: Planned length of the training, for η*(remaining steps).
        rtol: Relative 95 % half-width wanted for the trace and the exact threshold.
        max_hvps: Most Hessian-vector products per measurement.
        file: JSON lines file that receives every record, such as ``metrics.jsonl``; it is appended to.
        seed: Seed of the probe vectors.
        device: Device to measure on.
        dtype: Floating-point type to measure in.
        micro_batch: Examples per pass.
        **constants: ``beta``, ``betas``, ``eps``, ``queries``, ``directions`` of an optimizer given by name, or in
            place of what was read from it.

    Attributes:
        records: Everything measured so far.
        warnings: What the last measurement had to say.

    Raises:
        ValueError: If an argument is outside of its range, or the optimizer is not covered.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Optimizer | str,
        *,
        every: int = 1000,
        steps: int | None = None,
        rtol: float = 0.05,
        max_hvps: int = 150,
        file: str | Path | None = None,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        micro_batch: int | None = None,
        **constants: Any,
    ) -> None:
        require_count("every", every)
        if steps is not None:
            require_count("steps", steps)
        self._optimizer = None if isinstance(optimizer, str) else optimizer
        name, found = optimizer, {}
        if self._optimizer is not None:
            setup = setup_of(self._optimizer)
            name, found = setup.name, setup.constants
        self._request = TrackRequest(
            optimizer=str(name),
            lr=Schedule("constant", 1.0),  # the loop has its own
            steps=steps or 1,
            every=every,
            rtol=rtol,
            max_hvps=max_hvps,
            seed=seed,
            device=device,
            dtype=dtype,
            micro_batch=micro_batch,
            **{**found, **constants},
        )
        self._problem, self._every, self._steps = problem, every, steps
        self._file = None if file is None else Path(file)
        self._state: dict[str, Any] | None = None
        self._losses: list[float] = []
        self._done = -1
        self._last_lr: float | None = None
        self.records: list[Record] = []
        self.warnings: tuple[Notice, ...] = ()

    @property
    def optimizer(self) -> str:
        """Name of the optimizer, such as ``zo-adam``."""
        return self._request.optimizer

    def step(
        self, *, loss: float | Tensor | None = None, lr: float | None = None, step: int | None = None
    ) -> Record | None:
        """Tell that the loop has taken a step; measures every ``every`` of them.

        Args:
            loss: What the step saw; their mean and their maximum are in the next record.
            lr: Step size of the step; read from the optimizer when left out. For 0 the last one above it is taken.
            step: Steps done; counted when left out (0 at the first call).

        Returns:
            The record of a measurement, ``None`` between two of them.

        Raises:
            ValueError: If no step size is known.
        """
        self._done = self._done + 1 if step is None else step
        if loss is not None:
            self._losses.append(float(loss))
        if lr is not None or self._optimizer is not None:
            lr = self._positive(self._lr() if lr is None else lr)
        if self._done % self._every:
            return None
        return self.measure(lr=lr, step=self._done)

    def measure(self, *, lr: float | None = None, step: int | None = None) -> Record:
        """Measure now.

        Args:
            lr: Step size; read from the optimizer when left out.
            step: Steps done.

        Returns:
            The record; without curvature where the loss or a derivative is not finite.

        Raises:
            ValueError: If no step size is known.
            SpecError, NumericalError: As ``zoscope.bounds``.
            UsageError: If the file cannot be written.
        """
        lr = self._positive(self._lr() if lr is None else lr)
        require_positive("lr", lr)
        done = max(self._done, 0) if step is None else step
        remaining = 0 if self._steps is None else max(self._steps - done, 0)
        request = self._request
        first = self._state is None  # what is checked of the problem does not change as it trains
        with self._problem.prepare(
            device=request.device, dtype=request.dtype, micro_batch=request.micro_batch, check=first
        ) as objective:
            measurer = Measurer(Measurable(objective), request)
            if self._state is not None:
                measurer.restore(self._state)
            v, seen = self._second_moment()
            moment = Moment(
                done,
                lr,
                lr,
                remaining,
                None if v is None else v.to(objective.device),
                seen,
                self._shares(objective),
            )
            record = measurer.at(moment)
            metrics = objective.metric_values()
            self._state, self.warnings = measurer.state(), tuple(objective.warnings)
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            record = replace(record, loss_mean=mean, loss_max=max(self._losses, key=_badness))
            self._losses.clear()
        record = replace(record, metrics=metrics)
        self.records.append(record)
        self._write(record)
        return record

    def _lr(self) -> float:
        if self._optimizer is None:
            raise ValueError(
                "lr is missing: pass the step size, monitor.step(loss=..., lr=...), or give the monitor the optimizer "
                "itself instead of its name"
            )
        return float(self._optimizer.param_groups[0]["lr"])

    def _positive(self, lr: float) -> float:
        """In place of 0, where schedules begin and end, the last step size above it, or what is warmed up to."""
        if lr == 0:
            planned = None if self._optimizer is None else self._optimizer.defaults.get("lr")
            return self._last_lr or (lr if planned is None else float(planned))
        self._last_lr = lr
        return lr

    def _second_moment(self) -> tuple[Tensor | None, int]:
        if self._optimizer is None or self._request.family != "adam":
            return None, 0
        return second_moment(self._optimizer, self._problem.parameters())

    def _shares(self, objective: Objective) -> Tensor | None:
        """Step sizes of parameters in units of that of the first group."""
        if self._optimizer is None:
            return None
        constants = differing(self._optimizer)
        if constants:
            objective.notify(
                "parameter-constants",
                f"The optimizer's groups differ in {', '.join(constants)}: those of the first one are taken for all.",
            )
        params = self._problem.parameters()
        rates = step_sizes(self._optimizer, params)
        first = float(self._optimizer.param_groups[0]["lr"])
        if rates is None or len(set(rates)) == 1:
            return None
        if min(rates) <= 0 or first <= 0:
            objective.notify(
                "parameter-groups",
                "Some parameter groups have a step size of 0: what is measured moves all parameters at that of the "
                "first one. Leave them out of the problem with params= for the threshold of the others.",
            )
            return None
        objective.notify(
            "parameter-groups",
            f"The optimizer has step sizes from {min(rates):.3g} to {max(rates):.3g}: curvature and threshold are for "
            f"that of its first group, {first:.3g}, with the others in proportion (P⁻¹H, P their inverse). For "
            "zeroth-order optimizers this assumes that P and H nearly commute; see record.commutator.",
        )
        return spread_out(rates, params).to(objective.device) / first

    def _write(self, record: Record) -> None:
        if self._file is None:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record.to_dict(), allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(
                f"StabilityMonitor(file={str(self._file)!r}): cannot be written ({error.strerror or error}). The "
                "record is in monitor.records; choose another file."
            ) from None


def _badness(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
