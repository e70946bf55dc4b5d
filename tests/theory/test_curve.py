import math

import numpy as np
import pytest

from zoscope.theory.quadratic import GradientMeasure, MeanPath, QuadraticModel
from zoscope.theory.rules import EstimatorMoments, UpdateRule, estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

from .second_moment_oracle import Quadratic, expected_losses
from .test_mean_square import every_estimator, every_rule


def quadratic(rng, *, signed):
    """A rotated quadratic, with the full spectral measure of its gradient."""
    eigenvalues = 10 ** rng.uniform(-2, 0, 4) * (rng.choice([-1, 1], 4) if signed else 1)
    problem = Quadratic.random(eigenvalues, rng)
    values, vectors = np.linalg.eigh(problem.hessian)
    return problem, Spectrum.of(values), GradientMeasure(values, (vectors.T @ problem.gradient) ** 2)


def network_like(rng, *, signed):
    """A few large eigenvalues, a bulk of small ones, and a gradient that lies in both."""
    bulk = rng.exponential(0.01, 300) * (rng.choice([-1, 1], 300) if signed else 1)
    eigenvalues = np.concatenate([[3.0, 1.0], bulk])
    spectrum = Spectrum(eigenvalues, np.concatenate([[1.0, 1.0], np.full(300, 10.0)]))
    return spectrum, GradientMeasure(eigenvalues[:40], rng.uniform(0, 0.1, 40))


@pytest.mark.parametrize("signed", [False, True], ids=["positive", "indefinite"])
@every_estimator
@every_rule
def test_the_curve_is_the_exact_expected_loss_of_a_quadratic(rule, estimator, signed):
    problem, spectrum, gradient = quadratic(np.random.default_rng(3), signed=signed)
    moments = estimator_moments(estimator[0], queries=estimator[1], dimension=4)
    edge = StabilityCondition(rule, moments, 60, "full").threshold(spectrum)
    for scale in (0.2, 1.0):
        lr = scale * edge
        exact = expected_losses(problem, rule, moments, lr=lr, loss=1.5, steps=60)
        predicted = QuadraticModel(spectrum, rule, moments, gradient=gradient, loss=1.5).loss_curve(lr, 60)
        np.testing.assert_allclose(predicted, exact, rtol=1e-10, atol=1e-10 * np.abs(exact).max())


def test_the_curve_is_the_mean_of_sampled_runs():
    rng, rule, runs, steps, lr = np.random.default_rng(0), update_rule("gdm", beta=0.5), 20_000, 12, 0.03
    problem, spectrum, gradient = quadratic(rng, signed=True)
    g, H = problem.gradient, problem.hessian
    x, m, losses = np.zeros((runs, 4)), np.zeros((runs, 4)), []
    for _ in range(steps):
        u = rng.standard_normal((runs, 4))
        m = 0.5 * m + u * np.einsum("ri,ri->r", u, x @ H + g)[:, None]
        x = x - lr * m
        losses.append(x @ g + 0.5 * np.einsum("ri,ij,rj->r", x, H, x))
    predicted = QuadraticModel(spectrum, rule, gradient=gradient, loss=0.0).loss_curve(lr, steps)[1:]
    stderr = np.std(losses, axis=1) / math.sqrt(runs)
    assert (np.abs(np.mean(losses, axis=1) - predicted) < 4 * stderr).all()


def test_adam_is_exact_for_a_preconditioner_that_is_a_multiple_of_the_identity():
    p, rng, moments = 0.2, np.random.default_rng(5), estimator_moments()
    problem, spectrum, gradient = quadratic(rng, signed=False)
    scaled = Quadratic(problem.hessian / p, np.eye(4), problem.gradient / math.sqrt(p))  # in P^1/2 x
    rule = update_rule("adam")
    exact = expected_losses(scaled, rule, moments, lr=0.02, loss=1.0, steps=30)
    plain = expected_losses(
        problem, UpdateRule("", 0.9, lr_scale=0.1 / p), moments, lr=0.02, loss=1.0, steps=30
    )  # the same run in x
    predicted = QuadraticModel(
        Spectrum.of(spectrum.nodes / p),
        rule,
        gradient=GradientMeasure(gradient.nodes / p, gradient.weights / p),
        loss=1.0,
    ).loss_curve(0.02, 30)
    np.testing.assert_allclose(exact, plain, rtol=1e-12)
    np.testing.assert_allclose(predicted, exact, rtol=1e-12)


def test_the_first_value_is_the_loss_at_the_start():
    curve = QuadraticModel(
        Spectrum.of([1.0]), update_rule("gd"), gradient=GradientMeasure(np.array([1.0]), np.array([1.0])), loss=0.7
    ).loss_curve(0.1, 0)
    assert curve.tolist() == [0.7]


@pytest.mark.parametrize("signed", [False, True], ids=["positive", "indefinite"])
@every_rule
def test_the_last_loss_needs_no_loop(rule, signed):
    spectrum, gradient = network_like(np.random.default_rng(1), signed=signed)
    for moments, steps in ((EstimatorMoments(2.0, 1.0), 250), (EstimatorMoments(1.25, 0.25), 900)):
        edge = StabilityCondition(rule, moments, steps, "full").threshold(spectrum)
        for scale in (0.05, 0.5, 1.0, 1.3):
            model = QuadraticModel(spectrum, rule, moments, gradient, 1.0)
            looped = model.loss_curve(scale * edge, steps)
            size = np.abs(looped).max()
            assert model.final_loss(scale * edge, steps) == pytest.approx(looped[-1], rel=1e-8, abs=1e-8 * size)


