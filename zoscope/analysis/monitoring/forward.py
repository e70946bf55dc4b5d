"""``zoscope.ForwardMonitor``: the threshold from the loss values that zeroth-order training makes anyway."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoscope.analysis.monitoring.optimizers import second_moment, setup_of
from zoscope.analysis.optimizer_bounds import number
from zoscope.optim.optimizers import ZeroOrderOptimizer
from zoscope.theory.moments import EstimatorMoments, estimator_moments
from zoscope.theory.rules import UpdateRule, update_rule
from zoscope.theory.spectrum import Estimate
from zoscope.theory.thresholds import Interval, forward_only_bounds
from zoscope.theory.validate import require_count, require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST = 8
"""Directions below which their scatter says little about the error of their mean."""


@dataclass(frozen=True)
class ForwardRecord:
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

    step: int
    loss: float
    lr: float
    trace: Estimate
    frobenius_sq: float
    directions: int
    lower: float
    upper: Estimate
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "step": self.step,
            "loss": number(self.loss),
            "lr": self.lr,
            "trace": number(self.trace.value),
            "trace_stderr": number(self.trace.stderr),
            "frobenius_sq": number(self.frobenius_sq),
            "directions": self.directions,
            "lower": number(self.lower),
            "upper": number(self.upper.value),
            "upper_stderr": number(self.upper.stderr),
            "ratio": number(self.ratio),
        }


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
        name: ``"gd"``, ``"gdm"`` or ``"adam"`` where there is no optimizer.
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
        mu: float = 1e-3,
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
            setup = setup_of(optimizer)
            name, constants = setup.name.removeprefix("zo-"), setup.constants
            mu = constants.pop("mu")
            dimension = sum(p.numel() for p in _trained(optimizer))
        require_positive("mu", mu)
        queries, law = constants.pop("queries", 1), constants.pop("directions", "gaussian")
        constants.pop("eps", None)
        self._optimizer, self._every, self._mu = optimizer, every, mu
        self._rule: UpdateRule = update_rule(name, **constants)
        self._moments: EstimatorMoments = estimator_moments(law, queries=queries, dimension=dimension or 1)
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
        frobenius_sq = max(0.5 * variance, 0.0)  # Var uᵀHu = 2‖H‖_F² for Gaussian u

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
