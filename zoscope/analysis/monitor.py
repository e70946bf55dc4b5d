"""Monitors of a training loop of one's own: ``zoscope.StabilityMonitor`` and ``zoscope.ForwardMonitor``."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from zoscope.analysis.request import curvature_session
from zoscope.analysis.track_measuring import Measurer, Moment
from zoscope.analysis.track_results import TrackRequest, require_precision
from zoscope.config.load import Schedule
from zoscope.errors import UsageError
from zoscope.optim.optimizers import ZeroOrderOptimizer
from zoscope.options import OPTIONS, MonitorOptions, checked_argument, keywords
from zoscope.problem.core import Measurable
from zoscope.registry import OPTIMIZERS, family_of
from zoscope.result import JsonObject
from zoscope.theory.rules import EstimatorMoments, UpdateRule, estimator_moments, update_rule
from zoscope.theory.spectrum import Estimate, require_count, require_positive
from zoscope.theory.stability import Interval, forward_only_bounds

if TYPE_CHECKING:
    from zoscope.analysis.track_results import Record
    from zoscope.problem import Notice, Objective, Problem

LOGGED = {
    "loss": "loss",
    "lr": "lr",
    "trace": "trace",
    "lambda_max": "lambda_max",
    "lower": "lower",
    "upper": "upper",
    "threshold": "threshold",
    "exact": "exact",
    "ratio": "ratio",
}
"""Fields of a record and the names that they are logged under, after ``zoscope/``."""


def log_values(record: Record) -> dict[str, float]:
    """What is known, by name; what is not is left out."""
    values = {name: getattr(record, field) for field, name in LOGGED.items()}
    return {f"zoscope/{name}": float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class OptimizerSetup:
    """Name and constants of an optimizer.

    Args:
        name: ``zo-gd`` and so on.
        constants: ``beta``; or ``betas`` and ``eps``; and ``queries``, ``directions``, ``mu`` of a zeroth-order one.
    """

    name: str
    constants: dict[str, Any]


def setup_of(optimizer: Optimizer) -> OptimizerSetup:
    """Recognise a PyTorch optimizer by its class and its first parameter group.

    Raises:
        ValueError: If it is none that the theory covers.
    """
    group = optimizer.param_groups[0]
    if isinstance(optimizer, ZeroOrderOptimizer):
        constants = {"queries": optimizer.queries, "directions": optimizer.directions, "mu": optimizer.mu}
        constants |= {key: group[key] for key in OPTIMIZERS[optimizer.name].options}
        return OptimizerSetup(f"zo-{optimizer.name}", constants)
    if isinstance(optimizer, torch.optim.SGD):
        if group["nesterov"]:
            raise ValueError("SGD with Nesterov momentum is not covered: expected plain or heavy-ball SGD")
        decay = {"weight_decay": float(group["weight_decay"])}
        if not group["momentum"]:
            return OptimizerSetup("gd", decay)
        return OptimizerSetup(
            "gdm", {"beta": float(group["momentum"]), "dampening": float(group["dampening"]), **decay}
        )
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        betas = tuple(float(beta) for beta in group["betas"])
        return OptimizerSetup("adam", {"betas": betas, "eps": float(group["eps"])})
    raise ValueError(
        f"optimizer is a {type(optimizer).__name__}: expected SGD, Adam, AdamW, zoscope.ZOGD, ZOGDM or ZOAdam, or one "
        f"of the names {', '.join(OPTIMIZERS)}"
    )


def differing(optimizer: Optimizer) -> tuple[str, ...]:
    """Constants in which parameter groups differ from the first one, beside the step size; that one's are used."""
    first, *others = optimizer.param_groups
    names = dict.fromkeys(("momentum", *(name for record in OPTIMIZERS.values() for name in record.options)))
    return tuple(name for name in names if any(group.get(name) != first.get(name) for group in others))


def step_sizes(optimizer: Optimizer, params: Sequence[Tensor]) -> list[float] | None:
    """The step size of each of some parameters; ``None`` where all groups have the same.

    A parameter that the optimizer does not have counts as one of the first group.
    """
    groups = optimizer.param_groups
    if len({float(group["lr"]) for group in groups}) == 1:
        return None
    found = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    return [found.get(id(p), float(groups[0]["lr"])) for p in params]


def spread_out(values: Sequence[float], params: Sequence[Tensor]) -> Tensor:
    """A value for each parameter as ``(d,)`` in float64, on the parameters' device."""
    parts = [p.new_full((p.numel(),), value, dtype=torch.float64) for p, value in zip(params, values, strict=True)]
    return torch.cat(parts)


