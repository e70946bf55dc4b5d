"""What of the gradient the descent threshold depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoscope.theory.descent import descent_threshold_adam

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
    """

    gPg: float  # noqa: N815 - as in the formula
    gPHPg: float  # noqa: N815
    trace: float
    grad_sq: float

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
