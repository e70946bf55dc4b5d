"""Curvature from forward passes against what is known of the function."""

import numpy as np
import pytest
import torch
from torch import nn

from zoscope import NumericalError, Problem, SpecError, UsageError
from zoscope.curvature.forward import LEAST_DIRECTIONS, measure_forward
from zoscope.problem import OWN_DTYPE

from .matrices import network_like, rotated

SPECTRUM = torch.linspace(0.05, 3.0, 60, dtype=torch.float64)


def quadratic(eigenvalues=SPECTRUM, *, seed=0, scale=1.0):
    """``½ xᵀHx`` at a random point, and H."""
    h = scale * rotated(eigenvalues, seed=seed)
    x0 = torch.randn(len(h), generator=torch.Generator().manual_seed(5)).double()
    return Problem.from_function(lambda x: 0.5 * x @ h @ x, x0), h


def measured(problem, *, dtype=OWN_DTYPE, micro_batch=None, **options):
    with problem.prepare(device="cpu", dtype=dtype, micro_batch=micro_batch, differentiable=False) as objective:
        return measure_forward(objective, **options)


def within(estimate, truth):
    return abs(estimate.value - truth) <= estimate.half_width


def perceptron():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
    return Problem.from_criterion(model, (x, y), nn.CrossEntropyLoss(), batch_size=12)


def test_the_intervals_hold_the_moments_of_a_quadratic_at_their_rate():
    problem, h = quadratic()
    x = problem.model.x.detach()
    g = h @ x
    truths = h.trace(), (h**2).sum(), g @ h @ g / (g @ g), g @ g
    hits = np.zeros(4)
    for seed in range(40):
        found = measured(problem, seed=seed, max_hvps=100)
        estimates = found.trace, found.frobenius_sq, found.rayleigh, found.gradient_sq
        hits += [within(estimate, float(truth)) for estimate, truth in zip(estimates, truths, strict=True)]
    assert (hits >= 36).all(), hits  # 38 expected; P(< 36) = 5 % at the nominal rate


def test_the_estimates_have_no_bias():
    problem, h = quadratic()
    g = h @ problem.model.x.detach()
    runs = [measured(problem, seed=seed, max_hvps=60) for seed in range(60)]
    for name, truth in (("trace", h.trace()), ("frobenius_sq", (h**2).sum()), ("rayleigh", g @ h @ g / (g @ g))):
        values = np.array([getattr(run, name).value for run in runs])
        assert abs(values.mean() - float(truth)) <= 3.5 * values.std(ddof=1) / np.sqrt(len(values)), name


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_step_follows_the_curvature(scale):
    problem, h = quadratic(scale=scale)
    found = measured(problem, max_hvps=300)
    assert within(found.trace, float(h.trace()))
    assert found.trace.half_width < 0.25 * float(h.trace())


def test_the_step_shrinks_where_the_loss_ends():
    def barrier(x):
        return -torch.log(1e-4 - (x**2).sum())  # defined for ‖x‖ < 0.01

    problem = Problem.from_function(barrier, torch.full((20,), 1e-3, dtype=torch.float64))
    found = measured(problem, max_hvps=200)
    x = torch.full((20,), 1e-3, dtype=torch.float64, requires_grad=True)
    truth = torch.autograd.functional.hessian(barrier, x).trace()
    assert within(found.trace, float(truth))


def test_errors_shrink_until_the_precision_wanted_and_not_further():
    problem, _ = quadratic()
    coarse, fine = (measured(problem, rtol=rtol, max_hvps=4000) for rtol in (0.1, 0.05))
    assert coarse.num_hvps < fine.num_hvps < 4000
    for found, rtol in ((coarse, 0.1), (fine, 0.05)):
        assert found.trace.half_width <= rtol * found.trace.value


@pytest.mark.parametrize("budget", [LEAST_DIRECTIONS, 50, 99, 100, 333])
def test_the_budget_is_never_exceeded(budget):
    found = measured(quadratic()[0], rtol=1e-6, max_hvps=budget)
    assert 0.6 * budget < found.num_hvps <= budget
    assert found.num_evaluations <= 2 * found.num_hvps + 3


def test_a_budget_without_error_bars_is_refused():
    with pytest.raises(UsageError, match=r"--max-hvps 39.*at least 40"):
        measured(quadratic()[0], max_hvps=39)


def test_equal_seeds_give_equal_numbers():
    problem, _ = quadratic()
    first, again, other = (measured(problem, seed=seed, max_hvps=60) for seed in (1, 1, 2))
    assert first.trace == again.trace
    assert first.rayleigh == again.rayleigh
    assert first.trace != other.trace


def test_a_constant_loss_has_no_curvature_and_no_gradient():
    problem = Problem.from_function(lambda x: 3.0 + 0.0 * x.sum(), torch.ones(30, dtype=torch.float64))
    found = measured(problem, max_hvps=60)
    assert (found.trace.value, found.frobenius_sq.value, found.rayleigh) == (0.0, 0.0, None)


def test_negative_curvature_is_seen_where_it_dominates():
    found = measured(quadratic(torch.cat([SPECTRUM, -SPECTRUM]))[0], max_hvps=100)
    assert found.indefinite
    assert not measured(quadratic()[0], max_hvps=100).indefinite


