"""Trace, norm and λ_max alone, against matrices whose eigenvalues are known."""

import math

import numpy as np
import pytest
import torch

from zoscope.curvature.linear import DenseOperator
from zoscope.curvature.moments import _off, _Search, measure_moments

EIGENVALUES = {
    "outliers": np.concatenate([20 / 1.4 ** np.arange(12), 0.05 * np.linspace(-1, 2, 300)]),
    "indefinite": np.concatenate([[9.0, 7.0, -6.0], np.linspace(-1, 1.6, 300)]),
    "flat": np.linspace(0.5, 1.5, 300),
}


def rotated(eigenvalues: np.ndarray, seed: int = 0) -> DenseOperator:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    return DenseOperator(q @ torch.diag(torch.from_numpy(eigenvalues)) @ q.T)


@pytest.mark.parametrize("name", EIGENVALUES)
def test_moments_are_within_their_intervals_as_often_as_those_say(name: str) -> None:
    values = EIGENVALUES[name]
    operator = rotated(values)
    truth = {"trace": values.sum(), "frobenius_sq": (values**2).sum()}
    missed = dict.fromkeys(truth, 0)
    for seed in range(60):
        found = measure_moments(operator, trace_rtol=0.05, frobenius_rtol=0.05, seed=seed)
        for key, value in truth.items():
            missed[key] += abs(getattr(found, key).value - value) > getattr(found, key).half_width
    # 3 of 60 expected; 9 or more in one case in a thousand.
    assert max(missed.values()) < 9


@pytest.mark.parametrize("name", ["outliers", "indefinite"])
def test_largest_eigenvalue_is_found(name: str) -> None:
    values = EIGENVALUES[name]
    found = measure_moments(rotated(values))
    assert found.lambda_max.converged
    assert found.lambda_max.value == pytest.approx(values.max(), abs=max(found.lambda_max.residual, 1e-9))


def test_the_precision_asked_for_is_reached() -> None:
    found = measure_moments(rotated(EIGENVALUES["outliers"]), trace_rtol=0.01, frobenius_rtol=0.03)
    assert found.trace.half_width <= 0.01 * found.trace.value
    assert found.frobenius_sq.half_width <= 0.03 * found.frobenius_sq.value
    assert found.num_hvps < 150


def test_probes_follow_a_growing_space_without_products() -> None:
    operator = rotated(EIGENVALUES["indefinite"])
    search = _Search(operator, seed=3, most=40)
    search.extend(5)
    search.draw(4)
    spent = operator.num_hvps
    before = search._free.clone()
    search.extend(10)
    assert operator.num_hvps == spent + 10
    basis = search._basis[: search.steps]
    free = _off(before, basis)
    assert torch.allclose(search._free, free, atol=1e-10)
    assert torch.allclose(search._images, _off(operator.matmat(free), basis), atol=1e-9)


def test_trace_and_norm_of_the_space_and_of_the_rest_add_up() -> None:
    values = EIGENVALUES["indefinite"]
    operator = rotated(values)
    search = _Search(operator, seed=0, most=40)
    search.extend(17)
    q = search._basis[:17]
    p = torch.eye(len(values), dtype=torch.float64) - q.T @ q
    rest = p @ operator.dense() @ p
    betas = search._betas
    inside = sum(a * a for a in search._alphas) + 2 * sum(b * b for b in betas)
    assert sum(search._alphas) + float(rest.trace()) == pytest.approx(values.sum(), rel=1e-10)
    assert inside + float(rest.square().sum()) == pytest.approx((values**2).sum(), rel=1e-10)


def test_a_matrix_of_low_rank_is_known_exactly() -> None:
    values = np.concatenate([[5.0, 3.0, 1.0], np.zeros(60)])
    found = measure_moments(rotated(values))
    assert found.trace.value == pytest.approx(9.0, rel=1e-8)
    assert found.frobenius_sq.value == pytest.approx(35.0, rel=1e-8)
    assert found.lambda_max.value == pytest.approx(5.0)


def test_the_budget_is_kept() -> None:
    found = measure_moments(rotated(EIGENVALUES["flat"]), trace_rtol=1e-6, max_hvps=40)
    assert found.num_hvps <= 40


def test_what_makes_no_sense_is_refused() -> None:
    operator = rotated(EIGENVALUES["flat"])
    with pytest.raises(ValueError, match="tolerances"):
        measure_moments(operator, trace_rtol=0.0)
    with pytest.raises(ValueError, match="at least 20"):
        measure_moments(operator, max_hvps=5)
    assert math.isfinite(measure_moments(operator).trace.value)