@torch.no_grad()
def second_moment(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """Adam's v along ``params`` as ``(d,)`` and the steps that it has seen; ``None`` where it is not there yet."""
    states: list[Any] = [optimizer.state.get(p, {}) for p in params]
    if not states or any("exp_avg_sq" not in state for state in states):
        return None, 0
    # The zeroth-order optimizers count steps in the group.
    step = states[0].get("step", optimizer.param_groups[0].get("step", 0))
    flat = torch.cat([state["exp_avg_sq"].reshape(-1) for state in states])
    return flat, int(step)


LEAST = 8
"""Directions below which their scatter says little about the error of their mean."""


@dataclass(frozen=True)
class ForwardRecord(JsonObject):
    """What the last directions say of the threshold.

    Args:
        step: Steps observed.
        loss: Loss at the parameters, before the step.
        lr: Step size; of several parameter groups the largest, which errs on the safe side where H ⪰ 0.
        trace: Mean of ``uᵀHu`` over the window: ``Tr H``, loss/param², signed.
        frobenius_sq: ``‖H‖_F²`` from their scatter, at least 0; rough, and too large where rounding adds to it.
        directions: Directions in the window.
        lower: Step size below which training is stable for ever if ``H ⪰ 0``, from ``λ_max ≤ ‖H‖_F``.
        upper: Step size above which it is not, whatever H is; with the 95 % interval of the trace.
        ratio: ``lr / upper``.
    """

    keys = """
        step loss lr trace=trace.value trace_stderr=trace.stderr frobenius_sq directions lower upper=upper.value
        upper_stderr=upper.stderr ratio
    """

    step: int
    loss: float
    lr: float
    trace: Estimate
    frobenius_sq: float
    directions: int
    lower: float
    upper: Estimate
    ratio: float


class ForwardMonitor:
    """Follows ``Tr H`` and the threshold during zeroth-order training, for one more loss value every so often.

    A two-point query knows ``f(θ+μu)`` and ``f(θ−μu)``; with ``f(θ)`` on the same batch,
    ``uᵀHu ≈ (f(θ+μu) − 2f(θ) + f(θ−μu))/μ²``, whose mean over directions is the trace. No memory, no backward pass.

        monitor = zoscope.ForwardMonitor(optimizer, every=20)
        for batch in loader:
            record = monitor.step(lambda: loss(model, batch))

    Rounding of the loss values adds noise of about ``2·10⁻⁷ f/μ²`` to each of them in float32; it is part of the error
    bar. With mini-batches the trace is that of the mean over the batches in the window.

    Args:
        optimizer: ``zoscope.ZOGD``, ``ZOGDM`` or ``ZOAdam``; for a loop of your own ``None``, and call `observe`.
        every: Steps between observations; each costs one evaluation of the loss.
        window: Directions that the estimates are means of.
        name: Name without ``zo-`` of an optimizer, such as ``"gdm"``, where there is none.
        mu: Smoothing radius where there is no optimizer.
        dimension: Number of trained parameters where there is no optimizer; matters for ``directions="sphere"`` only.
        **constants: ``beta``, ``betas``, ``queries``, ``directions`` where there is no optimizer.

    Attributes:
        record: The last observation; ``None`` until there are enough directions.

    Raises:
        ValueError: If an argument is outside of its range.
    """

    def __init__(
        self,
        optimizer: ZeroOrderOptimizer | None = None,
        *,
        every: int = 1,
        window: int = 200,
        name: str = "gd",
        mu: float = OPTIONS["mu"].default,
        dimension: int | None = None,
        **constants: Any,
    ) -> None:
        require_count("every", every)
        require_count("window", window, least=LEAST)
        if optimizer is not None:
            if not isinstance(optimizer, ZeroOrderOptimizer):
                raise ValueError(
                    f"optimizer is a {type(optimizer).__name__}, which evaluates no two-point queries: expected "
                    "zoscope.ZOGD, ZOGDM or ZOAdam, or None and observe()"
                )
            if optimizer.one_sided:
                raise ValueError("a ForwardMonitor needs losses on both sides: expected one_sided=False")
            setup = setup_of(optimizer)
            name, constants = family_of(setup.name), setup.constants
            mu = constants.pop("mu")
            dimension = sum(p.numel() for p in _trained(optimizer))
        require_positive("mu", mu)
        queries, law = constants.pop("queries", 1), constants.pop("directions", "gaussian")
        constants.pop("eps", None)
        self._optimizer, self._every, self._mu = optimizer, every, mu
        self._rule: UpdateRule = update_rule(name, **constants)
        self._moments: EstimatorMoments = estimator_moments(law, queries=queries, dimension=dimension)
        self._sphere = dimension if law == "sphere" else None
        self._samples: deque[float] = deque(maxlen=window)
        self._steps = 0
        self.record: ForwardRecord | None = None

    def step(self, closure: Callable[[], Tensor | float]) -> ForwardRecord | None:
        """Let the optimizer take a step, and observe every ``every`` of them.

        Args:
            closure: As for the optimizer: returns the loss, without gradients.

        Returns:
            The record of an observation once there are enough directions, else ``None``.

        Raises:
            ValueError: If the monitor has no optimizer.
        """
        if self._optimizer is None:
            raise ValueError("this ForwardMonitor has no optimizer: give it one, or call observe()")
        if self._steps % self._every:
            self._optimizer.step(closure)
            self._steps += 1
            return None
        with torch.no_grad():
            loss = float(closure())
        self._optimizer.step(closure)
        pairs = self._optimizer.evaluations
        return self.observe(
            loss,
            above=[above for above, _ in pairs],
            below=[below for _, below in pairs],
            lr=max(float(group["lr"]) for group in self._optimizer.param_groups),
            preconditioner=self._preconditioner(),
        )

    def observe(
        self,
        loss: float,
        *,
        above: float | Sequence[float],
        below: float | Sequence[float],
        lr: float,
        preconditioner: float = 1.0,
    ) -> ForwardRecord | None:
        """Take in the loss values of one step of a loop of your own, all on the same batch.

        Args:
            loss: ``f(θ)``.
            above: ``f(θ+μu)``, one for each query.
            below: ``f(θ−μu)``, in the same order.
            lr: Step size of the step.
            preconditioner: Adam's P as one number, which it nearly is for zeroth-order estimates.

        Returns:
            The record once there are enough directions, else ``None``.

        Raises:
            ValueError: If ``above`` and ``below`` are not equally many; nothing has been taken in then.
        """
        highs, lows = np.atleast_1d(above), np.atleast_1d(below)
        if highs.ndim != 1 or highs.shape != lows.shape:
            raise ValueError(
                f"above has the shape {highs.shape} and below {lows.shape}: expected one loss for each query in both, "
                "as two numbers or two lists of one length"
            )
        self._steps += 1
        for high, low in zip(highs, lows, strict=True):
            curvature = (float(high) - 2.0 * loss + float(low)) / self._mu**2
            if math.isfinite(curvature):
                self._samples.append(curvature)
        if len(self._samples) < LEAST:
            return None
        self.record = self._summary(loss, lr, preconditioner)
        return self.record

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, as plain values."""
        return {"steps": self._steps, "samples": list(self._samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the next observation makes the next record."""
        self._steps = int(state["steps"])
        self._samples.clear()
        self._samples.extend(state["samples"])

    def _summary(self, loss: float, lr: float, preconditioner: float) -> ForwardRecord:
        samples = np.asarray(self._samples)
        variance = float(samples.var(ddof=1))
        trace = Estimate(float(samples.mean()), math.sqrt(variance / len(samples)))
        frobenius_sq = 0.5 * variance  # Var uᵀHu = 2‖H‖_F² for Gaussian u
        if self._sphere is not None:  # and 2(d‖H‖_F² - (Tr H)²)/(d + 2) on the sphere of radius √d
            frobenius_sq += (variance + trace.value**2) / self._sphere

        def ends(value: float) -> Interval:
            return forward_only_bounds(
                value / preconditioner, frobenius_sq / preconditioner**2, rule=self._rule, moments=self._moments
            )

        found = ends(trace.value)
        upper = Estimate(found.upper)
        if math.isfinite(found.upper):
            far = ends(trace.value + trace.stderr).upper  # one standard error away, where it is finite for sure
            upper = Estimate(found.upper, found.upper - far)
        return ForwardRecord(
            step=self._steps,
            loss=loss,
            lr=lr,
            trace=trace,
            frobenius_sq=frobenius_sq,
            directions=len(samples),
            lower=found.lower,
            upper=upper,
            ratio=lr / found.upper,
        )

    def _preconditioner(self) -> float:
        """Mean of Adam's P; 1 for other rules."""
        if self._optimizer is None or not self._rule.preconditioned:
            return 1.0
        group = self._optimizer.param_groups[0]
        v, step = second_moment(self._optimizer, _trained(self._optimizer))
        if v is None or step < 1:
            return 1.0
        (beta1, beta2), eps = group["betas"], group["eps"]
        root = torch.sqrt(v.double() / (1.0 - beta2**step)).mean()
        return float((1.0 - beta1**step) * (float(root) + eps))


def _trained(optimizer: ZeroOrderOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


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
        file: JSON lines file that receives every record, such as ``metrics.jsonl``; it is appended to.
        **options: How often and how precisely to measure, and where: ``examples/guide/options.md`` has types, defaults
            and ranges. ``beta``, ``betas``, ``eps``, ``queries``, ``directions`` and ``mu`` are those of an optimizer
            given by name, or in place of what was read from it. With ``strict`` a measurement that does not reach
            ``rtol`` raises.

    Attributes:
        records: Everything measured so far.
        warnings: What the last measurement had to say.

    Raises:
        TypeError: For an option that there is not.
        ValueError: If an argument is outside of its range, or the optimizer is not covered.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Optimizer | str,
        *,
        file: str | Path | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        self._optimizer = None if isinstance(optimizer, str) else optimizer
        name, found = str(optimizer), {}
        if self._optimizer is not None:
            setup = setup_of(self._optimizer)
            name, found = setup.name, setup.constants
        asked = keywords("StabilityMonitor", {**found, **options})
        self._every, self._steps = asked["every"], asked["steps"]
        self._request = TrackRequest(
            optimizer=checked_argument("track", "optimizer", name),
            lr=Schedule("constant", 1.0),  # the loop has its own
            **asked | {"steps": self._steps or 1},
        )
        self._problem = problem
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
        with curvature_session(self._problem, request, check=first) as session:
            objective = session.objective
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
        if request.strict:
            require_precision([record], request.rtol)
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
        if self._optimizer is None or not self._request.rule.preconditioned:
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
