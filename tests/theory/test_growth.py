import math

import numpy as np
import pytest

from zoscope.theory.quadratic import QuadraticModel
from zoscope.theory.rules import EstimatorMoments, estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

from .second_moment_oracle import SecondMoments
from .test_mean_square import case, every_estimator, every_rule


@every_estimator
@every_rule
def test_growth_rate_is_the_radius_of_the_second_moment_operator(rule, estimator):
    for seed, signed in ((0, False), (1, False), (2, True)):
        problem, moments = case(rule, estimator, seed=seed, signed=signed)
        edge = StabilityCondition(rule, moments, 1000, "full").threshold(problem.spectrum)
        for scale in (0.3, 1.0, 2.0):
            rate = QuadraticModel(problem.spectrum, rule, moments).growth_rate(scale * edge)
            assert rate == pytest.approx(SecondMoments(problem, rule, moments, scale * edge).radius, rel=1e-10)


@every_estimator
@every_rule
def test_growth_rate_is_one_at_the_threshold(rule, estimator):
    problem, moments = case(rule, estimator, seed=7)
    edge = StabilityCondition(rule, moments).threshold(problem.spectrum)
    assert QuadraticModel(problem.spectrum, rule, moments).growth_rate(edge) == pytest.approx(1.0, abs=1e-12)


def test_without_noise_the_slowest_mode_sets_the_rate():
    noiseless, lr = EstimatorMoments(1.0, 0.0), 0.1
    rate = QuadraticModel(Spectrum.of([3.0, 0.5]), update_rule("gd"), moments=noiseless).growth_rate(lr)
    assert rate == pytest.approx((1 - 0.5 * lr) ** 2, rel=1e-12)


def test_flat_directions_neither_grow_nor_decay():
    rule = update_rule("gdm")
    assert QuadraticModel(Spectrum.of([0.0, 0.0]), rule).growth_rate(0.1) == 1.0
    assert QuadraticModel(Spectrum.of([]), rule).growth_rate(0.1) == 1.0
    assert QuadraticModel(Spectrum.of([1.0, 0.0]), rule).growth_rate(0.001) == 1.0
    assert QuadraticModel(Spectrum.of([1.0]), rule).growth_rate(0.001) < 1.0


def test_steps_to_grow_counts_the_steps_of_the_recursion():
    rule, spectrum = update_rule("gd"), Spectrum.of([1.0, 0.5, 0.5])
    lr = 1.1 * StabilityCondition(rule).threshold(spectrum)
    rate = QuadraticModel(spectrum, rule).growth_rate(lr)
    assert QuadraticModel(spectrum, rule).steps_to_grow(lr, 1000.0) == pytest.approx(math.log(1e3) / math.log(rate))


def test_a_slow_growth_keeps_its_precision():
    rule, spectrum = update_rule("gdm"), Spectrum.of([1.0, 0.5, -1e-12])
    steps = QuadraticModel(spectrum, rule).steps_to_grow(0.001, math.e)
    assert steps == pytest.approx(1 / (2 * 1e-3 * 1e-12 / 0.1), rel=1e-6)  # effective step lr/(1-β) along the escape


def test_a_stable_step_size_never_grows():
    assert QuadraticModel(Spectrum.of([1.0, 2.0]), update_rule("adam")).steps_to_grow(0.001, 10.0) == math.inf


def test_momentum_slows_growth_as_measured_on_thirty_modes():
    spectrum = Spectrum.of(np.geomspace(0.01, 1, 30))
    rates = []
    for rule in (update_rule("gd"), update_rule("gdm")):
        lr = 1.1 * StabilityCondition(rule).threshold(spectrum)
        rates.append(QuadraticModel(spectrum, rule, moments=estimator_moments()).growth_rate(lr) - 1)
    assert 1e-3 < rates[1] < rates[0] < 1e-1


@pytest.mark.parametrize(("lr", "factor"), [(0.0, 2.0), (math.nan, 2.0), (0.1, 1.0), (0.1, math.inf)])
def test_bad_arguments_are_refused(lr, factor):
    with pytest.raises(ValueError, match="must be finite"):
        QuadraticModel(Spectrum.of([1.0]), update_rule("gd")).steps_to_grow(lr, factor)
