"""Training with a step size that sets itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoscope.errors import NumericalError, SpecError
from zoscope.optim.optimizers import Closure, ZeroOrderOptimizer, loss_of
from zoscope.optim.step_size import MARGIN, Decision, Limit, Schedule, StepSizeController
from zoscope.registry import OPTIMIZERS

__all__ = ["AutoLR", "AutoLRRecord"]

Undo = Callable[[int, float], None]
Log = Callable[[Mapping[str, float], int], None]
"""Takes values by name and a step; those of `zoscope.integrations.loggers`, or a function of one's own."""


@dataclass(frozen=True)
class AutoLRRecord:
    """What `AutoLR` knew and did at a step.

    Args:
        step: Steps done, this one included.
        loss: Loss of the batch before it.
        lr: Step size of the step, in the optimizer's unit.
        edge: Step size at the edge of stability as measured lately, same unit; ``None`` before the first measurement.
        trace: Tr H, loss/param², a running mean.
        trace_stderr: Its standard error.
        gradient_sq: ``‖g_B‖²``, the noise of mini-batches included, loss²/param², a running mean.
        limit: What held the step size: ``start``, ``edge``, ``progress``, ``growth`` or ``rollback``.
        rollbacks: Times that the run was brought back so far.
        clipped: Steps so far whose slope was out of all proportion and was cut.
    """

    step: int
    loss: float
    lr: float
    edge: float | None
    trace: float
    trace_stderr: float
    gradient_sq: float
    limit: Limit
    rollbacks: int
    clipped: int

    def __str__(self) -> str:
        edge = "not known yet" if self.edge is None else f"{self.edge:.3g}"
        held = f"held by {self.limit}, {self.rollbacks} rollbacks"
        return f"step {self.step}: loss {self.loss:.4g}, lr {self.lr:.3g}, edge {edge}, {held}"

    def log_values(self) -> dict[str, float]:
        """What is known, by the names of `zoscope.track`'s logs."""
        values: dict[str, float] = {"loss": self.loss, "lr": self.lr, "trace": self.trace, "rollbacks": self.rollbacks}
        if self.edge:
            values |= {"edge": self.edge, "ratio": self.lr / self.edge}
        return {f"zoscope/{name}": value for name, value in values.items()}


