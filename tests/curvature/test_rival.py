"""The choice between products by double-backward and a linearized gradient."""

import pytest
import torch
from torch import nn

from zoscope.curvature import operators, rival
from zoscope.curvature.operators import HessianOperator, Preconditioned
from zoscope.problem import Problem


def convolutions() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    x, y = torch.randn(6, 1, 4, 4).double(), torch.randn(6, 2).double()
    return Problem.from_criterion(model, [(x, y)], nn.MSELoss())


def vectors(operator: HessianOperator, count: int) -> torch.Tensor:
    return torch.randn(count, operator.dim, generator=torch.Generator().manual_seed(1)).double()


def clock(monkeypatch: pytest.MonkeyPatch, *, usual: float, linearized: float) -> None:
    """Let products seem to take these times."""
    monkeypatch.setattr(operators, "now", _counter(2 * usual))
    monkeypatch.setattr(rival, "now", _counter(linearized))


def _counter(step: float):
    now = 0.0

    def tick(*_: object) -> float:
        nonlocal now
        now += step
        return now

    return tick


@pytest.mark.parametrize(
    ("usual", "linearized", "expected", "chosen"),
    [
        (10.0, 7.0, 60, "linearize"),
        (10.0, 12.0, 60, "double-backward"),  # slower
        (10.0, 7.0, 59, "double-backward"),  # too few products to pay for the set-up
        (0.1, 0.07, 60, "double-backward"),  # products are too quick for it
    ],
)
def test_a_linearized_gradient_is_taken_where_it_pays(monkeypatch, usual, linearized, expected, chosen):
    with convolutions().prepare(device="cpu") as objective:
        clock(monkeypatch, usual=usual, linearized=linearized)
        operator = HessianOperator(objective, expected=expected)
        v = vectors(operator, 2)
        found = torch.cat([operator.matmat(v) for _ in range(5)])
        assert operator.hvp == Preconditioned(operator, torch.ones(operator.dim)).hvp == chosen
        tried = expected >= 60 and usual > 1
        assert operator.num_hvps == 10 + 1 + 2 * tried  # one to see that the answer repeats, two to compare
        forced = HessianOperator(objective, hvp="double-backward").matmat(v)
    torch.testing.assert_close(found, forced.repeat(5, 1))


def test_other_parameters_end_it(monkeypatch):
    with convolutions().prepare(device="cpu") as objective:
        clock(monkeypatch, usual=10.0, linearized=7.0)
        operator = HessianOperator(objective, expected=60)
        v = vectors(operator, 1)
        for _ in range(4):
            operator.matmat(v)
        assert operator.hvp == "linearize"
        objective.write(objective.read() + 0.1)
        found = operator.matmat(v)
        assert operator.hvp == "double-backward"
        torch.testing.assert_close(found, HessianOperator(objective).matmat(v))


@pytest.mark.parametrize("defeat", ["error", "wrong", "memory"])
def test_what_does_not_work_is_left(monkeypatch, defeat):
    def failing(*_, **__):
        if defeat == "error":
            raise RuntimeError("no forward mode")
        return lambda v: 1.01 * v

    with convolutions().prepare(device="cpu") as objective:
        clock(monkeypatch, usual=10.0, linearized=7.0)
        monkeypatch.setattr(rival, "shard_products", failing)
        if defeat == "memory":
            monkeypatch.setattr(rival, "held_memory", _counter(2.0**50))
        operator = HessianOperator(objective, expected=60)
        v = vectors(operator, 1)
        found = [operator.matmat(v) for _ in range(5)]
        assert operator.hvp == "double-backward"
    torch.testing.assert_close(found[-1], found[0])


def test_only_convolutions_in_one_piece_are_worth_it():
    torch.manual_seed(0)
    dense = Problem.from_criterion(nn.Linear(3, 2), [(torch.randn(4, 3), torch.randn(4, 2))], nn.MSELoss())
    with dense.prepare(device="cpu") as objective:
        assert not rival.Rival(objective, expected=600).possible
    with convolutions().prepare(device="cpu") as objective:
        assert rival.Rival(objective, expected=600).possible
    with convolutions().prepare(device="cpu", micro_batch=3) as objective:
        assert not rival.Rival(objective, expected=600).possible


def test_operations_of_unknown_safety_are_not_tried(monkeypatch):
    problem = Problem.from_criterion(nn.Conv1d(1, 1, 2), [(torch.ones(2, 1, 4), torch.ones(2, 1, 3))], summed_up)
    with problem.prepare(device="cpu") as objective:
        clock(monkeypatch, usual=10.0, linearized=7.0)
        operator = HessianOperator(objective, expected=60)
        for _ in range(4):
            operator.matmat(torch.ones(1, operator.dim))
        assert operator.hvp == "double-backward"


def summed_up(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).cumsum(dim=0).square().mean()
