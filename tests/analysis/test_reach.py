"""Whether the noise of a run leaves the quadratic model, told from a dozen evaluations of the loss."""

import math

import pytest
import torch

import zoscope
from zoscope import Problem
from zoscope.analysis.notices import measure_reach, noise_distance
from zoscope.theory.rules import update_rule

SIZE = 400
CURVATURES = torch.logspace(-2, 0, SIZE, dtype=torch.float64)
START = torch.full((SIZE,), 0.05, dtype=torch.float64)


def bowl(quartic: float, scale: float = 1.0) -> Problem:
    """``Σ λx²/2 + quartic·λx⁴/4``: at a random distance s the rise is (1 + 1.5·quartic·s²) times the quadratic one."""
    return Problem.from_function(
        lambda x: scale * (CURVATURES * (0.5 * x**2 + 0.25 * quartic * x**4)).sum(), torch.zeros_like(START)
    )


def reached(problem: Problem, distance: float, **options):
    with problem.prepare(device="cpu", dtype="float64") as objective:
        before = objective.read()
        found = measure_reach(objective, loss=objective.value(), distance=distance, steps=100, seed=0, **options)
        assert torch.equal(objective.read(), before)
        return found


def test_a_quadratic_is_one_at_every_distance() -> None:
    for distance in (1e-3, 1.0, 1e3):
        found = reached(bowl(0.0), distance)
        assert found.ratio == pytest.approx(1.0, abs=1e-6)


def test_the_rise_of_a_quartic_is_found_and_when_it_counts() -> None:
    found = reached(bowl(1.0), 1.0)
    near = 1 + 1.5 * 0.25**2
    assert found.ratio == pytest.approx(2.5 / near, rel=0.2)
    assert found.quadratic_steps == pytest.approx(100 * 0.5 / (found.ratio - 1))


def test_where_nothing_rises_nothing_is_said() -> None:
    assert reached(Problem.from_function(lambda x: 1 + 0 * x.sum(), START), 1.0) is None
    assert reached(bowl(1.0, scale=-1.0), 1.0) is None


def test_a_loss_that_overflows_is_infinitely_far() -> None:
    problem = Problem.from_function(lambda x: torch.exp((x**2).sum()), torch.zeros_like(START))
    found = reached(problem, 2.0)
    assert found.ratio == math.inf or found.ratio > 1e3


def test_the_noise_of_a_run_moves_a_parameter_as_far_as_said() -> None:
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    lr, steps, queries = 1e-3, 200, 2
    moved = torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(steps):
        u = torch.randn(queries, SIZE, generator=generator, dtype=torch.float64)
        moved -= lr * ((u @ gradient)[:, None] * u).mean(dim=0)
    noise = moved + lr * steps * gradient
    rule = update_rule("gd")
    expected = noise_distance(lr, steps=steps, grad_norm=float(gradient.norm()), queries=queries, rule=rule)
    assert float(noise.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


def codes(problem: Problem, lr: float) -> set[str]:
    found = zoscope.bounds(problem, optimizers="gd", steps=100, lr=lr, device="cpu")
    return {warning.code for warning in found.warnings}


def test_bounds_says_so_where_it_matters() -> None:
    def steep(x: torch.Tensor) -> torch.Tensor:
        return (CURVATURES * (0.5 * (x - 0.3) ** 2 + 20 * x**4)).sum()

    start = torch.zeros(SIZE, dtype=torch.float64)
    assert "leaves-quadratic" in codes(Problem.from_function(steep, start), 1e-2)
    assert "leaves-quadratic" not in codes(Problem.from_function(steep, start), 1e-4)
    plain = Problem.from_function(lambda x: (CURVATURES * 0.5 * (x - 0.3) ** 2).sum(), start)
    assert "leaves-quadratic" not in codes(plain, 1e-2)
