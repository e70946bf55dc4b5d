import numpy as np
import pytest
import torch

from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.slq import measure

from .matrices import network_like, rotated

SIZES = (5, 300, 1, 151, 250)
EIGENVALUES = network_like(negative=0.4)


def layered(*, seed: int) -> torch.Tensor:
    """Layers of different curvature, coupled."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.cat([torch.full((size,), 2.0**-index) for index, size in enumerate(SIZES)]).double()
    coupled = rotated(EIGENVALUES, seed=seed) * scale * scale[:, None]
    noise = torch.rand(sum(SIZES), generator=generator, dtype=torch.float64)
    return coupled + torch.diag(0.1 * noise * scale)


def true_traces(matrix: torch.Tensor) -> np.ndarray:
    return np.array([float(part.sum()) for part in matrix.diagonal().split(SIZES)])


def sampled(matrix: torch.Tensor, **options):
    return measure(DenseOperator(matrix), method="deflated-slq", blocks=SIZES, **options)


def test_blocks_of_a_dense_matrix_are_exact():
    matrix = layered(seed=0)
    found = measure(DenseOperator(matrix), method="dense", blocks=SIZES).block_traces
    np.testing.assert_allclose([block.value for block in found], true_traces(matrix), rtol=1e-12)
    assert not any(block.half_width for block in found)


@pytest.mark.parametrize("max_hvps", [20, 40, 200])
def test_blocks_add_up_to_the_trace(max_hvps):
    found = sampled(layered(seed=1), max_hvps=max_hvps)
    total = sum(block.value for block in found.block_traces)
    assert total == pytest.approx(found.trace.value, rel=1e-9)


def test_blocks_take_no_further_product():
    matrix = layered(seed=2)
    plain = measure(DenseOperator(matrix), method="deflated-slq")
    found = sampled(matrix)
    assert found.num_hvps == plain.num_hvps
    assert found.trace == plain.trace


def test_error_bars_of_blocks_cover_and_are_not_idle():
    matrix = layered(seed=3)
    errors, widths = [], []
    for seed in range(40):
        found = sampled(matrix, max_hvps=80, seed=seed).block_traces
        errors.append(np.array([block.value for block in found]) - true_traces(matrix))
        widths.append([block.half_width for block in found])
    covered = np.abs(errors) <= np.array(widths)
    assert covered.mean(axis=0).min() >= 0.85  # 40 seeds: two standard errors below 95 %
    assert covered.mean() >= 0.93
    spread = np.sqrt(np.mean(np.square(errors), axis=0))
    assert np.all(np.mean(widths, axis=0) < 1.96 * 2.2 * spread)  # √2 from the bound, the rest from Student and chance


def test_deflation_accounts_for_a_residual_exactly():
    """A few steps leave large residuals; with the whole complement sampled nothing else is missing."""
    errors = []
    matrix = layered(seed=4)
    for seed in range(60):
        found = sampled(matrix, max_hvps=40, rtol=10.0, seed=seed).block_traces
        errors.append(np.array([block.value for block in found]) - true_traces(matrix))
    mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0)
    assert np.all(np.abs(mean) <= 3.5 * spread / 60**0.5)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_multiple_of_the_identity_has_scattering_blocks_of_a_certain_sum(value):
    found = measure(DenseOperator(value * torch.eye(900).double()), method="deflated-slq", blocks=[100, 800])
    first, second = found.block_traces
    assert first.value + second.value == pytest.approx(900 * value)
    assert abs(first.value - 100 * value) <= 1.5 * first.half_width


def test_an_operator_of_low_rank_has_exact_blocks():
    eigenvalues = torch.zeros(sum(SIZES)).double()
    eigenvalues[:4] = torch.tensor([7.0, -2.0, 1.0, 0.1])
    matrix = rotated(eigenvalues, seed=0)
    found = sampled(matrix).block_traces
    np.testing.assert_allclose([block.value for block in found], true_traces(matrix), atol=1e-8)


def test_blocks_of_another_size_are_refused():
    with pytest.raises(ValueError, match="add up to the dimension 707"):
        measure(DenseOperator(layered(seed=0)), blocks=[3, 4])


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
def test_the_largest_eigenvalues_converge_on_request(method):
    matrix = rotated(EIGENVALUES, seed=0)
    exact = torch.linalg.eigvalsh(matrix).numpy()
    found = measure(DenseOperator(matrix), method=method, top=8, rtol=0.5, max_hvps=1000).ritz
    assert all(ritz.converged for ritz in found[-8:])
    np.testing.assert_allclose([ritz.value for ritz in found[-8:]], exact[-8:], rtol=1e-3)
    for ritz in found:
        assert np.abs(exact - ritz.value).min() <= ritz.residual + 1e-9
