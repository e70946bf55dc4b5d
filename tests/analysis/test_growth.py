"""A start that hides its curvature, told from one that does not."""

import math

import pytest
import torch
from torch import nn

import zoscope
from zoscope import Estimate
from zoscope.analysis.notices import FALL, GROWN, Growth, growth_notices, measure_growth
from zoscope.curvature.operators import HessianOperator

CODE = "little-curvature"


def encoder(
    features: float, *, head: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> zoscope.Problem:
    """A network whose layers are there and whose head is new: zero, or random and small."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    labels = torch.randint(4, (64,), generator=generator)
    x = normal(64, 16) + normal(4, 16)[labels]
    layers: list[nn.Module] = []
    for width in (16, 48, 48):
        layers += [nn.Linear(width, 48, dtype=dtype), nn.GELU()]
    last = nn.Linear(48, 4, dtype=dtype)
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(1.5 * normal(*layer.weight.shape) / layer.in_features**0.5)
                layer.bias.zero_()
        last.weight.copy_(head * normal(4, 48) / 48**0.5)
        last.bias.zero_()

    class Scaled(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return features * h

    return zoscope.Problem.from_criterion(
        nn.Sequential(*layers, Scaled(), last), (x, labels), nn.CrossEntropyLoss(), batch_size=64
    )


def grown(problem: zoscope.Problem, *, share: float = math.inf, seed: int = 0) -> Growth | None:
    """With the trace at the start from many directions."""
    with problem.prepare(device="cpu", dtype="auto") as objective:
        loss = objective.value()
        operator = HessianOperator(objective)
        z = torch.randn(48, operator.dim, generator=torch.Generator().manual_seed(9), dtype=operator.dtype)
        traces = (z * operator.matmat(z)).sum(dim=1)
        before = float(traces.mean() + 2 * traces.std() / len(z) ** 0.5)
        start = objective.read()
        found = measure_growth(objective, loss=loss, before=before, share=share, seed=seed)
        assert torch.equal(objective.read(), start)
    return found


@pytest.mark.parametrize("head", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_a_new_head_on_small_features_is_noticed(head: float, seed: int) -> None:
    found = grown(encoder(0.03, head=head, seed=seed), seed=seed)
    assert found is not None
    assert found.significant
    assert 0 < found.fall <= FALL * 1.5


def test_a_head_in_which_the_curvature_is_already_is_not() -> None:
    found = grown(encoder(1.0))
    assert found is not None
    assert not found.significant
    assert found.after.value < GROWN * found.before


def test_frozen_features_have_all_of_their_curvature_at_the_start() -> None:
    """The loss is convex in the head, and flattest where it is decided."""
    problem = encoder(0.05).with_params(r"^7\.")
    found = grown(problem)
    assert found is not None
    assert not found.significant


def test_a_quadratic_does_not_change() -> None:
    h = torch.diag(torch.linspace(0.1, 3.0, 20, dtype=torch.float64))
    problem = zoscope.Problem.from_function(lambda x: 0.5 * x @ h @ x, torch.ones(20, dtype=torch.float64))
    found = grown(problem)
    assert found is not None
    assert found.after.interval[0] <= float(h.trace()) <= found.after.interval[1]


def test_a_run_that_goes_nowhere_costs_nothing() -> None:
    assert grown(encoder(0.05), share=0.04) is None


def test_a_minimum_with_a_loss_left_is_left_alone() -> None:
    problem = zoscope.Problem.from_function(lambda x: 1 + (x * x).sum(), torch.full((5,), 1e-12, dtype=torch.float64))
    assert grown(problem) is None


def test_what_it_costs_is_a_few_products() -> None:
    found = grown(encoder(1.0))
    assert found is not None
    assert found.num_hvps <= 5


def test_growth_within_the_error_bars_is_no_growth() -> None:
    assert not Growth(1.0, Estimate(4.0, 0.6), 0.3, 4).significant
    assert Growth(1.0, Estimate(4.0, 0.4), 0.3, 4).significant
    assert [notice.code for notice in growth_notices(Growth(1.0, Estimate(4.0, 0.4), 0.3, 4))] == [CODE]
    assert not list(growth_notices(None))


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_bounds_says_so_and_calls_its_advice_provisional(optimizer: str) -> None:
    options = {"optimizers": (optimizer,), "steps": 20_000, "rtol": 0.1, "device": "cpu"}
    for features, expected in ((0.03, True), (1.0, False)):
        result = zoscope.bounds(encoder(features), **options)
        assert (CODE in {notice.code for notice in result.warnings}) is expected
        assert (CODE in result.optimizers[optimizer].doubts) is expected


def test_check_says_so_too() -> None:
    (check,) = zoscope.check(encoder(0.03), optimizer="zo-gd", lr=1e-4, steps=20_000, rtol=0.1, device="cpu").checks
    assert CODE in check.doubts
    assert "measure again after warm-up" in " ".join(check.notices)
