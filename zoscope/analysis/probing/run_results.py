"""The result of one step size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zoscope.analysis.optimizer_bounds import number

RunVerdict = Literal["stable", "diverged", "sharpened", "inconclusive", "falls", "rises"]
Variant = Literal["first-order", "zeroth-order", "frozen", "adaptive"]


@dataclass(frozen=True)
class EndState:
    """The curvature measured again, where a replica was last seen in the valley.

    Args:
        step: The step of that.
        threshold: Threshold there, for the rule that ran (frozen or current P for Adam); with mini-batches that of all
            examples, times the ratio of the two at the start.
        trace: Trace of the operator that the rule acts through, there.
        lambda_max: Its largest eigenvalue.
        term: What the paper's band is compared with: ``2/η``, ``2(1−β)/η`` for momentum.
        preconditioner_mean: Mean diagonal of P_t, for an adaptive run.
    """

    step: int
    threshold: float
    trace: float
    lambda_max: float
    term: float
    preconditioner_mean: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "step": self.step,
            "threshold": number(self.threshold),
            "trace": number(self.trace),
            "lambda_max": number(self.lambda_max),
            "term": number(self.term),
            "preconditioner_mean": number(self.preconditioner_mean),
        }


@dataclass(frozen=True)
class Curves:
    """A run over its steps.

    Args:
        steps: Steps looked at, 0 first.
        losses: For every step the losses of the replicas; ``None`` from where one left.
        distances: Squared distances from the start, likewise.
        predicted: The predicted mean loss, ``None`` where it overflows or is not known.
    """

    steps: tuple[int, ...]
    losses: tuple[tuple[float | None, ...], ...]
    distances: tuple[tuple[float | None, ...], ...]
    predicted: tuple[float | None, ...]


@dataclass(frozen=True)
class PredictionError:
    """The predicted loss curve against the replicas' mean.

    Args:
        step: Where they are compared: when the mean loss has fallen by a quarter, or at the end.
        predicted_change: Predicted change of the loss up to there, around the measured mean path where that is known.
        quadratic_change: The same from the quadratic model at the start alone.
        measured_change: Mean change of the replicas.
        stderr: Its standard error.
    """

    step: int
    predicted_change: float
    quadratic_change: float
    measured_change: float
    stderr: float | None

    @property
    def relative(self) -> float | None:
        """Error relative to the measured change."""
        if self.measured_change == 0:
            return None
        return abs(self.predicted_change - self.measured_change) / abs(self.measured_change)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "step": self.step,
            "predicted_change": number(self.predicted_change),
            "quadratic_change": number(self.quadratic_change),
            "measured_change": number(self.measured_change),
            "stderr": number(self.stderr),
            "relative": number(self.relative),
        }


@dataclass(frozen=True)
class ProbeRun:
    """All replicas at one step size.

    Args:
        lr: Step size.
        ratio: To the probed threshold.
        side: Which side of it.
        variant: ``frozen`` or ``adaptive`` P for Adam; the order of the method otherwise.
        rate_predicted: Growth rate ρ of the mean square, per step; not known with mini-batches.
        growth_predicted: ``ρ^steps``.
        steps: Steps asked for.
        steps_done: Steps that the slowest surviving replica reached.
        replicas: Number of replicas.
        diverged: How many left the valley or rose to twice the loss.
        left_at: The median step at which they did.
        loss_start: Loss at the start.
        loss_end: Mean loss of the replicas that stayed, at the end; ``None`` when none did.
        verdict: What happened.
        as_predicted: Whether that is what the threshold says; ``None`` where the run does not count.
        reason: One sentence on the verdict.
        prediction: The predicted loss curve against the measured one.
        end: The curvature at the end.
        curves: Loss and distance over the steps.
        seconds: Wall time.
    """

    lr: float
    ratio: float
    side: Literal["below", "above"]
    variant: Variant
    rate_predicted: float | None
    growth_predicted: float | None
    steps: int
    steps_done: int
    replicas: int
    diverged: int
    left_at: float | None
    loss_start: float
    loss_end: float | None
    verdict: RunVerdict
    as_predicted: bool | None
    reason: str
    prediction: PredictionError | None
    end: EndState | None
    curves: Curves = field(repr=False)
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "lr": self.lr,
            "ratio": number(self.ratio),
            "side": self.side,
            "variant": self.variant,
            "rate_predicted": number(self.rate_predicted),
            "growth_predicted": number(self.growth_predicted),
            "steps": self.steps,
            "steps_done": self.steps_done,
            "replicas": self.replicas,
            "diverged": self.diverged,
            "left_at": number(self.left_at),
            "loss_start": number(self.loss_start),
            "loss_end": number(self.loss_end),
            "verdict": self.verdict,
            "as_predicted": self.as_predicted,
            "reason": self.reason,
            "prediction": None if self.prediction is None else self.prediction.to_dict(),
            "end": None if self.end is None else self.end.to_dict(),
            "seconds": number(self.seconds),
        }
