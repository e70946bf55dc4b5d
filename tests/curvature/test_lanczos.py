import numpy as np
import pytest
import torch

from zoscope import NumericalError
from zoscope.curvature.lanczos import Chain, Jacobi, Recurrences, project_out
from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.slq import measure, ritz_values

from .matrices import rotated

SPECTRUM = torch.cat([torch.tensor([50.0, 20.0, -8.0]), torch.linspace(-1, 2, 57)]).double()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain_of(eigenvalues: torch.Tensor, *, steps: int, seed: int = 0) -> Chain:
    operator = DenseOperator(rotated(eigenvalues, seed=7))
    chain = Chain(operator, normal(len(eigenvalues), seed=seed), capacity=steps)
    chain.extend(steps)
    return chain


def test_a_full_chain_finds_every_eigenvalue():
    values, _ = chain_of(SPECTRUM, steps=60).jacobi.eigh()
    np.testing.assert_allclose(values, np.sort(SPECTRUM.numpy()), atol=1e-10)


def test_the_last_off_diagonal_bounds_the_error_of_ritz_values():
    jacobi = chain_of(SPECTRUM, steps=12).jacobi
    values, vectors = jacobi.eigh()
    residuals = jacobi.betas[-1] * np.abs(vectors[-1])
    distance = np.abs(values[:, None] - SPECTRUM.numpy()).min(axis=1)
    assert (distance <= residuals + 1e-12).all()


def test_a_chain_extended_in_pieces_is_the_chain_run_at_once():
    whole = chain_of(SPECTRUM, steps=20).jacobi
    operator = DenseOperator(rotated(SPECTRUM, seed=7))
    pieces = Chain(operator, normal(60), capacity=20)
    for _ in range(4):
        pieces.extend(5)
    np.testing.assert_allclose(pieces.jacobi.alphas, whole.alphas, rtol=1e-12)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_a_chain_ends_where_its_krylov_space_is_invariant(distinct):
    eigenvalues = torch.arange(1, distinct + 1).repeat_interleave(6).double()
    chain = chain_of(eigenvalues, steps=20)
    assert chain.exhausted
    assert chain.jacobi.size == distinct
    np.testing.assert_allclose(chain.jacobi.eigh()[0], np.arange(1, distinct + 1), atol=1e-10)


def test_a_zero_operator_ends_a_chain_after_one_step():
    chain = Chain(DenseOperator(torch.zeros(5, 5)), torch.ones(5), capacity=4)
    chain.extend(4)
    assert chain.exhausted
    assert chain.jacobi.alphas.tolist() == [0.0]


def test_combinations_of_the_basis_are_ritz_vectors():
    chain = chain_of(SPECTRUM, steps=40)
    values, vectors = chain.jacobi.eigh()
    top = chain.combine(vectors[:, -2:])
    matrix = rotated(SPECTRUM, seed=7)
    torch.testing.assert_close(top @ top.T, torch.eye(2).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(top @ matrix, torch.tensor(values[-2:])[:, None] * top, atol=1e-6, rtol=0)


def test_recurrences_are_chains_on_the_deflated_operator():
    matrix = rotated(SPECTRUM, seed=7)
    deflated = torch.linalg.eigh(matrix)[1][:, -2:].T.contiguous()
    starts = project_out(normal(3, 60, seed=1), deflated)
    projector = torch.eye(60).double() - deflated.T @ deflated
    found = Recurrences(DenseOperator(matrix), starts, deflated=deflated).extend(4).extend(2).jacobis()
    for start, jacobi in zip(starts, found, strict=True):
        expected = Chain(DenseOperator(projector @ matrix @ projector), start, capacity=6)
        expected.extend(6)
        np.testing.assert_allclose(jacobi.alphas, expected.jacobi.alphas, atol=1e-9)
        np.testing.assert_allclose(jacobi.betas, expected.jacobi.betas, atol=1e-9)


def test_each_recurrence_ends_by_itself():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, 4.0])).double()
    starts = torch.eye(6).double()[[0, 3]] + torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).double()
    deflated = torch.empty(0, 6).double()
    first, second = Recurrences(DenseOperator(matrix), starts, deflated=deflated).extend(5).jacobis()
    assert (first.size, second.size) == (1, 3)
    np.testing.assert_allclose(second.eigh()[0], [2, 3, 4], atol=1e-12)


def test_a_product_that_is_not_finite_is_an_error_with_its_remedy():
    matrix = torch.eye(4)
    matrix[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="not finite although the loss is"):
        Chain(DenseOperator(matrix), torch.ones(4), capacity=2).extend(2)


def test_the_head_of_a_tridiagonal_matrix_is_the_shorter_chain():
    jacobi = chain_of(SPECTRUM, steps=10).jacobi
    shorter = chain_of(SPECTRUM, steps=4).jacobi
    assert isinstance(jacobi.head(4), Jacobi)
    np.testing.assert_allclose(jacobi.head(4).betas, shorter.betas)


@pytest.mark.parametrize("scale", [1e-20, 1e25, 1e30])
def test_curvature_whose_square_does_not_fit_into_float32(scale):
    one, scaled = (
        measure(DenseOperator(torch.diag(s * torch.linspace(0.1, 1, 30))), method="deflated-slq", max_hvps=60, seed=0)
        for s in (1.0, scale)
    )
    assert scaled.trace.value == pytest.approx(scale * one.trace.value, rel=1e-4)
    assert scaled.lambda_max.value == pytest.approx(scale * one.lambda_max.value, rel=1e-4)


def test_a_float32_chain_of_millions_of_entries_stays_orthogonal_and_finds_no_negative_eigenvalue():
    size = 2_000_000
    values = torch.rand(size, generator=torch.Generator().manual_seed(1)) * 1e-3
    values[:20] = torch.linspace(100, 1000, 20)

    class Diagonal(DenseOperator):
        def matmat(self, vectors):
            return vectors * values

    operator = Diagonal(torch.eye(2))
    operator.dim = size
    chain = Chain(operator, torch.randn(size, generator=torch.Generator().manual_seed(0)), capacity=20)
    chain.extend(18)
    basis = chain.combine(np.eye(18)).double()
    assert (basis @ basis.T - torch.eye(18)).abs().max() < 1e-4  # 1e-3 where sums are in float32
    smallest = ritz_values(chain.jacobi, dtype=torch.float32)[0]
    assert smallest.value > -smallest.residual
    assert not smallest.converged