@dataclass(frozen=True, eq=False)
class _Copies:
    """Parameters and the optimizer's memory at one step."""

    params: list[Tensor]
    memory: list[dict[str, Tensor]]
    counts: list[int]

    @classmethod
    def of(cls, optimizer: ZeroOrderOptimizer) -> _Copies:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        memory = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
        return cls([p.detach().clone() for p in params], memory, [g.get("step", 0) for g in optimizer.param_groups])

    @torch.no_grad()
    def put_back(self, optimizer: ZeroOrderOptimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, kept, memory in zip(params, self.params, self.memory, strict=True):
            p.copy_(kept)
            for slot, tensor in optimizer.state[p].items():
                if slot in memory:
                    tensor.copy_(memory[slot])
                else:
                    tensor.zero_()
        for group, count in zip(optimizer.param_groups, self.counts, strict=True):
            group["step"] = count


class AutoLR:
    """Sets the step size of a zeroth-order optimizer at every step, from forward passes alone.

    A step evaluates two losses; every fifth one, one more. From these come the trace of the Hessian, the noise of the
    gradient and the loss itself, and from them a step size that stays below the edge of stability and that the noise
    does not eat (see the guide). A loss that leaves is brought back to where it was best, by taking the steps since
    then back: for ZO-GD, its normalised form, and ZO-SignSGD of one query, from their seeds and slopes alone, up to
    rounding; others keep one copy of the parameters and of their memory. At the end of the run the better of the last
    and the best window is what remains.

    Args:
        optimizer: `ZOGD`, `ZOGDM`, `ZOAdam`, `ZONormalized` or `ZOSignSGD`. Its own step sizes only say how the groups
            relate to each other. ``None`` for a loop of one's own; see `observe`.
        steps: Steps of the run.
        schedule: Factor on top: ``constant``, ``linear`` or ``cosine``, the last two falling to 0.
        margin: Share of the edge of stability to stay below, in (0, 1].
        undo: For a loop of one's own: called as ``undo(seed, amount)``, adds ``amount·u`` to the parameters, u being
            the direction of that seed. Without it, a loss that leaves only makes the following steps smaller.
        queries: For a loop of one's own: directions averaged in a step.
        loggers: Each is called as ``log(values, step)`` on the first step, every ``log_every`` steps, and on the last.
        log_every: Steps between such calls.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> optimizer = zoscope.ZOGD(model.parameters(), lr=1.0)  # doctest: +SKIP
        >>> auto = zoscope.AutoLR(optimizer, steps=3000)  # doctest: +SKIP
        >>> for batch in batches:  # doctest: +SKIP
        ...     auto.step(lambda: loss(model, batch))
    """

    def __init__(
        self,
        optimizer: ZeroOrderOptimizer | None = None,
        *,
        steps: int,
        schedule: Schedule = "constant",
        margin: float = MARGIN,
        undo: Undo | None = None,
        queries: int = 1,
        loggers: Sequence[Log] = (),
        log_every: int = 10,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {log_every}")
        self._loggers, self._log_every = tuple(loggers), log_every
        self._optimizer, self._undo = optimizer, undo
        rounding = 6e-8
        if optimizer is not None:
            if not isinstance(optimizer, ZeroOrderOptimizer):
                raise TypeError(
                    f"optimizer is a {type(optimizer).__name__}: expected one of zoscope's, such as zoscope.ZOGD. For "
                    "a loop of your own leave it out, and call observe() with the losses of every step"
                )
            queries = optimizer.queries
            kinds = {p.dtype for group in optimizer.param_groups for p in group["params"]}
            # A loss is a mean over many numbers: it rounds less than each of them.
            rounding = max((torch.finfo(kind).eps for kind in kinds), default=1e-7) / 2
            lrs = [float(group["lr"]) for group in optimizer.param_groups]
            largest = max(lrs, default=0.0)
            self._ratios = [lr / largest if largest else 1.0 for lr in lrs]
            optimizer.control = self
        self._controller = StepSizeController(
            steps, schedule=schedule, margin=margin, queries=queries, rounding=rounding
        )
        self._base = 0 if optimizer is None else optimizer._generator.initial_seed()
        self._log: list[tuple[int, tuple[float, ...], tuple[float, ...]]] = []
        self._copies: _Copies | None = None
        self._decision: Decision | None = None
        self._unit = 1.0
        self._lost = 0
        self.last: AutoLRRecord | None = None

    @property
    def lr(self) -> float:
        """Step size of the last step, in the optimizer's unit; 0 before the first one and while it measures."""
        return self.last.lr if self.last is not None else 0.0

    @property
    def rollbacks(self) -> int:
        """Times that the run was brought back."""
        return self._controller.rollbacks

    @property
    def wants_loss(self) -> bool:
        """For a loop of one's own: whether the coming step should pass ``loss`` to `observe`."""
        return self._controller.measures

    def step(self, closure: Closure) -> float:
        """One step of the optimizer, with the step size of the moment.

        Args:
            closure: Returns the loss of a batch as a scalar; called two or three times (twice more on the first step,
                to see that it is the same), without gradients, and the same batch must be seen each time.

        Returns:
            The loss of the batch before the step.

        Raises:
            ValueError: If there is no optimizer.
            SpecError: If the first batch has another loss when it is called again.
            NumericalError: If the loss of the first step, or of 20 in a row, is not finite. The parameters are those of
                the last step worth keeping.
        """
        optimizer = self._optimizer
        if optimizer is None:
            raise ValueError("AutoLR without an optimizer takes no steps: use observe, or hand over an optimizer")
        if not self._controller.step:
            _require_same(closure, rounding=self._controller.rounding)
        if not optimizer.replays and self._copies is None:
            self._copies = _Copies.of(optimizer)
        seed = self._seed(self._controller.step)
        optimizer.reseed(seed)
        loss = optimizer.step(closure)
        decision = self._decision
        assert decision is not None  # the optimizer has called `choose`
        lrs = tuple(float(group["lr"]) for group in optimizer.param_groups)
        self._log.append((seed, decision.slopes, lrs))
        if decision.leave:
            self._go_back()
        elif decision.keep:
            self._keep()
        if self._controller.step == self._controller.steps and self._controller.ended_worse():
            self._go_back()
        self._require_finite()
        return loss

    def observe(
        self,
        loss_plus: float | Sequence[float],
        loss_minus: float | Sequence[float],
        loss: float | None = None,
        *,
        mu: float,
        seed: int | None = None,
    ) -> float:
        """For a loop of one's own: what a step evaluated, and the step size for it.

        The step to take is ``θ ← θ − lr · (f₊ − f₋)/2μ · u``, averaged over the queries.

        Args:
            loss_plus: ``f(θ + μu)``; with several queries one for each.
            loss_minus: ``f(θ − μu)``, on the same batch.
            loss: ``f(θ)`` on the same batch, where `wants_loss` asked for it.
            mu: μ.
            seed: Seed of u, for ``undo``; of the first query where there are several, which cannot be taken back.

        Returns:
            The step size, param²/loss; 0 while it measures, and for a step whose loss has left.

        Raises:
            NumericalError: If the losses of 20 steps in a row are not finite.
        """
        above = [loss_plus] if isinstance(loss_plus, int | float) else list(loss_plus)
        below = [loss_minus] if isinstance(loss_minus, int | float) else list(loss_minus)
        slopes = [(f - g) / (2.0 * mu) for f, g in zip(above, below, strict=True)]
        middles = [0.5 * (f + g) for f, g in zip(above, below, strict=True)]
        here = sum(middles) / len(middles)
        curvatures = [] if loss is None else [2.0 * (middle - loss) / mu**2 for middle in middles]
        decision = self._decide(slopes, here if loss is None else loss, curvatures)
        lr = decision.lr * _ratio(decision.slopes, slopes)
        if decision.leave:
            for number, amount in reversed(self._log):  # type: ignore[misc]
                assert self._undo is not None
                self._undo(number, amount)
            self._log.clear()
        elif self._undo is not None and seed is not None and len(slopes) == 1:
            self._log.append((seed, lr * slopes[0]))  # type: ignore[arg-type]
        if decision.keep:
            self._log.clear()
        self._require_finite()
        return lr

    def reach(self) -> float | None:
        """See `zoscope.optim.optimizers.StepControl`."""
        optimizer = self._optimizer
        assert optimizer is not None
        return self._controller.reach(optimizer.mu) if self._controller.measures else None

    def choose(self, slopes: Sequence[float], loss: float, curvatures: Sequence[float]) -> Sequence[float]:
        """See `zoscope.optim.optimizers.StepControl`."""
        decision = self._decide(slopes, loss, curvatures)
        optimizer = self._optimizer
        assert optimizer is not None
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = self.lr * ratio
        return decision.slopes

    def _decide(self, slopes: Sequence[float], loss: float, curvatures: Sequence[float]) -> Decision:
        controller = self._controller
        decision = self._decision = controller.observe(slopes, loss, curvatures)
        self._lost = 0 if math.isfinite(loss) and all(map(math.isfinite, slopes)) else self._lost + 1
        if self._optimizer is not None and (controller.measures or not self._unit):
            self._unit = _unit(self._optimizer, controller.gradient_sq)
        edge = controller.edge
        self.last = AutoLRRecord(
            controller.step,
            loss,
            decision.lr * self._unit,
            None if edge is None else edge * self._unit,
            controller.trace.mean,
            controller.trace_stderr,
            controller.gradient_sq,
            decision.limit,
            controller.rollbacks,
            controller.clipped,
        )
        if self._loggers and ((controller.step - 1) % self._log_every == 0 or controller.step == controller.steps):
            values = self.last.log_values()
            for log in self._loggers:
                log(values, controller.step)
        return decision

    def _require_finite(self) -> None:
        """Steps that change nothing, as long as nothing comes back, should not go on for hours."""
        if self._lost >= LOST:
            raise NumericalError(
                f"AutoLR: the loss has not been finite for {LOST} steps in a row, the last at step "
                f"{self._controller.step:,}. Expected finite losses where the run was brought back to. Look for NaN in "
                "the batches, and for log(0) or 0/0 in the loss."
            )

    def _seed(self, step: int) -> int:
        return int(np.random.SeedSequence(self._base, spawn_key=(step,)).generate_state(1, np.uint64)[0]) >> 1

    def _keep(self) -> None:
        assert self._optimizer is not None
        self._log.clear()
        if not self._optimizer.replays:
            self._copies = _Copies.of(self._optimizer)

    def _go_back(self) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        if self._copies is not None:
            self._copies.put_back(optimizer)
        else:
            for seed, slopes, lrs in reversed(self._log):
                if any(slopes) and any(lrs):
                    optimizer.undo(seed, slopes, lrs)
        self._log.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on as if it had not stopped, beside parameters and the optimizer's own state."""
        copies = self._copies
        kept = None if copies is None else (copies.params, copies.memory, copies.counts)
        return {
            "controller": self._controller.state_dict(),
            "base": self._base,
            "unit": self._unit,
            "ratios": getattr(self, "_ratios", None),
            "log": list(self._log),
            "copies": copy.deepcopy(kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._controller = StepSizeController.from_state_dict(state["controller"])
        self._base, self._unit = state["base"], state["unit"]
        if state["ratios"] is not None:
            self._ratios = list(state["ratios"])
        self._log = [tuple(entry) for entry in state["log"]]
        self._copies = None if state["copies"] is None else _Copies(*copy.deepcopy(state["copies"]))


LOST = 20
"""Steps in a row without a finite loss after which a run is given up."""

VARIES, UNITS = 1e-4, 4.0
"""Relative change of the loss from one call to the next that no order of additions explains, and the same in units of
the rounding of the parameters' type, where that is more."""


@torch.no_grad()
def _require_same(closure: Closure, *, rounding: float) -> None:
    """See that a closure depends on the parameters alone: slopes between two batches are noise over μ."""
    first, again = float(loss_of(closure)), float(loss_of(closure))
    if not math.isfinite(first):
        raise NumericalError(
            f"AutoLR: the loss of the first batch is {first:g} before any step. Expected a finite number. Look for NaN "
            "in the batch and in the parameters."
        )
    if abs(first - again) > max(VARIES, UNITS * rounding) * max(abs(first), abs(again)):
        raise SpecError(
            f"AutoLR: two calls of the loss at the same parameters returned {first:.4g} and {again:.4g}. Expected the "
            "same batch in every call of a step, and no dropout. Draw the batch before auto.step(…), and put the model "
            "in eval mode."
        )


def _ratio(cut: Iterable[float], slopes: Iterable[float]) -> float:
    """How much shorter a step is whose slopes were cut."""
    pairs = [c / s for c, s in zip(cut, slopes, strict=True) if s]
    return min(pairs, default=1.0)


def _unit(optimizer: ZeroOrderOptimizer, gradient_sq: float) -> float:
    """Step size of the optimizer over that of plain ZO-GD whose steps are as long.

    Momentum adds steps up; sign and normalised steps do not know how steep the loss is; Adam divides by P, which the
    noise of the estimate makes nearly the same in every coordinate.
    """
    group, adapts = optimizer.param_groups[0], OPTIMIZERS[optimizer.name].adapts
    if adapts == "second-moment":
        return _mean_preconditioner(optimizer)
    if adapts is not None:
        return math.sqrt(gradient_sq / (optimizer.queries if adapts == "sign" else 1))
    return float((1.0 - group.get("beta", 0.0)) / (1.0 - group.get("dampening", 0.0)))


@torch.no_grad()
def _mean_preconditioner(optimizer: ZeroOrderOptimizer) -> float:
    """``1/mean(1/P)``, P = √v̂ + ε over all parameters; 0 before the first step."""
    total, count = 0.0, 0
    for group in optimizer.param_groups:
        correction = 1.0 - group["betas"][1] ** group.get("step", 0)
        for p in group["params"]:
            if "exp_avg_sq" in optimizer.state[p] and correction:
                root = (optimizer.state[p]["exp_avg_sq"] / correction).sqrt_().add_(group["eps"])
                total += float(root.reciprocal_().double().sum())
                count += p.numel()
    return count / total if total and math.isfinite(total) else 0.0
