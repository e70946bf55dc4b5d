"""Trace and norm beyond a Krylov space."""

import numpy as np
import pytest
import torch

from zoscope import NumericalError
from zoscope.curvature.lanczos import Chain
from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.slq import DeflatedHutchinson, exact_part

from .matrices import network_like, rotated

MATRIX = rotated(network_like(size=300, negative=0.4), seed=2)
DIM = len(MATRIX)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=MATRIX.dtype)


def chain_of(steps: int) -> Chain:
    chain = Chain(DenseOperator(MATRIX), normal(DIM, seed=0), capacity=steps)
    chain.extend(steps)
    return chain


def projector(chain: Chain) -> torch.Tensor:
    basis = chain.combine(np.eye(chain.jacobi.size))
    return torch.eye(DIM, dtype=MATRIX.dtype) - basis.T @ basis


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_what_is_not_sampled_is_exact(steps):
    chain = chain_of(steps)
    trace, square = exact_part(chain.jacobi)
    p = projector(chain)
    rest = p @ MATRIX @ p
    assert trace + float(rest.trace()) == pytest.approx(float(MATRIX.trace()), rel=1e-9)
    assert square + float(rest.square().sum()) == pytest.approx(float(MATRIX.square().sum()), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_products_from_before_the_chain_are_projected_without_another(steps):
    chain, vectors = chain_of(steps), normal(3, DIM, seed=1)
    inside, products = chain.beyond(vectors, vectors @ MATRIX)
    p = projector(chain)
    torch.testing.assert_close(inside, vectors @ p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(products, vectors @ p @ MATRIX @ p, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [4, 40])
def test_errors_are_those_of_many_draws(count):
    chain = chain_of(10)
    exact = exact_part(chain.jacobi)
    p = projector(chain)
    found = []
    for seed in range(200):
        beyond, vectors = DeflatedHutchinson(exact, DIM - 10), normal(count, DIM, seed=100 + seed) @ p
        beyond.add(vectors, vectors @ MATRIX @ p)
        found.append((beyond.trace(), beyond.norm()))
    truths = float(MATRIX.trace()), float(MATRIX.square().sum())
    for estimates, truth in zip(zip(*found, strict=True), truths, strict=True):
        inside = sum(low <= truth <= high for low, high in (e.interval for e in estimates))
        assert inside >= 182  # P(fewer of 200) < 1 % at a true coverage of 95 %
        mean = np.mean([e.value for e in estimates])
        assert abs(mean - truth) <= 4 * np.std([e.value for e in estimates]) / np.sqrt(200)
    scatter = np.std([trace.value for trace, _ in found])
    assert np.median([trace.stderr for trace, _ in found]) == pytest.approx(scatter, rel=0.25)


def test_nothing_beyond_is_no_error():
    beyond = DeflatedHutchinson((3.0, 5.0), 10)
    beyond.add(normal(3, 12, seed=0), torch.zeros(3, 12, dtype=MATRIX.dtype))
    assert beyond.trace().interval == (3.0, 3.0)
    assert beyond.norm().interval == (5.0, 5.0)


def test_products_that_are_not_finite_are_refused():
    vectors = normal(2, 12, seed=0)
    with pytest.raises(NumericalError, match="not finite"):
        DeflatedHutchinson((3.0, 5.0), 10).add(vectors, vectors * torch.tensor([[1.0], [torch.inf]]))


def test_a_single_eigenvalue_of_which_little_is_seen_may_be_large():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    vectors[:, 0] *= 0.02
    alone = torch.zeros(1000, dtype=torch.float64)
    alone[0] = 50.0
    bulk = torch.full((1000,), 0.02, dtype=torch.float64)
    for values, found in ((alone, True), (1e-4 * alone, False), (bulk, False), (0 * alone, False)):
        beyond = DeflatedHutchinson((100.0, 4000.0), 1000)
        beyond.add(vectors, vectors * values)
        assert beyond.may_hide(0.01) is found
