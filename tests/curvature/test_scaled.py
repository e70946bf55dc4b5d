"""The spectrum behind a preconditioner that is nearly a number, against the dense one."""

import numpy as np
import pytest
import torch

from zoscope.curvature.operators import DenseOperator, Preconditioned
from zoscope.curvature.preconditioner import divided, nearly_scalar
from zoscope.curvature.slq import measure
from zoscope.theory.rules import update_rule
from zoscope.theory.stability import StabilityCondition


def problem(spread: float):
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.cat([torch.linspace(-1.0, 1.0, 80), torch.tensor([30.0, 12.0, 5.0])]).double()
    q, _ = torch.linalg.qr(torch.randn(83, 83, generator=generator, dtype=torch.float64))
    h = (q * eigenvalues) @ q.T
    p = 0.25 * (1.0 + spread) ** (2.0 * torch.rand(83, generator=generator, dtype=torch.float64) - 1.0)
    return 0.5 * (h + h.T), p


@pytest.mark.parametrize("spread", [0.0, 0.005, 0.05])
def test_every_number_is_that_of_the_preconditioned_matrix_within_its_error(spread: float) -> None:
    h, p = problem(spread)
    by, found_spread = nearly_scalar(p)
    vector = torch.ones(83, dtype=torch.float64)
    found = divided(measure(DenseOperator(h), method="dense", vector=vector), by=by, spread=found_spread)
    exact = measure(Preconditioned(DenseOperator(h), p), method="dense", vector=vector / p.sqrt())
    for name in ("trace", "frobenius_sq", "trace_positive"):
        mine, truth = getattr(found, name), getattr(exact, name).value
        assert abs(mine.value - truth) <= mine.half_width + 1e-10 * abs(truth), name
    for name in ("lambda_max", "lambda_min"):
        mine, truth = getattr(found, name), getattr(exact, name).value
        assert abs(mine.value - truth) <= mine.residual + 1e-10 * abs(truth), name
    condition = StabilityCondition(update_rule("adam"))
    threshold = condition.estimate(found.spectrum)
    assert abs(threshold.value - condition.threshold(exact.spectrum.fine)) <= threshold.half_width + 1e-12
    assert found.num_hvps == 0
    assert float(found.vector_measure.weights.sum()) == pytest.approx(
        float(exact.vector_measure.weights.sum()), rel=2.1 * found_spread + 1e-12
    )


def test_the_error_grows_with_the_spread_and_vanishes_without() -> None:
    h, _ = problem(0.0)
    base = measure(DenseOperator(h), method="dense")
    widths = [divided(base, by=0.5, spread=spread).trace.half_width for spread in (0.0, 0.001, 0.01)]
    assert widths[0] == 0.0
    assert np.diff(widths).min() > 0
