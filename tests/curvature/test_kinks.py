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


@pytest.mark.parametrize("reach", [200.0, 600.0])
def test_kinks_are_counted_over_the_noise_of_ten_steps(reach):
    count, width = 4000, 0.05
    c = width * (2 * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    problem = Problem.from_function(lambda x: (x - c).abs().sum(), torch.zeros(count, dtype=torch.float64))
    with problem.prepare(device="cpu") as objective:
        operator = HessianOperator(objective)
        found = nonsmooth_curvature(objective, operator, generator=torch.Generator().manual_seed(1), reach=reach)
    assert found.step == pytest.approx(10**0.5 * 2 * reach / found.trace.value, rel=0.1)
    z = torch.randn(200, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = 2 * (found.step * z.abs() - c.abs()).clamp_min(0).sum(dim=1).mean() / found.step**2
    assert found.trace.value == pytest.approx(float(expected), abs=5 * found.trace.stderr)


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


def hidden(dtype: torch.dtype, cube=HiddenCube.apply) -> Problem:
    target = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=dtype)
    start = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return Problem.from_function(lambda x: (cube(x) - target).square().mean(), start)


def test_a_hidden_second_derivative_is_found_by_differences_of_gradients():
    found, truth = hidden(torch.float64), hidden(torch.float64, cube=lambda x: x**3)
    result, expected = (zoscope.bounds(p, optimizers=["gd", "adam"], device="cpu") for p in (found, truth))
    for name in ("gd", "adam"):
        assert result.optimizers[name].exact.value == pytest.approx(expected.optimizers[name].exact.value, rel=1e-5)
    (said,) = [notice.message for notice in result.warnings if notice.code == "hvp-fallback"]
    assert "hides its second derivative" in said
    assert "kinks" not in [notice.code for notice in result.warnings]
    monitor = zoscope.StabilityMonitor(found, "zo-gd", every=1, device="cpu")
    records = [monitor.step(lr=1e-3) for _ in range(2)]
    largest = [record.lambda_max for record in records]
    assert largest == pytest.approx([expected.curvature["hessian"].lambda_max.value] * 2, rel=1e-5)
    assert "hvp-fallback" in [notice.code for notice in monitor.warnings]


def test_a_function_of_the_users_that_is_right_is_left_alone():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, slope):
            return 3 * ctx.saved_tensors[0] ** 2 * slope

    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, slope):
            return (ctx.saved_tensors[0] > 0) * slope

    for function in (Cube, Relu):
        with hidden(torch.float64, cube=function.apply).prepare(device="cpu") as objective:
            operator = HessianOperator(objective)
            operator.dense()
            assert operator.method == "double-backward"


@pytest.mark.parametrize("command", ["bounds", "spectrum", "moments", "track", "monitor"])
def test_where_the_loss_bends_otherwise_every_command_says_so(command: str):
    problem = hidden(torch.float32)  # too coarse for differences of gradients
    if command == "track":
        warnings = zoscope.track(problem, optimizer="zo-gd", lr=1e-4, steps=1, device="cpu").warnings
    elif command == "monitor":
        monitor = zoscope.StabilityMonitor(problem, "zo-gd", device="cpu")
        monitor.step(lr=1e-4)
        warnings = monitor.warnings
    else:
        warnings = getattr(zoscope, command)(problem, device="cpu").warnings
    (said,) = [notice.message for notice in warnings if notice.code == "kinks"]
    assert "hides its second derivative" in said
