"""What is known at one point of a run: a line of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from zoscope.analysis.optimizer_bounds import number


@dataclass(frozen=True)
class Record:
    """One measurement. Numbers that are not defined or not finite are ``None``.

    Curvature is that of the operator that the optimizer acts through: H in loss/param², for Adam ``P⁻¹H``.
    ``lower``, ``upper`` and ``threshold`` share its unit, so that the edge of stability is
    ``lower ≤ threshold ≤ upper``.

    Args:
        step: Steps done.
        loss: Loss over all examples.
        loss_mean: Mean of the losses seen at every step since the measurement before.
        loss_max: Largest of them.
        metrics: The problem's own metrics.
        lr: Step size that led here.
        lr_next: Step size of the next step.
        grad_norm: ``‖g‖``, loss/param.
        operator: ``hessian``, ``ggn``, or one of them after ``preconditioned_``.
        trace: ``Tr``.
        trace_stderr: Its standard error.
        trace_positive: Sum of the positive eigenvalues.
        lambda_max: Largest eigenvalue.
        lambda_max_residual: Some eigenvalue lies within this distance of it.
        lambda_max_converged: Whether that is at most 1 %.
        lambda_min: Smallest eigenvalue.
        lambda_min_residual: Likewise.
        lambda_min_converged: Likewise.
        frobenius_sq: ``‖·‖_F²``.
        frobenius_sq_stderr: Its standard error.
        lower: The paper's lower term, ``Tr``; for first-order optimizers ``λ_max``.
        upper: The paper's upper term, ``Tr + 2λ_max`` for ZO-GD; for first-order optimizers ``λ_max``.
        threshold: What the step size allows: ``2/η`` for ZO-GD and GD, ``2(1−β)/η`` for ZO-GDM, ``2(1+β)/η`` for GDM.
        exact: Largest stable step size η* in infinite time, of the positive part; 2/λ_max and the like for first order.
        exact_ci95: Its 95 % interval.
        ratio: ``lr / exact``.
        horizon: η* of the steps that remain: with all eigenvalues, with the positive ones; zeroth order only.
        blow_up: Steps until ``lr_next`` is no longer stable, with all and with the positive eigenvalues; zeroth order
            only; ``None`` for never.
        precision: Relative 95 % half-width reached, the larger one of trace and exact threshold.
        method: How the spectrum was measured.
        num_hvps: Hessian-vector products spent.
        preconditioner: Smallest, median and largest entry of Adam's P, or of that of step sizes by parameter group.
        commutator: ``‖PH−HP‖_F/‖PH‖_F``.
        forward: What the loss values of the last steps say by themselves (``zoscope.ForwardMonitor``), if asked for:
            ``trace`` with ``trace_stderr``, ``lower`` and ``upper`` end of the threshold, ``ratio`` and so on.
    """

    step: int
    loss: float | None
    loss_mean: float | None = None
    loss_max: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    lr: float = 0.0
    lr_next: float = 0.0
    grad_norm: float | None = None
    operator: str = "hessian"
    trace: float | None = None
    trace_stderr: float | None = None
    trace_positive: float | None = None
    lambda_max: float | None = None
    lambda_max_residual: float | None = None
    lambda_max_converged: bool | None = None
    lambda_min: float | None = None
    lambda_min_residual: float | None = None
    lambda_min_converged: bool | None = None
    frobenius_sq: float | None = None
    frobenius_sq_stderr: float | None = None
    lower: float | None = None
    upper: float | None = None
    threshold: float | None = None
    exact: float | None = None
    exact_ci95: tuple[float | None, float | None] | None = None
    ratio: float | None = None
    horizon: tuple[float | None, float | None] | None = None
    blow_up: tuple[float | None, float | None] | None = None
    precision: float | None = None
    method: str | None = None
    num_hvps: int = 0
    preconditioner: tuple[float, float, float] | None = None
    commutator: float | None = None
    forward: Mapping[str, float | None] | None = None

    @property
    def in_band(self) -> bool | None:
        """Whether the threshold term lies in ``[0.9 lower, 1.1 upper]``; ``None`` where a term is not known."""
        if self.lower is None or self.upper is None or self.threshold is None:
            return None
        return 0.9 * self.lower <= self.threshold <= 1.1 * self.upper

    @property
    def reaches_edge(self) -> bool:
        """Whether the curvature has risen to what the step size allows: ``threshold ≤ 1.1 upper``."""
        return self.threshold is not None and self.upper is not None and self.threshold <= 1.1 * self.upper

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; never NaN or Infinity."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Record:
        """What ``to_dict`` wrote; keys of newer versions are left out."""
        known = {entry.name for entry in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**{key: value for key, value in values.items() if key in known})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
