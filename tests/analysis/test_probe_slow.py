"""The empirical edge against the exact threshold, where the theorem holds; fixed seeds and sample sizes."""

import numpy as np
import pytest
import torch

import zoscope
from zoscope import probe

pytestmark = pytest.mark.slow


def comparable_modes():
    generator = torch.Generator().manual_seed(0)
    lam = torch.linspace(0.5, 1.5, 120, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(120, 120, generator=generator, dtype=torch.float64))
    matrix = (basis * lam) @ basis.T
    start = torch.randn(120, generator=generator, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * x @ (matrix @ x), start)


@pytest.mark.parametrize("directions", ["gaussian", "sphere"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("optimizer", ["zo-gd", "zo-gdm", "zo-adam"])
def test_with_many_comparable_modes_the_edge_lies_within_three_percent(optimizer, queries, directions):
    result = probe(
        comparable_modes(),
        optimizer=optimizer,
        directions=directions,
        queries=queries,
        edge=True,
        edge_rtol=0.02,
        max_seconds=600,
        linearized=True,  # the same problem: it is a quadratic, and a matrix product is its fastest form
    )
    assert result.edge.found
    assert result.edge.ratio_to_exact == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("optimizer", ["gd", "gdm", "adam"])
def test_the_first_order_edge_lies_within_three_percent(optimizer):
    result = probe(comparable_modes(), optimizer=optimizer, edge=True, edge_rtol=0.02)
    assert result.edge.ratio_to_exact == pytest.approx(1.0, abs=0.03)


def test_the_predicted_loss_agrees_with_many_replicas_on_the_quadratic_model():
    result = probe(comparable_modes(), ratios=(0.3, 0.6, 0.8), steps=60, replicas=200, threshold="exact")
    for run in result.runs:
        error = run.prediction.predicted_change - run.prediction.measured_change
        assert abs(error) < 4 * run.prediction.stderr
    assert np.isfinite([run.loss_end for run in result.runs]).all()
