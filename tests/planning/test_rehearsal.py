"""The rehearsal against what is exact: the quadratic's own recursion, and the run that it stands for."""

import math

import numpy as np
import pytest
import torch

from zoscope.planning.rehearsal import Law, Rehearsal, TopSpace, coefficients
from zoscope.theory.quadratic import GradientMeasure, QuadraticModel
from zoscope.theory.rules import EstimatorMoments, update_rule
from zoscope.theory.spectrum import Spectrum

EIGENVALUES = np.concatenate([[6.0, 4.0, 2.0], np.full(60, 0.2)])


class Quadratic:
    """``½ Σ λ x²`` with all examples."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        self.eigenvalues = torch.from_numpy(eigenvalues)

    def begin(self, runs) -> None:
        pass

    def full(self, theta):
        return theta * self.eigenvalues, self.values(theta)

    def values(self, theta):
        return 0.5 * (self.eigenvalues * theta**2).sum(dim=1)

    def batch(self, theta, rows):
        return None

    def bends(self, theta, directions, mu):
        return 0.5 * mu * (self.eigenvalues * directions**2).sum(dim=1)


def top(count: int = 3) -> TopSpace:
    return TopSpace(torch.eye(len(EIGENVALUES), dtype=torch.float64)[:count], EIGENVALUES[:count].copy(), 0.2)


def final_losses(law: Law, *, lr: float, steps: int, macro: int, replicas: int, shape=None) -> np.ndarray:
    start = torch.full((len(EIGENVALUES),), 0.5, dtype=torch.float64)
    found = Rehearsal(
        Quadratic(EIGENVALUES),
        start,
        law=law,
        lr=lr,
        steps=steps,
        macro=macro,
        runs=range(replicas),
        seed=1,
        ceiling=math.inf,
        top=top(),
        shape=shape,
    ).go()
    return found.losses[-1]


def expected_loss(law: Law, *, lr: float, steps: int) -> float:
    model = QuadraticModel(
        Spectrum(EIGENVALUES, np.ones_like(EIGENVALUES)),
        update_rule(law.family, beta=law.momentum),
        EstimatorMoments(law.a, law.b),
        GradientMeasure(EIGENVALUES, (0.5 * EIGENVALUES) ** 2),
        float(0.5 * (EIGENVALUES * 0.25).sum()),
    )
    return float(model.loss_curve(lr, steps)[-1])


@pytest.mark.parametrize(
    ("law", "lr"),
    [
        (Law("gd"), 0.02),
        (Law("gd"), 0.05),
        (Law("gd", a=1.25, b=0.25), 0.1),
        (Law("gdm", momentum=0.9), 0.003),
    ],
)
@pytest.mark.parametrize("macro", [100, 25])
def test_the_mean_loss_on_a_quadratic_is_that_of_its_recursion(law, lr, macro):
    steps = 100
    ends = final_losses(law, lr=lr, steps=steps, macro=macro, replicas=400)
    wanted = expected_loss(law, lr=lr, steps=steps)
    error = ends.std(ddof=1) / math.sqrt(len(ends))
    # Macro steps of 4 steps are good to a few percent beside the scatter.
    assert abs(ends.mean() - wanted) < 4 * error + (0.04 if macro < steps else 0.01) * wanted


def test_one_sided_differences_add_their_noise():
    mu, lr, steps, replicas = 0.2, 0.02, 100, 400
    rehearsed = final_losses(Law("gd", one_sided_mu=mu), lr=lr, steps=steps, macro=25, replicas=replicas)
    random = np.random.default_rng(0)
    x = np.full((replicas, len(EIGENVALUES)), 0.5)
    for _ in range(steps):
        u = random.standard_normal(x.shape)
        slope = (x * EIGENVALUES * u).sum(axis=1) + 0.5 * mu * (EIGENVALUES * u**2).sum(axis=1)
        x -= lr * slope[:, None] * u
    real = 0.5 * (EIGENVALUES * x**2).sum(axis=1)
    central = final_losses(Law("gd"), lr=lr, steps=steps, macro=25, replicas=replicas)
    tolerance = 3 * math.hypot(rehearsed.std(), real.std()) / math.sqrt(replicas)
    assert tolerance < 0.2 * real.mean() < 0.5 * (real.mean() - central.mean())
    assert abs(rehearsed.mean() - real.mean()) < tolerance


def test_steps_along_a_direction_are_those_of_the_recursion():
    law, eta, lam = Law("gdm", momentum=0.8, weight_decay=0.1, a=2.5), 0.05, 3.0
    x, m = 0.0, 0.7
    for _ in range(7):
        gradient = 1.3 + (lam + 0.1) * x
        m = 0.8 * m + gradient
        x -= eta * m
    found = coefficients(np.array([eta]), np.array([lam]), steps=7, law=law)
    assert found.x_m[0] * 0.7 + found.x_g[0] * 1.3 == pytest.approx(x, rel=1e-12)
    assert found.m_m[0] * 0.7 + found.m_g[0] * 1.3 == pytest.approx(m, rel=1e-12)


def test_noise_along_a_direction_is_that_of_simulated_steps():
    law, eta, lam = Law("gdm", momentum=0.5, a=1.0), 0.1, 2.0
    generator = np.random.default_rng(0)
    x, m = np.zeros(200_000), np.zeros(200_000)
    for _ in range(5):
        m = 0.5 * m + lam * x + generator.standard_normal(x.shape)
        x = x - eta * m
    xx, mx, mm = (float(part[0]) for part in coefficients(np.array([eta]), np.array([lam]), steps=5, law=law).noise)
    assert xx**2 == pytest.approx(x.var(), rel=0.02)
    assert xx * mx == pytest.approx((x * m).mean(), rel=0.02)
    assert mx**2 + mm**2 == pytest.approx(m.var(), rel=0.02)


def test_the_mean_square_gradient_within_a_macro_step_is_that_of_its_steps():
    law, eta, lam, steps = Law("gd"), 0.1, 3.0, 6
    squares, x2 = [], 0.0
    gradients = [(1 - eta * lam) ** (2 * t) for t in range(steps)]
    for _ in range(steps):
        squares.append(lam**2 * x2)
        x2 = x2 * (1 - 2 * eta * lam + 2 * eta**2 * lam**2) + eta**2
    found = coefficients(np.array([eta]), np.array([lam]), steps=steps, law=law)
    assert found.fading[0][0] == pytest.approx(np.mean(gradients), rel=1e-12)
    assert found.feedback[0] == pytest.approx(np.mean(squares), rel=1e-12)


def test_the_same_seed_gives_the_same_runs_and_a_schedule_is_followed():
    ends = [final_losses(Law("gd"), lr=0.03, steps=60, macro=20, replicas=3) for _ in range(2)]
    assert (ends[0] == ends[1]).all()
    halved = final_losses(Law("gd"), lr=0.06, steps=60, macro=20, replicas=3, shape=lambda step: 0.5)
    assert halved == pytest.approx(ends[0], rel=1e-6)


def test_adam_stalls_where_its_noise_holds_it():
    # Theory: adaptive Adam stops falling at ‖g‖ = lr·Tr H/2.
    lr = 2e-3
    trace = float(EIGENVALUES.sum())
    start = torch.full((len(EIGENVALUES),), 0.02, dtype=torch.float64)
    found = Rehearsal(
        Quadratic(EIGENVALUES),
        start,
        law=Law("adam", momentum=0.9, second=0.99),
        lr=lr,
        steps=3000,
        macro=600,
        runs=range(4),
        seed=0,
        ceiling=math.inf,
        top=top(),
    ).go()
    late = found.losses[len(found.losses) // 2 :].mean()
    # Equal noise along all directions: the loss there is Tr-weighted, x² λ ~ lr ‖g‖ / 2 each.
    floor = 0.25 * lr * (lr * trace / 2) * len(EIGENVALUES)
    assert late == pytest.approx(floor, rel=0.35)


def test_a_direction_that_was_left_out_is_found_when_it_grows():
    space = TopSpace(torch.empty(0, 4, dtype=torch.float64), np.empty(0), 0.0)
    hessian = torch.diag(torch.tensor([9.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    gradient = torch.tensor([1.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    for _ in range(12):
        vectors, places = space.choose(gradient, 2, scale=1.0)
        space.learn(vectors, places, vectors @ hessian, scale=1.0)
    assert max(space.values) == pytest.approx(9.0, rel=1e-3)


class _WildAtFirst(Quadratic):
    """Gradients that change by a factor from look to look, ten times: what no linear model foretells."""

    looks = 0

    def full(self, theta):
        self.looks += 1
        return theta * self.eigenvalues * (4.0 if self.looks < 10 and self.looks % 2 else 1.0), self.values(theta)


def test_macro_steps_that_came_down_to_one_step_grow_again():
    found = Rehearsal(
        _WildAtFirst(EIGENVALUES),
        torch.full((len(EIGENVALUES),), 0.3, dtype=torch.float64),
        law=Law("gd"),
        lr=2e-3,
        steps=2000,
        macro=40,
        runs=range(2),
        seed=0,
        ceiling=math.inf,
        top=top(),
    ).go()
    sizes = np.diff(found.steps)
    assert sizes.min() == 1
    assert len(sizes) < 100