def test_the_last_loss_of_a_very_long_run_is_that_of_its_parts():
    """Without noise the loss falls to its minimum; with a step size far below the edge it comes as close."""
    spectrum, gradient = Spectrum.of([2.0, 0.5]), GradientMeasure(np.array([2.0, 0.5]), np.ones(2))
    minimum = 5.0 - 0.5 * (1 / 2.0 + 1 / 0.5)
    for rule in map(update_rule, ("gd", "gdm", "adam")):
        loss = QuadraticModel(spectrum, rule, gradient=gradient, loss=5.0).final_loss(0.01, 10**7)
        assert loss == pytest.approx(minimum, rel=1e-9)


@every_rule
def test_a_run_that_overflows_reads_as_infinite(rule):
    spectrum, gradient = network_like(np.random.default_rng(1), signed=True)
    curve = QuadraticModel(spectrum, rule, gradient=gradient, loss=1.0).loss_curve(100000.0, 200)
    assert curve[0] == 1.0
    assert curve[-1] == math.inf
    assert not np.isnan(curve).any()
    for lr in (1e5, 1e100):
        assert QuadraticModel(spectrum, rule, gradient=gradient, loss=1.0).final_loss(lr, 10**5) == math.inf


@every_rule
@pytest.mark.parametrize("steps", [20, 1000])
def test_the_best_step_size_beats_its_neighbours(rule, steps):
    spectrum, gradient = network_like(np.random.default_rng(2), signed=False)
    upper = StabilityCondition(rule, steps=steps).threshold(spectrum)
    best = QuadraticModel(spectrum, rule, gradient=gradient, loss=1.0).best_lr(steps, upper=upper)
    assert 0 < best < upper
    losses = [
        QuadraticModel(spectrum, rule, gradient=gradient, loss=1.0).final_loss(scale * best, steps)
        for scale in (0.95, 1.0, 1.05)
    ]
    assert losses[1] < min(losses[0], losses[2], 1.0)


def test_the_best_step_size_is_capped():
    spectrum, gradient = network_like(np.random.default_rng(2), signed=False)
    best = QuadraticModel(spectrum, update_rule("gd"), gradient=gradient, loss=1.0).best_lr(100, upper=1e-06)
    assert best == pytest.approx(1e-6, rel=0.01)
    assert best <= 1e-6


def test_without_a_gradient_no_step_size_is_best():
    nothing = GradientMeasure(np.array([1.0]), np.array([0.0]))
    assert (
        QuadraticModel(Spectrum.of([1.0]), update_rule("gd"), gradient=nothing, loss=1.0).best_lr(10, upper=1.0) is None
    )


def test_bad_arguments_are_refused():
    spectrum, gradient, rule = Spectrum.of([1.0]), GradientMeasure(np.array([1.0]), np.array([1.0])), update_rule("gd")
    with pytest.raises(ValueError, match="must be"):
        QuadraticModel(spectrum, rule, gradient=gradient, loss=math.nan)
    model = QuadraticModel(spectrum, rule, gradient=gradient, loss=1.0)
    for lr, steps in ((0.0, 3), (0.1, -1), (math.inf, 3)):
        for method in (model.loss_curve, model.final_loss):
            with pytest.raises(ValueError, match="must be"):
                method(lr, steps)
    for steps, upper in ((3, math.inf), (0, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            model.best_lr(steps, upper=upper)
    for nodes, weights in (([1.0], [-1.0]), ([math.nan], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="nodes and weights"):
            GradientMeasure(np.array(nodes), np.array(weights))


@pytest.mark.parametrize("name", ["gd", "gdm"])
def test_a_given_path_that_is_the_models_own_changes_nothing(name):
    rule, lr, steps = update_rule(name, beta=0.8), 0.02, 50
    spectrum = Spectrum.of(np.linspace(0.2, 2.0, 30))
    gradient = GradientMeasure(np.array([0.3, 1.0]), np.array([0.5, 0.2]))
    model = QuadraticModel(spectrum, rule, gradient=gradient, loss=1.0)
    whole = model.loss_curve(lr, steps)
    y, m, losses, squares = np.zeros(2), np.zeros(2), [], []
    for _ in range(steps + 1):
        slope = 1 + gradient.nodes * y
        losses.append(1.0 + gradient.weights @ (y + 0.5 * gradient.nodes * y**2))
        squares.append(gradient.weights @ slope**2)
        m = rule.momentum * m + slope
        y = y - lr * m
    path = MeanPath(np.array(losses), np.array(squares))
    np.testing.assert_allclose(model.loss_curve(lr, steps, path=path), whole, rtol=1e-12)


def test_a_path_of_another_length_is_refused():
    path = MeanPath(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="path"):
        QuadraticModel(
            Spectrum.of([1.0]), update_rule("gd"), gradient=GradientMeasure(np.ones(1), np.ones(1)), loss=1.0
        ).loss_curve(0.1, 5, path=path)
