import math

import numpy as np
import pytest

from zoscope.theory.quadratic import GradientMeasure, QuadraticModel, descent_threshold
from zoscope.theory.rules import EstimatorMoments, estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import fo_threshold

from .second_moment_oracle import Quadratic, expected_losses


@pytest.mark.parametrize("estimator", [("gaussian", 1), ("gaussian", 5), ("sphere", 2)])
def test_the_expected_loss_after_one_step_is_unchanged_at_the_threshold(estimator):
    rng, rule = np.random.default_rng(0), update_rule("gd")
    problem = Quadratic.random(np.array([3.0, 1.0, 0.5, -0.4]), rng)
    moments = estimator_moments(estimator[0], queries=estimator[1], dimension=4)
    g, H = problem.gradient, problem.hessian
    lr = descent_threshold(np.trace(H), g @ H @ g / (g @ g), moments=moments)
    before, after = expected_losses(problem, rule, moments, lr=lr, loss=0.0, steps=1)
    scale = lr * (g @ g)
    assert after - before == pytest.approx(0.0, abs=1e-13 * scale)


def test_adam_divides_by_its_preconditioner():
    rng, moments = np.random.default_rng(1), estimator_moments(queries=3)
    problem = Quadratic.random(np.array([3.0, 1.0, 0.5]), rng)
    g, H, inverse = problem.gradient, problem.hessian, np.diag([0.5, 2.0, 1.0])
    lr = descent_threshold(
        np.trace(inverse @ H @ inverse),
        g @ inverse @ H @ inverse @ g / (g @ g),
        alignment=g @ inverse @ g / (g @ g),
        moments=moments,
    )
    second_moment = moments.a * np.outer(g, g) + moments.b * (g @ g) * np.eye(3)
    change = -lr * (g @ inverse @ g) + 0.5 * lr**2 * np.trace(inverse @ H @ inverse @ second_moment)
    assert change == pytest.approx(0.0, abs=1e-13 * lr)


def test_a_multiple_of_the_identity_only_rescales():
    trace, rayleigh, p = 7.0, 2.0, 0.25
    scaled = descent_threshold(trace / p**2, rayleigh / p**2, alignment=1 / p)
    assert scaled == pytest.approx(p * descent_threshold(trace, rayleigh))


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_momentum_shrinks_the_threshold_of_slow_modes_by_one_minus_beta(beta):
    """Thousands of slow modes: after the average has filled, the loss falls below the threshold and rises above."""
    spectrum = Spectrum(np.array([1.0]), np.array([1e6]))
    gradient = GradientMeasure(np.array([1.0]), np.array([1.0]))
    edge = descent_threshold(spectrum.trace, 1.0, rule=update_rule("gdm", beta=beta))
    slopes = []
    for scale in (0.98, 1.02):
        losses = QuadraticModel(spectrum, update_rule("gdm", beta=beta), gradient=gradient, loss=0.0).loss_curve(
            scale * edge, 400
        )
        slopes.append(losses[400] - losses[200])
    assert slopes[0] < 0 < slopes[1]


@pytest.mark.parametrize("name", ["gd", "gdm", "adam"])
def test_without_noise_it_is_the_first_order_threshold_of_the_gradients_curvature(name):
    rule, without_noise = update_rule(name, beta=0.7), EstimatorMoments(a=1.0, b=0.0)
    assert descent_threshold(50.0, 4.0, moments=without_noise, rule=rule) == pytest.approx(fo_threshold(4.0, rule=rule))


@pytest.mark.parametrize("name", ["gdm", "adam"])
@pytest.mark.parametrize("queries", [20, 1000])
def test_many_queries_under_momentum_keep_the_sign_of_the_predicted_change(name, queries):
    """Between noise and determinism: half below it the predicted loss falls, at 1.5 times it rises."""
    spectrum = Spectrum(np.array([1.0]), np.array([200.0]))
    gradient = GradientMeasure(np.array([1.0]), np.array([1.0]))
    rule, moments = update_rule(name), estimator_moments(queries=queries)
    edge = descent_threshold(spectrum.trace, 1.0, moments=moments, rule=rule)
    below, above = (
        QuadraticModel(spectrum, rule, moments, gradient=gradient, loss=0.0).loss_curve(s * edge, 100)
        for s in (0.5, 1.5)
    )
    assert below[100] < below[0]
    assert above[100] > above[40]


def test_without_curvature_every_step_descends():
    assert descent_threshold(-5.0, 1.0) == math.inf
    assert descent_threshold(0.0, -1.0, alignment=2.0) == math.inf


def test_bad_arguments_are_refused():
    for call in (
        lambda: descent_threshold(math.nan, 1.0),
        lambda: descent_threshold(1.0, math.inf),
        lambda: descent_threshold(1.0, 1.0, alignment=-1.0),
        lambda: descent_threshold(1.0, 1.0, noise=math.nan),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
