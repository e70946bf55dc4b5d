"""The mean change of the loss in one real step of ZO-GD changes its sign at the descent threshold."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import zoscope
from zoscope.theory.quadratic import descent_threshold

from .networks import example, losses_near

pytestmark = pytest.mark.slow

RATIOS = np.array([0.8, 0.9, 1.0, 1.1, 1.2])
MU = 1e-3
GROUPS = 20  # of the jackknife


@dataclass(frozen=True)
class Crossing:
    """Where the mean change is zero, in units of the threshold, and its standard error."""

    ratio: float
    stderr: float


def crossing(problem: zoscope.Problem, threshold: float, *, directions: int, seed: int = 0) -> Crossing:
    """From the losses after steps of different sizes along the same directions."""
    groups = np.array_split(changes(problem, threshold, directions=directions, seed=seed), GROUPS)
    total, count = sum(group.sum(axis=0) for group in groups), sum(map(len, groups))
    without = np.array([_zero((total - group.sum(axis=0)) / (count - len(group))) for group in groups])
    return Crossing(_zero(total / count), float(without.std() * np.sqrt(GROUPS - 1)))


def changes(problem: zoscope.Problem, threshold: float, *, directions: int, seed: int) -> np.ndarray:
    """``(directions, 5)`` changes of the loss after one step of ``RATIOS`` times the threshold."""
    with losses_near(problem) as (start, loss_at):
        generator = torch.Generator().manual_seed(seed)
        before, rows = loss_at(start), []
        for _ in range(directions):
            u = torch.randn(len(start), generator=generator)
            slope = (loss_at(start + MU * u) - loss_at(start - MU * u)) / (2 * MU)
            rows.append([loss_at(start - float(ratio * threshold) * slope * u) - before for ratio in RATIOS])
    return np.array(rows)


def _zero(mean: np.ndarray) -> float:
    """Zero of the line through change over step size: the change is nearly a parabola through 0."""
    slope, intercept = np.polyfit(RATIOS, mean / RATIOS, 1)
    return float(-intercept / slope)


@pytest.mark.parametrize(
    ("make", "directions"),
    [
        pytest.param(lambda: example("transformer").problem(), 300, id="transformer"),
        pytest.param(lambda: example("digits_mlp").problem(width=32, steps=80, activation="gelu"), 800, id="gelu"),
    ],
)
def test_the_mean_change_of_the_loss_changes_sign_at_the_descent_threshold(
    make: Callable[[], zoscope.Problem], directions: int
) -> None:
    problem = make()
    found = zoscope.bounds(problem, optimizers=("gd",), method="deflated-slq")
    assert found.problem.grad_norm > 0.4
    threshold = found.optimizers["gd"].descent
    assert threshold is not None
    measured = crossing(problem, threshold, directions=directions)
    assert measured.stderr < 0.03
    assert abs(measured.ratio - 1) <= 0.1, measured


def test_kinks_carry_curvature_that_second_derivatives_miss() -> None:
    """Autograd's Hessian of a ReLU network holds almost everywhere; a step crosses kinks, which bend the loss upwards.

    The second difference of the loss along random directions sees them, and with its trace the threshold is right.
    """
    problem = example("digits_mlp").problem(width=32, steps=80)
    found = zoscope.bounds(problem, optimizers=("gd",), method="deflated-slq")
    row, trace = found.optimizers["gd"], found.curvature["hessian"].trace
    assert row.descent is not None
    rayleigh = (2 / row.descent - trace.value) / 2
    seen = second_difference(problem, step=3e-3, directions=300)
    assert seen - trace.value > 0.3 * trace.value
    threshold = descent_threshold(seen, rayleigh)
    measured = crossing(problem, threshold, directions=800)
    assert abs(measured.ratio - 1) <= 0.1, measured


def second_difference(problem: zoscope.Problem, *, step: float, directions: int) -> float:
    """Mean of ``(f(x+hu) + f(x-hu) - 2f(x)) / h²`` over directions: a trace by forward passes."""
    with losses_near(problem) as (start, loss_at):
        generator = torch.Generator().manual_seed(1)
        before, total = loss_at(start), 0.0
        for _ in range(directions):
            u = step * torch.randn(len(start), generator=generator)
            total += (loss_at(start + u) + loss_at(start - u) - 2 * before) / step**2
    return total / directions
