import math

import numpy as np
import pytest

from zoscope.theory.rules import EstimatorMoments, estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition, growth_rate, steps_to_grow

from .second_moment_oracle import SecondMoments
from .test_mean_square import case, every_estimator, every_rule


@every_estimator
@every_rule
def test_growth_rate_is_the_radius_of_the_second_moment_operator(rule, estimator):
    for seed, signed in ((0, False), (1, False), (2, True)):
        problem, moments = case(rule, estimator, seed=seed, signed=signed)
        edge = StabilityCondition(rule, moments, 1000, "full").threshold(problem.spectrum)
        for scale in (0.3, 1.0, 2.0):
            rate = growth_rate(problem.spectrum, scale * edge, rule=rule, moments=moments)
            assert rate == pytest.approx(SecondMoments(problem, rule, moments, scale * edge).radius, rel=1e-10)


@every_estimator
@every_rule
def test_growth_rate_is_one_at_the_threshold(rule, estimator):
    problem, moments = case(rule, estimator, seed=7)
    edge = StabilityCondition(rule, moments).threshold(problem.spectrum)
    assert growth_rate(problem.spectrum, edge, rule=rule, moments=moments) == pytest.approx(1.0, abs=1e-12)


def test_without_noise_the_slowest_mode_sets_the_rate():
    noiseless, lr = EstimatorMoments(1.0, 0.0), 0.1
    rate = growth_rate(Spectrum.of([3.0, 0.5]), lr, rule=update_rule("gd"), moments=noiseless)
    assert rate == pytest.approx((1 - 0.5 * lr) ** 2, rel=1e-12)


def test_flat_directions_neither_grow_nor_decay():
    rule = update_rule("gdm")
    assert growth_rate(Spectrum.of([0.0, 0.0]), 0.1, rule=rule) == 1.0
    assert growth_rate(Spectrum.of([]), 0.1, rule=rule) == 1.0
    assert growth_rate(Spectrum.of([1.0, 0.0]), 1e-3, rule=rule) == 1.0
    assert growth_rate(Spectrum.of([1.0]), 1e-3, rule=rule) < 1.0


def test_steps_to_grow_counts_the_steps_of_the_recursion():
    rule, spectrum = update_rule("gd"), Spectrum.of([1.0, 0.5, 0.5])
    lr = 1.1 * StabilityCondition(rule).threshold(spectrum)
    rate = growth_rate(spectrum, lr, rule=rule)
    assert steps_to_grow(spectrum, lr, 1e3, rule=rule) == pytest.approx(math.log(1e3) / math.log(rate))


def test_a_slow_growth_keeps_its_precision():
    rule, spectrum = update_rule("gdm"), Spectrum.of([1.0, 0.5, -1e-12])
    steps = steps_to_grow(spectrum, 1e-3, math.e, rule=rule)
    assert steps == pytest.approx(1 / (2 * 1e-3 * 1e-12 / 0.1), rel=1e-6)  # effective step lr/(1-β) along the escape


def test_a_stable_step_size_never_grows():
    assert steps_to_grow(Spectrum.of([1.0, 2.0]), 1e-3, 10.0, rule=update_rule("adam")) == math.inf


def test_momentum_slows_growth_as_measured_on_thirty_modes():
    spectrum = Spectrum.of(np.geomspace(0.01, 1, 30))
    rates = []
    for rule in (update_rule("gd"), update_rule("gdm")):
        lr = 1.1 * StabilityCondition(rule).threshold(spectrum)
        rates.append(growth_rate(spectrum, lr, rule=rule, moments=estimator_moments()) - 1)
    assert 1e-3 < rates[1] < rates[0] < 1e-1


@pytest.mark.parametrize(("lr", "factor"), [(0.0, 2.0), (math.nan, 2.0), (0.1, 1.0), (0.1, math.inf)])
def test_bad_arguments_are_refused(lr, factor):
    with pytest.raises(ValueError, match="must be finite"):
        steps_to_grow(Spectrum.of([1.0]), lr, factor, rule=update_rule("gd"))
