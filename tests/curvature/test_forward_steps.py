"""How far forward passes step: losses with a second valley, with kinks, rounded coarsely or nearly flat."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from zoscope import Problem
from zoscope.curvature.finite_difference import Difference, Stencil, choose_step
from zoscope.curvature.forward import measure_forward
from zoscope.curvature.operators import HessianOperator
from zoscope.problem import OWN_DTYPE

from .matrices import rotated

EIGENVALUES = torch.linspace(0.2, 2.0, 12, dtype=torch.float64)


def measured(problem, **options):
    with problem.prepare(device="cpu", dtype=OWN_DTYPE, differentiable=False) as objective:
        return measure_forward(objective, **options)


def within(estimate, truth):
    return abs(estimate.value - truth) <= estimate.half_width


class Normalised(nn.Module):
    """Small weights behind a layer norm, whose gains are large: as language models begin."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(32, 24), nn.LayerNorm(24), nn.Linear(24, 32, bias=False)
        for p in (self.tokens.weight, self.head.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, rows):
        x = self.norm(self.tokens(rows))
        return self.head(x + self.norm(x.roll(1, 1) * x)).float()


def normalised():
    torch.manual_seed(0)
    model, rows = Normalised().bfloat16(), torch.randint(0, 32, (6, 9))

    def loss(model, rows):
        return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return Problem(model, [rows], loss)


def test_no_step_leads_beyond_weights_that_a_layer_norm_hides():
    problem = normalised()
    with problem.prepare(device="cpu", dtype="float32") as objective:
        truth = float(HessianOperator(objective).dense().trace())
    runs = [measured(problem, seed=seed, max_hvps=150) for seed in range(12)]
    assert max(run.step for run in runs) <= 0.02
    assert sum(within(run.trace, truth) for run in runs) >= 11


def test_the_gains_of_layer_norms_do_not_set_the_size_of_the_weights():
    with normalised().prepare(device="cpu", dtype=OWN_DTYPE, differentiable=False) as objective:
        stencil = Stencil(objective, seed=0)
    assert 0.015 < stencil.typical_size < 0.03
    assert stencil.farthest == stencil.typical_size / 2


def second_valley(h):
    """Curvatures that bend below 0.02, are another ones above, and are rounded by 1e-3/h²."""
    rng = np.random.default_rng(int(1e3 * abs(np.log(h))))
    near, far = np.array([50.0, 150.0, 90.0, 120.0]), np.array([3.0, 5.0, 4.0, 3.5])
    share = 1 / (1 + (h / 0.02) ** 2)
    found = near * share + far * (1 - share) + 1e-4 / h**2 * rng.standard_normal(4)
    return [Difference(0.0, float(value)) for value in found]


def test_a_step_has_to_go_beyond_the_parameters_only_where_the_loss_cannot_be_resolved():
    chosen = choose_step(second_valley, start=0.02, tolerance=1e-4, budget=200, farthest=0.02)[0]
    assert 1e-3 < chosen <= 0.02
    assert choose_step(second_valley, start=0.4, tolerance=1e-4, budget=200)[0] > 0.2  # where no size is known

    def rounded(h):  # a quadratic, seen through a loss that is right to 1e-6
        rng = np.random.default_rng(int(1e3 * abs(np.log(h))))
        return [Difference(0.0, x + 1e-6 / h**2 * rng.standard_normal()) for x in (1.0, 2.0, 1.5, 0.5)]

    assert choose_step(rounded, start=1e-6, tolerance=1e-4, budget=200, farthest=1e-5, resolution=1e-6)[0] > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_black_boxes_of_any_scale_are_measured(scale, dtype):
    h = rotated(EIGENVALUES, seed=0)
    x0 = scale * torch.randn(12, generator=torch.Generator().manual_seed(1)).to(dtype)
    problem = Problem.from_function(lambda x: 0.5 * (x.double() - 1) @ h @ (x.double() - 1), x0)
    runs = [measured(problem, seed=seed, max_hvps=150) for seed in range(10)]
    assert sum(within(run.trace, float(h.trace())) for run in runs) >= 9
    assert np.median([run.trace.half_width for run in runs]) < 0.5 * float(h.trace())


def test_a_loss_with_three_decimals_is_stepped_far_enough():
    h = rotated(EIGENVALUES, seed=0)
    problem = Problem.from_function(lambda x: round(float(0.5 * x @ h @ x + x.sum()), 3), torch.zeros(12).double())
    runs = [measured(problem, seed=seed, max_hvps=100) for seed in range(10)]
    assert sum(within(run.trace, float(h.trace())) for run in runs) >= 9
    assert max(run.trace.half_width for run in runs) < 0.5 * float(h.trace())


def test_nothing_is_certain_about_a_loss_of_steps():
    problem = Problem.from_function(lambda x: float(torch.floor(10 * x).sum()), torch.zeros(12).double())
    found = measured(problem, max_hvps=100)
    assert within(found.trace, 0.0)
    assert found.frobenius_sq.half_width > 0


def kinked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    return Problem.from_criterion(model, [(torch.randn(64, 6), torch.randint(0, 4, (64,)))], nn.CrossEntropyLoss())


def mean_difference(problem, h, *, directions):
    """Mean second difference at a step, by itself."""
    with problem.prepare(device="cpu", dtype="float64", differentiable=False) as objective:
        base, generator = objective.read().clone(), torch.Generator().manual_seed(7)
        centre, total = objective.value(), 0.0
        for _ in range(directions):
            u = torch.randn(base.shape, generator=generator, dtype=base.dtype)
            for sign in (1, -1):
                objective.write(base + sign * h * u)
                total += (objective.value() - centre) / h**2
        objective.write(base)
    return total / directions


@pytest.mark.slow
def test_kinks_are_within_the_bars_at_the_step_and_at_half_of_it():
    problem = kinked()
    runs = [measured(problem, seed=seed, max_hvps=300) for seed in range(12)]
    hits = np.zeros(2)
    for run in runs:
        hits += [within(run.trace, mean_difference(problem, run.step / part, directions=400)) for part in (1, 2)]
    assert (hits >= 11).all(), hits
    steps = np.array([run.step for run in runs])
    assert (steps > 0.02).sum() >= 11, steps  # and seeds look at the same loss