def test_losses_that_are_not_finite_nearby_are_an_error():
    def wall(x):
        return (x**2).sum() + (torch.zeros(()) if bool((x == 1).all()) else torch.tensor(float("inf")))

    with pytest.raises(NumericalError, match="No step gives finite losses"):
        measured(Problem.from_function(wall, torch.ones(20)), max_hvps=200)


def test_micro_batches_see_the_same_function():
    problem = perceptron()
    whole, parts = (measured(problem, dtype="float64", max_hvps=60, micro_batch=size) for size in (None, 5))
    assert parts.trace.value == pytest.approx(whole.trace.value, rel=1e-6)
    assert parts.rayleigh.value == pytest.approx(whole.rayleigh.value, rel=1e-5)


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("large", [False, True])
def test_parameters_come_back_bit_for_bit(dtype, large, monkeypatch):
    if large:  # as if they were: out of memory meanwhile, and rounded to a grid where the dtype allows
        monkeypatch.setattr("zoscope.problem.model.IN_MEMORY", 0)
        monkeypatch.setattr("zoscope.curvature.finite_difference.SNAPSHOT_BYTES", 0)
    problem = perceptron()
    problem.model.to(dtype)
    x, y = problem.batches[0]
    problem = Problem.from_criterion(problem.model, [(x.to(dtype), y)], nn.CrossEntropyLoss())
    before = snapshot(problem.model)
    measured(problem, max_hvps=60)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(problem.model), strict=True))
    assert all(p.requires_grad and p.dtype == dtype for p in problem.model.parameters())


def test_large_models_give_the_numbers_of_small_ones(monkeypatch):
    problem = perceptron()
    small = measured(problem, dtype="float64", max_hvps=60)
    monkeypatch.setattr("zoscope.curvature.finite_difference.SNAPSHOT_BYTES", 0)
    large = measured(problem, dtype="float64", max_hvps=60)
    # Entries of directions are rounded to 1/64 there, far below what the law of uᵀHu notices.
    assert large.trace.value == pytest.approx(small.trace.value, abs=0.1 * small.trace.stderr)


def test_parameters_come_back_when_the_loss_fails(monkeypatch):
    calls = 0

    def moody(x):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("the simulator stopped")
        return (x**2).sum()

    x0 = torch.randn(30, generator=torch.Generator().manual_seed(0))
    problem = Problem.from_function(moody, x0)
    with pytest.raises(SpecError, match="simulator stopped"):
        measured(problem, max_hvps=60)
    assert torch.equal(problem.model.x.detach(), x0)


NUMBERS = {
    "float": lambda v: float(v),
    "numpy scalar": lambda v: np.float64(v),
    "numpy array": lambda v: np.asarray(v),
    "tensor": lambda v: torch.tensor(float(v)).double(),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_black_boxes_may_return_numbers(kind):
    def loss(x):
        values = np.asarray(x)  # NumPy reads the parameters themselves
        return NUMBERS[kind](np.sum(values**2 * np.linspace(1, 2, 30)))

    found = measured(Problem.from_function(loss, torch.ones(30, dtype=torch.float64)), max_hvps=100)
    assert within(found.trace, 90.0)


@pytest.mark.parametrize("value", [3, True, None, "loss"])
def test_what_cannot_vary_is_no_loss(value):
    with pytest.raises(SpecError, match="The loss function returned"):
        measured(Problem.from_function(lambda x: value, torch.ones(30)), max_hvps=60)


def test_with_derivatives_a_number_is_refused_and_forward_passes_offered():
    problem = Problem.from_function(lambda x: float((x.detach() ** 2).sum()), torch.ones(3))
    with pytest.raises(SpecError, match=r"returned a float.*--curvature forward"), problem.prepare(device="cpu"):
        pass


def test_operations_without_derivative_and_inference_mode_are_fine():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

    def loss(x):
        with torch.inference_mode():
            return Square.apply(x).sum()

    problem = Problem.from_function(loss, torch.ones(30, dtype=torch.float64))
    with torch.inference_mode():
        found = measured(problem, max_hvps=100)
    assert within(found.trace, 60.0)


def test_the_upper_tail_of_few_modes_is_covered():
    """One dominant eigenvalue: uᵀHu is nearly a single squared Gaussian, whose sample variance is mostly too small."""
    problem, h = quadratic(torch.cat([torch.tensor([20.0], dtype=torch.float64), torch.full((40,), 0.01).double()]))
    hits = sum(
        within(measured(problem, seed=seed, max_hvps=100).frobenius_sq, float((h**2).sum())) for seed in range(40)
    )
    assert hits >= 34, hits


def test_a_network_like_spectrum_is_within_its_bars():
    problem, h = quadratic(network_like(size=200), seed=2)
    runs = [measured(problem, seed=seed, max_hvps=100) for seed in range(20)]
    assert sum(within(run.trace, float(h.trace())) for run in runs) >= 17
    assert sum(within(run.frobenius_sq, float((h**2).sum())) for run in runs) >= 17
