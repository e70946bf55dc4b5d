"""Weight decay and dampening against the second-moment operator."""

import numpy as np
import pytest
from scipy.optimize import brentq

from zoscope.theory.quadratic import QuadraticModel
from zoscope.theory.rules import estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition, fo_threshold

EIGENVALUES = np.array([2.0, 1.0, 0.3, 0.05])


def operator(lr, *, rule, moments, decay):
    """Matrix of a step on ``E x², E xm, E m²`` of every mode, ``g = λx + wx`` in the mean and the noise of λ alone."""
    n, beta = len(EIGENVALUES), rule.momentum
    matrix = np.zeros((3 * n, 3 * n))
    for i, curvature in enumerate(EIGENVALUES):
        pull, gain = curvature + decay, rule.lr_scale
        mm = np.zeros(3 * n)
        mm[3 * i : 3 * i + 3] = gain**2 * (pull**2 + (moments.a - 1) * curvature**2), 2 * beta * gain * pull, beta**2
        mm[::3] += gain**2 * moments.b * EIGENVALUES**2
        xm = np.zeros(3 * n)
        xm[3 * i : 3 * i + 2] = gain * pull, beta
        xx = np.zeros(3 * n)
        xx[3 * i] = 1.0
        matrix[3 * i : 3 * i + 3] = xx - 2 * lr * xm + lr**2 * mm, xm - lr * mm, mm
    return matrix


def radius(lr, **options):
    return np.abs(np.linalg.eigvals(operator(lr, **options))).max()


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(("name", "beta", "dampening"), [("gd", 0.0, 0.0), ("gdm", 0.5, 0.0), ("gdm", 0.9, 0.5)])
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
def test_the_threshold_is_where_the_second_moment_stops_shrinking(name, beta, dampening, decay, queries):
    rule = update_rule(name, beta=beta, dampening=dampening, weight_decay=decay)
    moments = estimator_moments(queries=queries)
    found = StabilityCondition(rule, moments).threshold(Spectrum.of(EIGENVALUES))

    def excess(lr):
        return radius(lr, rule=rule, moments=moments, decay=decay) - 1

    assert found == pytest.approx(brentq(excess, 0.8 * found, 1.2 * found, xtol=1e-13), rel=1e-9)
    growth = QuadraticModel(Spectrum.of(EIGENVALUES), rule, moments).growth_rate(1.1 * found)
    assert growth == pytest.approx(excess(1.1 * found) + 1, rel=1e-9)


@pytest.mark.parametrize(("name", "beta"), [("gd", 0.0), ("gdm", 0.8)])
def test_the_feedback_of_some_steps_is_the_sum_of_what_noise_causes(name, beta):
    rule, moments, lr, steps = update_rule(name, beta=beta, weight_decay=0.3), estimator_moments(), 0.05, 20
    alone = operator(lr, rule=rule, moments=estimator_moments(queries=10**12), decay=0.3)  # b = 0: no mode feels others
    own = moments.a - 1  # but its own noise is there
    noise = np.tile([lr**2, -lr, 1.0], len(EIGENVALUES))
    for i, curvature in enumerate(EIGENVALUES):
        alone[3 * i : 3 * i + 3, 3 * i] += own * curvature**2 * np.array([lr**2, -lr, 1.0])
    state, total = noise, 0.0
    for _ in range(steps):
        total += EIGENVALUES**2 @ state[::3]
        state = alone @ state
    found = StabilityCondition(rule, moments, steps).total_feedback(Spectrum.of(EIGENVALUES), lr)
    assert found == pytest.approx(total, rel=1e-9)


def test_weight_decay_counts_as_curvature_where_there_is_no_noise():
    assert fo_threshold(3.0, rule=update_rule("gdm", beta=0.5, weight_decay=1.0)) == pytest.approx(2 * 1.5 / 4.0)


def test_dampening_stretches_the_threshold():
    plain, damped = update_rule("gdm", beta=0.9), update_rule("gdm", beta=0.9, dampening=0.75)
    for steps in (None, 100):
        condition = [
            StabilityCondition(rule, steps=steps).threshold(Spectrum.of(EIGENVALUES)) for rule in (plain, damped)
        ]
        assert condition[1] == pytest.approx(4 * condition[0])
