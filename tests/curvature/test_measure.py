import numpy as np
import pytest
import torch

from zoscope import NumericalError, UsageError
from zoscope.curvature.operators import DenseOperator
from zoscope.curvature.slq import measure

from .matrices import network_like, rotated


def operator(eigenvalues, *, seed=0, dtype=torch.float64):
    return DenseOperator(rotated(torch.as_tensor(eigenvalues), seed=seed).to(dtype))


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
def test_the_ends_are_the_algebraic_ones(method):
    found = measure(operator([1.0, -5.0, 2.0]), method=method)
    assert found.lambda_max.value == pytest.approx(2.0, rel=1e-10)
    assert found.lambda_min.value == pytest.approx(-5.0, rel=1e-10)
    assert found.lambda_max.converged
    assert found.lambda_min.converged


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
def test_a_known_spectrum_gives_its_moments(method):
    found = measure(operator([4.0, 3.0, -1.0, 0.0]), method=method)
    assert found.trace.value == pytest.approx(6.0)
    assert found.frobenius_sq.value == pytest.approx(26.0)
    assert found.trace_positive.value == pytest.approx(7.0)
    assert found.negative_mass == pytest.approx(1.0)
    assert found.effective_rank == pytest.approx(49 / 25)
    assert found.trace.half_width == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_multiple_of_the_identity_is_measured_exactly(method, value):
    found = measure(DenseOperator(value * torch.eye(900)), method=method, max_hvps=1000)
    assert found.trace.value == pytest.approx(900 * value, rel=1e-5)
    assert found.lambda_max.value == pytest.approx(value, rel=1e-5)
    assert found.effective_rank == pytest.approx(900 if value else 0, rel=1e-5)


def test_a_matrix_of_low_rank_is_measured_exactly():
    eigenvalues = torch.zeros(800).double()
    eigenvalues[:3] = torch.tensor([7.0, 2.0, 1.0])
    found = measure(operator(eigenvalues), method="deflated-slq")
    assert found.trace.value == pytest.approx(10.0, rel=1e-6)
    assert found.num_hvps < 40


def test_small_problems_are_dense_and_large_ones_are_sampled():
    assert measure(operator(network_like(size=50)), max_hvps=100).method == "dense"
    assert measure(operator(network_like(size=300)), max_hvps=100).method == "deflated-slq"


@pytest.mark.parametrize("budget", [20, 40, 100])
def test_the_budget_is_respected(budget):
    found = measure(operator(network_like()), method="deflated-slq", rtol=1e-6, max_hvps=budget)
    assert found.num_hvps <= budget


def test_a_budget_too_small_for_an_error_bar_is_refused():
    with pytest.raises(UsageError, match="--max-hvps 7"):
        measure(operator(network_like()), method="deflated-slq", max_hvps=7)


def test_products_are_spent_until_the_precision_wanted_is_reached():
    def precision(spectrum):
        return spectrum.trace_of(lambda x: x).half_width / abs(spectrum.trace_of(lambda x: x).value)

    op = operator(network_like())
    loose = measure(op, method="deflated-slq", precision=precision, rtol=0.05, max_hvps=5000)
    tight = measure(op, method="deflated-slq", precision=precision, rtol=0.003, max_hvps=5000)
    assert precision(loose.spectrum) <= 0.05
    assert precision(tight.spectrum) <= 0.003
    assert loose.num_hvps < tight.num_hvps < 5000


def test_a_seed_fixes_the_result_and_another_changes_it():
    op = operator(network_like(), dtype=torch.float32)
    first, same, other = (measure(op, method="deflated-slq", seed=seed).trace.value for seed in (0, 0, 1))
    assert first == same != other


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    measure(operator(network_like()), method="deflated-slq")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
def test_the_measure_of_a_vector_has_its_first_moments(method):
    op = operator(network_like())
    vector = torch.randn(op.dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = measure(op, method=method, vector=vector).vector_measure
    assert found.weights.sum() == pytest.approx(float(vector @ vector))
    assert found.trace == pytest.approx(float(vector @ op.dense() @ vector), rel=1e-9)
    assert found.frobenius_sq == pytest.approx(float((op.dense() @ vector).square().sum()), rel=1e-9)


def test_a_zero_vector_has_an_empty_measure():
    op = operator(network_like(size=30))
    assert measure(op, vector=torch.zeros(op.dim).double()).vector_measure.nodes.size == 0


def test_little_memory_shortens_the_chain_and_says_so(monkeypatch):
    monkeypatch.setattr("zoscope.curvature.lanczos.available_memory", lambda device: 250_000)
    found = measure(operator(network_like()), method="deflated-slq")
    assert any("fewer outliers are deflated" in note for note in found.notes)
    truth = float(network_like().sum())
    assert abs(found.trace.value - truth) < 3 * found.trace.half_width


def test_a_matrix_too_large_for_memory_is_refused_before_any_product(monkeypatch):
    monkeypatch.setattr("zoscope.curvature.operators.available_memory", lambda device: 10_000)
    op = operator(network_like(size=60))
    with pytest.raises(UsageError, match=r"--method dense.*GiB.*deflated-slq"):
        measure(op, method="dense")
    assert op.num_hvps == 0


@pytest.mark.parametrize("method", ["dense", "deflated-slq"])
def test_second_derivatives_that_are_not_finite_are_an_error(method):
    matrix = torch.eye(20)
    matrix[3, 3] = float("inf")
    with pytest.raises(NumericalError, match="finite"):
        measure(DenseOperator(matrix), method=method)


@pytest.mark.parametrize("arguments", [{"rtol": 0.0}, {"rtol": float("nan")}, {"max_hvps": 0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        measure(operator([1.0, 2.0]), **arguments)


def test_progress_tells_stage_products_and_precision():
    seen = []
    measure(operator(network_like()), method="deflated-slq", on_progress=lambda *args: seen.append(args))
    assert seen[0][0] == "outliers"
    assert seen[-1][0] == "bulk"
    assert np.all(np.diff([count for _, count, _ in seen]) >= 0)
