"""Monitors of a training loop of one's own: ``zoscope.StabilityMonitor`` and ``zoscope.ForwardMonitor``."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from zoscope.analysis.request import curvature_session, subject_of
from zoscope.analysis.track_measuring import Measurer, Moment
from zoscope.analysis.track_results import TrackRequest, require_precision
from zoscope.config.load import Schedule
from zoscope.errors import UsageError
from zoscope.optim.optimizers import ZeroOrderOptimizer, loss_of
from zoscope.options import OPTIONS, MonitorOptions, checked_argument, keywords
from zoscope.problem import Notice
from zoscope.problem.core import Measurable
from zoscope.problem.model import place, some
from zoscope.registry import OPTIMIZERS, family_of
from zoscope.result import JsonObject
from zoscope.theory.rules import EstimatorMoments, UpdateRule, estimator_moments, update_rule
from zoscope.theory.spectrum import Estimate, require_count, require_finite
from zoscope.theory.stability import Interval, MomentBounds

if TYPE_CHECKING:
    from zoscope.analysis.request import ProblemLike
    from zoscope.analysis.track_results import Record
    from zoscope.problem import Objective, Problem

LOGGED = {
    "loss": "loss",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "trace": "trace",
    "lambda_max": "lambda_max",
    "lambda_min": "lambda_min",
    "exact": "max_lr",
    "exact_batches": "max_lr_batches",
    "ratio": "ratio",
    "lower": "lower_term",
    "upper": "upper_term",
    "threshold": "two_over_lr",
}
"""Fields of a record and the names that they are logged under, after ``zoscope/``: step sizes first, then curvature."""


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


_AROUND = {
    "AcceleratedOptimizer": "optimizer",
    "DeepSpeedOptimizerWrapper": "optimizer",
    "LightningOptimizer": "_optimizer",
    "_FabricOptimizer": "_optimizer",
    "ZeroRedundancyOptimizer": "optim",
}
"""Classes of accelerate, Lightning and torch that stand around an optimizer, and where they keep it."""


def bare_optimizer(optimizer: Any) -> Any:
    """What training libraries wrap around an optimizer, taken off."""
    while True:
        kinds = [kind.__name__ for kind in type(optimizer).__mro__ if kind.__name__ in _AROUND]
        inner = getattr(optimizer, _AROUND[kinds[0]], None) if kinds else None
        if inner is None:
            return optimizer
        optimizer = inner


def setup_of(optimizer: Optimizer) -> OptimizerSetup:
    """Recognise a PyTorch optimizer by its class and its first parameter group.

    Raises:
        ValueError: If it is none that the theory covers.
    """
    optimizer = bare_optimizer(optimizer)
    group = optimizer.param_groups[0]
    if isinstance(optimizer, (ZeroOrderOptimizer, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)):
        _require_known_step(optimizer)
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


def _require_known_step(optimizer: Optimizer) -> None:
    """See that an optimizer does what its class says.

    Raises:
        ValueError: If a class of the user's has a step of its own, or the loss is maximised.
    """
    owner = next(kind for kind in type(optimizer).__mro__ if "step" in vars(kind))
    if not owner.__module__.startswith(("torch.", "zoscope.")):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, whose step() is its own: expected one of PyTorch or zoscope. "
            "Say which rule it follows, StabilityMonitor(problem, optimizer, name='gd'), if it follows one"
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer has maximize=True: expected one that minimises the loss of the problem; negate both"
        )


@dataclass(frozen=True)
class TrainedBy:
    """Which parameters of a problem some optimizers move, and how.

    Args:
        names: Those that move, in the problem's order.
        params: The same, as the optimizers hold them.
        groups: The parameter group of each.
        states: What its optimizer keeps of each.
        still: Names of parameters of the problem that do not move: no optimizer holds them, or with a step size of 0.
        beyond: Number of further tensors that these optimizers move and the problem does not vary.
        optimizers: Those that hold some of the problem's parameters.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    groups: tuple[dict[str, Any], ...]
    states: tuple[Mapping[str, Any], ...]
    still: tuple[str, ...]
    beyond: int
    optimizers: tuple[Optimizer, ...]

    @classmethod
    def of(cls, optimizers: Sequence[Optimizer], problem: Problem) -> TrainedBy:
        """Look every parameter up by the memory that it is in.

        Raises:
            ValueError: If no optimizer holds any of the problem's parameters.
        """
        names, params = problem.selection().names, problem.parameters()
        holders = {
            place(p): (p, group, optimizer)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        found = [holders.get(place(p)) for p in params]
        held = [entry for entry in found if entry is not None]
        if not held:
            raise ValueError(
                f"the optimizer holds none of the {len(names)} parameter tensors of the problem ({some(list(names))}): "
                "expected the model that it trains, not a copy; give its name instead, such as 'gd', if it moves them "
                "in another way"
            )
        warm = any(float(group["lr"]) > 0 for _, group, _ in held)  # at the start of a warm-up all are 0
        moves = [e is not None and e[0].requires_grad and (float(e[1]["lr"]) > 0 or not warm) for e in found]
        moving = [entry for entry, yes in zip(found, moves, strict=True) if yes and entry is not None]
        if not moving:  # frozen, but what the user asks about
            moving, moves = held, [entry is not None for entry in found]
        used = tuple({id(optimizer): optimizer for *_, optimizer in held}.values())
        own = {place(p) for p in params}
        beyond = {
            place(p)
            for optimizer in used
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and float(group["lr"]) > 0
        }
        return cls(
            tuple(name for name, yes in zip(names, moves, strict=True) if yes),
            tuple(p for p, *_ in moving),
            tuple(group for _, group, _ in moving),
            tuple(optimizer.state.get(p, {}) for p, _, optimizer in moving),
            tuple(name for name, yes in zip(names, moves, strict=True) if not yes),
            len(beyond - own),
            used,
        )

    @property
    def distinct_groups(self) -> list[dict[str, Any]]:
        """The groups, each once, in the order of the optimizers."""
        used = {id(group) for group in self.groups}
        return [group for optimizer in self.optimizers for group in optimizer.param_groups if id(group) in used]

    def restricted(self, problem: Problem) -> Problem:
        """The problem of the parameters that move."""
        if not self.still:
            return problem
        return problem.with_params("^(?:" + "|".join(map(re.escape, self.names)) + ")$")

    def notices(self) -> Iterable[Notice]:
        """On parameters that only one of the two has."""
        if self.still:
            yield Notice(
                "not-trained",
                f"{len(self.still)} of the problem's {len(self.still) + len(self.names)} parameter tensors "
                f"({some(list(self.still))}) are in no optimizer, or stand still (requires_grad=False, or a step size "
                "of 0): what is measured leaves them out.",
            )
        if self.beyond:
            yield Notice(
                "not-measured",
                f"The optimizer moves {self.beyond} parameter tensors more than the problem varies: they count as "
                "fixed here, and with them the threshold is lower. Measure the loss of all of them for the real one.",
            )
        constants = differing(self.distinct_groups)
        if constants:
            yield Notice(
                "parameter-constants",
                f"The optimizer's groups differ in {', '.join(constants)}: those of the first one are taken for all.",
            )

    def rates(self) -> list[float]:
        """Step size of every tensor; at the start of a warm-up, where they are 0, those that it leads to."""
        rates = [float(group["lr"]) for group in self.groups]
        return rates if any(rates) else [float(group.get("initial_lr", group["lr"])) for group in self.groups]

    def second_moment(self) -> tuple[Tensor | None, int]:
        """Adam's v as ``(d,)``, the largest one of AMSGrad, and its steps; ``None`` where it is not there yet.

        Tensors that joined later have taken fewer steps: theirs is the v with which the P of all steps is their own.
        """
        if any("exp_avg_sq" not in state for state in self.states):
            return None, 0
        # The zeroth-order optimizers count steps in the group.
        steps = [int(s.get("step", g.get("step", 0))) for s, g in zip(self.states, self.groups, strict=True)]
        most, parts = max(steps), []
        for state, group, step in zip(self.states, self.groups, steps, strict=True):
            v = state.get("max_exp_avg_sq", state["exp_avg_sq"]).detach().reshape(-1)
            if 0 < step < most:
                first, second = ((1 - beta**step) / (1 - beta**most) for beta in group["betas"])
                eps = group["eps"] * math.sqrt(1 - group["betas"][1] ** most)
                v = (first * (v / second).sqrt() - (1 - first) * eps).clamp_min(0).square()
            parts.append(v)
        return torch.cat(parts), most


def differing(groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Constants in which parameter groups differ from the first one, beside the step size; that one's are used."""
    first, *others = groups
    names = dict.fromkeys(("momentum", *(name for record in OPTIMIZERS.values() for name in record.options)))
    if "betas" in first:  # of Adam it is in no threshold
        names.pop("weight_decay", None)
    return tuple(name for name in names if any(group.get(name) != first.get(name) for group in others))


def spread_out(values: Sequence[float], params: Sequence[Tensor]) -> Tensor:
    """A value for each parameter as ``(d,)`` in float64, on the parameters' device."""
    parts = [p.new_full((p.numel(),), value, dtype=torch.float64) for p, value in zip(params, values, strict=True)]
    return torch.cat(parts)


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

        monitor = zoscope.ForwardMonitor(optimizer)
        for batch in loader:
            record = monitor.step(lambda: loss(model, batch))

    Rounding of the loss values adds noise of about ``2·10⁻⁷ f/μ²`` to each of them in float32; it is part of the error
    bar. With mini-batches the trace is that of the mean over the batches in the window, and the scatter of their own
    traces counts in the threshold as theirs does. The window spans ``every · window / queries`` steps: a run that
    leaves multiplies its curvature within some hundred steps, so that a long window sees it when it is over.

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
        window: int = 25,
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
        require_finite("> 0", mu=mu)
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
            loss = float(loss_of(closure))
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
            bounds = MomentBounds(self._rule, self._moments)
            return bounds.forward_only(value / preconditioner, frobenius_sq / preconditioner**2)

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
        v, step = _second_moment(self._optimizer)
        if v is None or step < 1:
            return 1.0
        (beta1, beta2), eps = group["betas"], group["eps"]
        root = torch.sqrt(v.double() / (1.0 - beta2**step)).mean()
        return float((1.0 - beta1**step) * (float(root) + eps))


def _trained(optimizer: ZeroOrderOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _second_moment(optimizer: ZeroOrderOptimizer) -> tuple[Tensor | None, int]:
    states = [optimizer.state.get(p, {}) for p in _trained(optimizer)]
    if not states or any("exp_avg_sq" not in state for state in states):
        return None, 0
    step = int(optimizer.param_groups[0].get("step", 0))
    return torch.cat([state["exp_avg_sq"].detach().reshape(-1) for state in states]), step


class StabilityMonitor:
    """Measures the curvature where a training loop stands, and compares its step size with what that allows.

    The model of ``problem`` is the one that the loop trains; it comes back from every measurement as it was. Every
    measurement starts anew: bases kept from the one before were tried, and saved no products. Parameter groups may have
    step sizes of their own; the record is then about that of the first one, with the others in proportion. Measured is
    what the optimizer moves: parameters of the problem that it does not hold, or that stand still, are left out, which
    ``warnings`` says.

        monitor = zoscope.StabilityMonitor(problem, optimizer, every=500, steps=20_000)
        for batch in loader:
            loss = optimizer.step(...)
            record = monitor.step(loss=loss)
            if record is not None and record.ratio is not None and record.ratio > 1:
                ...

    Args:
        problem: The model that is trained, and the batches on which its loss is measured.
        optimizer: The loop's optimizer (``SGD``, ``Adam``, ``AdamW``, ``zoscope.ZOGD``, ``ZOGDM`` or ``ZOAdam``; as
            ``accelerate`` or Lightning wrap it, too), from which the step size, the constants and Adam's state are
            read; several, of which those count that hold parameters of the problem; or one of the names ``"zo-gd"``,
            ``"zo-gdm"``, ``"zo-adam"``, ``"gd"``, ``"gdm"``, ``"adam"``.
        name: The rule that the updates follow, in place of that of the optimizer's class, such as ``"zo-gd"`` where it
            applies a zeroth-order estimate.
        max_grad_norm: Norm that the loop clips gradients to; ``None`` for no clipping.
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
        problem: ProblemLike,
        optimizer: Optimizer | Sequence[Optimizer] | str,
        *,
        name: str | None = None,
        max_grad_norm: float | None = None,
        file: str | Path | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        self._problem = problem = subject_of(problem, None)
        self._optimizers: tuple[Optimizer, ...] = ()
        self._lead: tuple[Optimizer, int] | None = None  # the optimizer and the place of the group whose lr counts
        self._stranger = False  # an optimizer of a known rule holds other tensors
        found: dict[str, Any] = {}
        if isinstance(optimizer, str):
            name = name or optimizer
        else:
            several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
            self._optimizers = tuple(map(bare_optimizer, several))
            holding: Sequence[Optimizer] = ()
            try:
                holding = TrainedBy.of(self._optimizers, problem).optimizers
            except ValueError:
                if name is None:
                    raise
                self._stranger, self._lead, self._optimizers = True, (self._optimizers[0], 0), ()
            name, found = _rule_of(holding, name)
        asked = keywords("StabilityMonitor", {**found, **options})
        self._every, self._steps = asked["every"], asked["steps"]
        self._request = TrackRequest(
            optimizer=checked_argument("track", "optimizer", name),
            lr=Schedule("constant", 1.0),  # the loop has its own
            **asked | {"steps": self._steps or 1},
        )
        self._max_grad_norm = max_grad_norm
        self._file = None if file is None else Path(file)
        self._state: dict[str, Any] | None = None
        self._losses: list[float] = []
        self._early: list[float] = []
        self._settled = False
        self._other_loss: Notice | None = None
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
            self.hear(self._losses[-1])
        if self._done % self._every:
            if lr is not None or self._lead is not None:
                self._positive(self._lr() if lr is None else lr)
            return None
        return self.measure(lr=lr, step=self._done)

    def hear(self, loss: float) -> None:
        """Tell of a loss of the loop that is only to be compared with the measured one; the first few are enough."""
        if not self.compared:
            self._early.append(loss)

    @property
    def compared(self) -> bool:
        """Whether enough losses of the loop are known to compare them with the measured ones."""
        return len(self._early) >= EARLY

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
        request, trained = self._request, self._trained()
        lr = self._positive(self._lr() if lr is None else lr)
        require_finite("> 0", lr=lr)
        done = max(self._done, 0) if step is None else step
        remaining = 0 if self._steps is None else max(self._steps - done, 0)
        subject = self._problem if trained is None else trained.restricted(self._problem)
        first = self._state is None  # what is checked of the problem does not change as it trains
        with curvature_session(subject, request, check=first) as session:
            objective = session.objective
            measurer = Measurer(Measurable(objective), request)
            if self._state is not None:
                measurer.restore(self._state)
            v, seen, shares = None, 0, None
            if trained is not None:
                for notice in trained.notices():
                    objective.notify(notice.code, notice.message)
                v, seen = trained.second_moment() if request.rule.preconditioned else (None, 0)
                shares = _shares(trained, objective)
            moment = Moment(done, lr, lr, remaining, None if v is None else v.to(objective.device), seen, shares)
            record = measurer.at(moment)
            metrics = objective.metric_values()
            self._state, self.warnings = measurer.state(), tuple(objective.warnings)
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            record = replace(record, loss_mean=mean, loss_max=max(self._losses, key=_badness))
            self._losses.clear()
        record = replace(record, metrics=metrics)
        self.records.append(record)
        self.warnings += tuple(self._remarks(record, trained))
        self._write(record)
        if request.strict:
            require_precision([record], request.rtol)
        return record

    def _trained(self) -> TrainedBy | None:
        """What the optimizers do with the problem's parameters now: groups come and go, and layers thaw."""
        if not self._optimizers:
            return None
        found = TrainedBy.of(self._optimizers, self._problem)
        places = [(optimizer, i) for optimizer in found.optimizers for i in range(len(optimizer.param_groups))]
        lead = found.distinct_groups[0]
        self._lead = next((optimizer, i) for optimizer, i in places if optimizer.param_groups[i] is lead)
        return found

    def _lr(self) -> float:
        if self._lead is None:
            raise ValueError(
                "lr is missing: pass the step size, monitor.step(loss=..., lr=...), or give the monitor the optimizer "
                "itself instead of its name"
            )
        optimizer, place = self._lead
        return float(optimizer.param_groups[place]["lr"])

    def _positive(self, lr: float) -> float:
        """In place of 0, where schedules begin and end, the last step size above it, or what is warmed up to."""
        if lr == 0:
            return self._last_lr or self._planned() or lr
        self._last_lr = lr
        return lr

    def _planned(self) -> float | None:
        if self._lead is None:
            return None
        optimizer, place = self._lead
        found = optimizer.param_groups[place].get("initial_lr", optimizer.defaults.get("lr"))
        return None if found is None else float(found)

    def _remarks(self, record: Record, trained: TrainedBy | None) -> Iterable[Notice]:
        """On what the loop does beside the rule."""
        if trained is not None:
            yield from _decay_notices(record, trained)
        if self._stranger:
            yield Notice(
                "other-parameters",
                "The optimizer holds none of the problem's parameters. Its first step size is taken for all of them.",
            )
        norm, clip = record.grad_norm, self._max_grad_norm
        if clip and norm is not None and norm > clip and self._request.first_order:
            yield Notice(
                "clipped",
                f"The loop clips gradients, {norm:.3g} long here, to {clip:g}. Thresholds are for steps that are not "
                "clipped; clipped ones are shorter.",
            )
        self._compare(record)
        if self._other_loss is not None:
            yield self._other_loss

    def _compare(self, record: Record) -> None:
        """Hold the first losses of the loop against the loss measured before and after them, until there are enough."""
        losses = (self.records[0].loss, record.loss)
        known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        early = [loss for loss in self._early if math.isfinite(loss)]
        if self._settled or not early or not known:
            return
        self._settled = self.compared
        mean, factor = sum(early) / len(early), APART[self._settled]
        error = 3 * float(np.std(early, ddof=1)) / math.sqrt(len(early)) if len(early) > 1 else 0.0
        low, high = min(known), max(known)
        apart = mean - error > high + (factor - 1) * abs(high) or mean + error < low - (1 - 1 / factor) * abs(low)
        self._other_loss = None
        if apart:
            self._other_loss = Notice(
                "other-loss",
                f"The first losses of the loop are {mean:.3g} on average, and the problem's loss is {known[0]:.3g} "
                "there: what is measured may not be what is trained. Compare the loss functions (class weights, "
                "further terms, sums in place of means, as over accumulated batches), the data, and dropout.",
            )

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


def _rule_of(optimizers: Sequence[Optimizer], name: str | None) -> tuple[str, dict[str, Any]]:
    """Name of the rule, and its constants as far as the optimizers have them.

    Raises:
        ValueError: If the optimizers have no rule that is known, or several.
    """
    try:
        setups = [setup_of(optimizer) for optimizer in optimizers]
    except ValueError:
        if name is None:
            raise
        return name, {}
    if name is None and len({setup.name for setup in setups}) > 1:
        raise ValueError(
            f"the problem's parameters are trained by several rules, {' and '.join(setup.name for setup in setups)}: "
            "expected one. Measure a problem for each, with params= for its parameters"
        )
    if name is None or (setups and family_of(name) == family_of(setups[0].name)):
        return name or setups[0].name, setups[0].constants
    return name, {}  # another rule than that of the class, which has no constants of it


def _shares(trained: TrainedBy, objective: Objective) -> Tensor | None:
    """Step sizes of parameters in units of that of the first group; ``None`` where all are the same."""
    rates = trained.rates()
    first = next(rate for rate, group in zip(rates, trained.groups, strict=True) if group is trained.distinct_groups[0])
    if len(set(rates)) == 1 or min(rates) <= 0:
        return None
    objective.notify(
        "parameter-groups",
        f"The optimizer has step sizes from {min(rates):.3g} to {max(rates):.3g}: curvature and threshold are for "
        f"that of its first group, {first:.3g}, with the others in proportion (P⁻¹H, P their inverse). For "
        "zeroth-order optimizers this assumes that P and H nearly commute; see record.commutator.",
    )
    return spread_out(rates, trained.params).to(objective.device) / first


MATERIAL = 0.01
"""Part of a threshold from which weight decay that it leaves out is worth a notice."""


def _decay_notices(record: Record, trained: TrainedBy) -> Iterable[Notice]:
    """On weight decay that thresholds leave out: Adam's, and that of groups with other step sizes than the first."""
    group = trained.distinct_groups[0]
    decay = float(group.get("weight_decay", 0.0))
    if not decay or record.ratio is None:
        return
    if "betas" not in group:
        rates = trained.rates()
        off = decay * (max(rates) - min(rates)) / 2
        if off > MATERIAL * max(record.ratio, 0.0):
            yield Notice(
                "weight-decay",
                f"weight_decay={decay:g} counts as if all groups had the step size of the first: the ratio of step "
                f"size and threshold, {record.ratio:.3g}, may be off by up to {off:.2g}.",
            )
        return
    if isinstance(trained.optimizers[0], torch.optim.AdamW) or group.get("decoupled_weight_decay"):
        added = record.lr * decay / 2
    else:  # w P⁻¹ beside P⁻¹H
        if record.preconditioner is None or not record.lambda_max:
            return
        added = record.ratio * decay / record.preconditioner[0] / abs(record.lambda_max)
    if added > MATERIAL * max(record.ratio, 0.0):
        yield Notice(
            "weight-decay",
            f"Adam's weight_decay={decay:g} is not in its thresholds. It adds up to {added:.2g} to the ratio of step "
            f"size and threshold, {record.ratio:.3g}.",
        )


EARLY = 8
"""First losses of a loop that are held against the measured one."""

APART = {True: 2.0, False: 4.0}
"""Factor between the two, beyond the scatter of the first, that is worth a notice: with so many losses, and fewer."""


class Monitored:
    """What the callbacks of training libraries share: a monitor that comes with the training."""

    _monitor: StabilityMonitor | None = None
    _heard: frozenset[str] = frozenset()

    @property
    def records(self) -> Sequence[Record]:
        """Everything measured so far."""
        return () if self._monitor is None else self._monitor.records

    @property
    def warnings(self) -> Sequence[Notice]:
        """What the last measurement had to say."""
        return () if self._monitor is None else self._monitor.warnings

    def _log_warnings(self) -> None:
        """Tell Python's log ``zoscope`` what it has not heard of yet, by the codes of notices."""
        fresh = [notice for notice in self.warnings if notice.code not in self._heard]
        self._heard |= {notice.code for notice in fresh}
        for notice in fresh:
            logging.getLogger("zoscope").warning(f"zoscope: {notice.message} [{notice.code}]")


def _badness(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
