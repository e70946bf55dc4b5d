import numpy as np
import pytest
import torch

from zoscope import NumericalError
from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.preconditioner import expected_preconditioner, probe_preconditioner
from zoscope.theory.rules import GAUSSIAN, estimator_moments


def rotated(eigenvalues: torch.Tensor, *, seed: int) -> torch.Tensor:
    noise = torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(seed)).double()
    basis = torch.linalg.qr(noise)[0]
    return basis @ torch.diag(eigenvalues) @ basis.T


def positive_diagonal(size: int, *, spread: float, seed: int) -> torch.Tensor:
    return 1 + spread * torch.rand(size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("queries", [1, 4])
def test_the_expected_preconditioner_is_the_root_mean_square_of_estimates(queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.tensor([3.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    u = torch.randn(400_000, queries, 4, generator=generator, dtype=torch.float64)
    estimates = ((u @ g)[..., None] * u).mean(dim=1)
    squares = estimates.square()
    found = expected_preconditioner(g, moments=estimator_moments(queries=queries), eps=0.0).diagonal
    error = squares.std(dim=0) / len(u) ** 0.5
    assert ((squares.mean(dim=0) - found.square()).abs() < 4 * error).all()


def test_a_vanishing_gradient_collapses_the_preconditioner_to_epsilon() -> None:
    found = expected_preconditioner(torch.zeros(3).double(), moments=GAUSSIAN, eps=1e-8)
    assert found.collapsed == 1.0
    assert torch.equal(found.diagonal, torch.full((3,), 1e-8, dtype=torch.float64))


def test_a_healthy_gradient_does_not_collapse() -> None:
    assert expected_preconditioner(torch.ones(3).double(), moments=GAUSSIAN, eps=1e-8).collapsed == 0.0


def test_a_preconditioner_of_zeros_is_refused() -> None:
    with pytest.raises(NumericalError, match="raise --eps"):
        expected_preconditioner(torch.zeros(3).double(), moments=GAUSSIAN, eps=0.0)


def test_coordinate_vectors_give_commutator_and_trace_exactly() -> None:
    h = rotated(torch.logspace(-2, 1, 20).double(), seed=1)
    p = positive_diagonal(20, spread=2.0, seed=2)
    found = probe_preconditioner(DenseOperator(h), p, generator=torch.Generator())
    big = torch.diag(p)
    commutator = torch.linalg.matrix_norm(big @ h - h @ big) / torch.linalg.matrix_norm(big @ h)
    assert found.commutator.value == pytest.approx(float(commutator), rel=1e-12)
    assert found.commutator.stderr == 0
    trace = found.shift * float((h.diagonal() / p).sum()) + found.trace_correction.value
    assert trace == pytest.approx(float((h.diagonal() / p.square()).sum()), rel=1e-12)


def test_probe_vectors_estimate_commutator_and_trace_within_their_error() -> None:
    h = rotated(torch.linspace(-1, 3, 200).double(), seed=1)
    p = positive_diagonal(200, spread=0.5, seed=2)
    big, scores = torch.diag(p), []
    commutator = float(torch.linalg.matrix_norm(big @ h - h @ big) / torch.linalg.matrix_norm(big @ h))
    trace = float((h.diagonal() / p.square()).sum())
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = probe_preconditioner(DenseOperator(h), p, generator=generator, probes=16)
        estimate = found.shift * float((h.diagonal() / p).sum()) + found.trace_correction.value
        scores.append((found.commutator.value - commutator) / found.commutator.stderr)
        scores.append((estimate - trace) / found.trace_correction.stderr)
    assert np.abs(scores).max() < 5
    assert np.abs(scores).mean() < 1.5


def test_a_multiple_of_the_identity_commutes() -> None:
    operator = DenseOperator(rotated(torch.linspace(-1, 3, 100).double(), seed=3))
    found = probe_preconditioner(operator, torch.full((100,), 0.3).double(), generator=torch.Generator().manual_seed(0))
    assert found.commutator.value == 0
    assert found.trace_correction.value == pytest.approx(0, abs=1e-12)


def test_two_products_per_probe_vector_are_spent() -> None:
    operator = DenseOperator(torch.eye(100).double())
    probe_preconditioner(operator, torch.ones(100).double(), generator=torch.Generator().manual_seed(0), probes=4)
    assert operator.num_hvps == 8
