"""What of the gradient the descent threshold depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zoscope.theory.descent import descent_threshold_adam
from zoscope.theory.spectrum import Estimate

if TYPE_CHECKING:
    from zoscope.theory.moments import EstimatorMoments
    from zoscope.theory.rules import UpdateRule


@dataclass(frozen=True)
class Slope:
    """What the descent threshold depends on, P being the identity for gradient descent.

    Args:
        gPg: ``gᵀP⁻¹g``.
        gPHPg: ``gᵀP⁻¹HP⁻¹g``.
        trace: ``Tr P⁻¹HP⁻¹``.
        grad_sq: ``‖g‖²``.
        trace_error: 95 % half-width of ``trace``; the other numbers are as exact as the gradient.
    """

    gPg: float  # noqa: N815 - as in the formula
    gPHPg: float  # noqa: N815
    trace: float
    grad_sq: float
    trace_error: float = 0.0

    def estimate(self, rule: UpdateRule, moments: EstimatorMoments) -> Estimate:
        """The descent threshold with its error bar; it falls as the trace rises."""
        value, low, high = (
            replace(self, trace=self.trace + sign * self.trace_error).threshold(rule, moments) for sign in (0, 1, -1)
        )
        if math.isfinite(high) or math.isinf(low):
            return Estimate(value, quadrature=value - low if math.isfinite(value) else 0.0)  # to first order symmetric
        return Estimate(value, quadrature=math.inf, least=low)  # the trace may be too small to limit anything

    def threshold(
        self, rule: UpdateRule, moments: EstimatorMoments, *, noise_curvature: float = 0.0, noise_sq: float = 0.0
    ) -> float:
        """The descent threshold, with the noise of mini-batches if there is any."""
        return descent_threshold_adam(
            gPg=self.gPg,
            gPHPg=self.gPHPg,
            trace_php=self.trace,
            grad_sq=self.grad_sq,
            noise_curvature=noise_curvature,
            noise_sq=noise_sq,
            moments=moments,
            rule=rule,
        )
