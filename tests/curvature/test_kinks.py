import pytest
import torch
from torch import nn

import zoscope
from zoscope import Problem
from zoscope.curvature.nonsmooth import nonsmooth_curvature
from zoscope.curvature.operators import HessianOperator


def excess(activation, *, dtype="float64"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), activation(), nn.Linear(20, 3))
    x = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1))
    y = (x[:, :3].abs()).argmax(dim=1)  # something to fit: where residuals are random, kinks up and down cancel
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    problem = Problem.from_criterion(model, [(x, y)], nn.CrossEntropyLoss())
    with problem.prepare(device="cpu", dtype=dtype) as objective:
        before = objective.read()
        operator = HessianOperator(objective)
        found = nonsmooth_curvature(objective, operator, generator=torch.Generator().manual_seed(3))
        assert torch.equal(objective.read(), before)
        trace = float(operator.dense().trace())
    return found, trace


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_of_kinks_bends_more_than_its_hessian_says(dtype):
    found, trace = excess(nn.ReLU, dtype=dtype)
    assert found.significant == found.trace.value > 0.05 * trace
    assert found.disagreement > 0.05


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_smooth_network_has_no_excess(activation, dtype):
    found, trace = excess(activation, dtype=dtype)
    assert abs(found.trace.value) < 4 * found.trace.stderr + 1e-3 * trace
    assert found.disagreement < 0.02


def test_one_kink_counts_by_the_directions_that_cross_it():
    # f = Σ|x_i - c_i| with c_i uniform in ±w around x: the mean second difference tends to that of Σ x_i²/(2w).
    count, width = 4000, 0.05
    c = width * (2 * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    problem = Problem.from_function(lambda x: (x - c).abs().sum(), torch.zeros(count, dtype=torch.float64))
    with problem.prepare(device="cpu") as objective:
        found = nonsmooth_curvature(objective, HessianOperator(objective), generator=torch.Generator().manual_seed(1))
    assert found.trace.value == pytest.approx(count / width, abs=5 * found.trace.stderr)


class HiddenCube(torch.autograd.Function):
    """Its backward takes what autograd cannot see as a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2) * slope


def test_an_operation_that_hides_its_second_derivative_is_noticed():
    target = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = Problem.from_function(lambda x: (HiddenCube.apply(x) - target).square().mean(), start)
    with problem.prepare(device="cpu") as objective:
        found = nonsmooth_curvature(objective, HessianOperator(objective), generator=torch.Generator().manual_seed(1))
    assert found.disagreement > 0.1
    result = zoscope.bounds(problem, optimizers=["gd"])
    (said,) = [notice.message for notice in result.warnings if notice.code == "kinks"]
    assert "hides its second derivative" in said
