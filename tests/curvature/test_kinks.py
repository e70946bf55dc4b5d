import pytest
import torch
from torch import nn

from zoscope.curvature.kinks import kink_trace
from zoscope.curvature.operators import HessianOperator
from zoscope.problem import Problem


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
        found = kink_trace(objective, operator, generator=torch.Generator().manual_seed(3))
        assert torch.equal(objective.read(), before)
        trace = float(operator.dense().trace())
    return found, trace


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_of_kinks_bends_more_than_its_hessian_says(dtype):
    found, trace = excess(nn.ReLU, dtype=dtype)
    assert found.value > 4 * found.stderr
    assert found.value > 0.05 * trace


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_smooth_network_has_no_excess(activation, dtype):
    found, trace = excess(activation, dtype=dtype)
    assert abs(found.value) < 4 * found.stderr + 1e-3 * trace


def test_one_kink_counts_by_the_directions_that_cross_it():
    # f = Σ|x_i - c_i| with c_i uniform in ±w around x: the mean second difference tends to that of Σ x_i²/(2w).
    count, width = 4000, 0.05
    c = width * (2 * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    problem = Problem.from_function(lambda x: (x - c).abs().sum(), torch.zeros(count, dtype=torch.float64))
    with problem.prepare(device="cpu") as objective:
        found = kink_trace(objective, HessianOperator(objective), generator=torch.Generator().manual_seed(1))
    assert found.value == pytest.approx(count / width, abs=5 * found.stderr)
