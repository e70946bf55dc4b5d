"""Mean-square stability with mini-batches against the explicit second-moment operator."""

import math

import numpy as np
import pytest

from zoscope.theory.minibatch import HessianNoise, MiniBatchCondition, spread_of_batches
from zoscope.theory.rules import GAUSSIAN, estimator_moments, update_rule
from zoscope.theory.spectrum import SampledSpectrum, Spectrum
from zoscope.theory.stability import StabilityCondition

from .minibatch_oracle import Examples, MiniBatchMoments, explicit_threshold

GD, GDM = update_rule("gd"), update_rule("gdm", beta=0.8)
AGREES = 0.15


def noise_of(examples, *, modes=None):
    """All modes one by one, or the largest ones with the rest as one rule: what sampling gives in expectation."""
    values, vectors = np.linalg.eigh(examples.mean)
    away = vectors.T @ (examples.hessians - examples.mean) @ vectors
    own = slice(0 if modes is None else len(values) - modes, None)
    coupling, spread = away[:, own, own] ** 2, (away**2).sum(axis=2)
    rest = ()
    if modes is not None:
        below = slice(0, len(values) - modes)
        rule = Spectrum(values[below], spread.mean(axis=0)[below])
        rest = ((rule, rule),)
    return SampledSpectrum.exact(values), HessianNoise(values[own], coupling, spread[:, own], rest, complete=True)


def problems(count, *, seed=0):
    """Ranks one and higher, positive and indefinite examples, flat and decaying spectra."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        dimension = int(rng.integers(2, 6))
        yield Examples.random(
            rng,
            examples=int(rng.integers(dimension, 13)) + 1,
            dimension=dimension,
            rank=1 if index % 2 else int(rng.integers(2, 4)),
            indefinite=index % 4 == 2,
            scales=np.exp(-rng.uniform(0, 0.7) * np.arange(dimension)),
        )


def batch_sizes(examples):
    n = len(examples.hessians)
    return sorted({1, max(1, n // 4), n // 2, n})


def estimated(examples, batch_size, rule, *, steps=None, moments=GAUSSIAN, modes=None):
    sampled, noise = noise_of(examples, modes=modes)
    spread = spread_of_batches(len(examples.hessians), batch_size)
    return MiniBatchCondition(rule, spread, moments, steps).threshold(sampled.fine, noise)


def test_the_spread_of_batches_is_that_of_all_batches_listed():
    examples = Examples.random(np.random.default_rng(1), examples=6, dimension=3, rank=2)
    for size in range(1, 7):
        listed = examples.enumerated(lambda h: h @ h, size)
        s = spread_of_batches(6, size)
        spread = (examples.hessians @ examples.hessians).mean(axis=0) - examples.mean @ examples.mean
        np.testing.assert_allclose(examples.mean @ examples.mean + s * spread, listed, rtol=1e-12)
        np.testing.assert_allclose(examples.expectation(lambda h: h @ h, size), listed, rtol=1e-12)


@pytest.mark.parametrize(("rule", "count"), [(GD, 20), (GDM, 6)], ids=["gd", "gdm"])
def test_infinite_time_agrees_with_the_explicit_operator_on_random_problems(rule, count):
    for examples in problems(count):
        for size in batch_sizes(examples):
            value = estimated(examples, size, rule)
            assert value == pytest.approx(explicit_threshold(examples, size, rule, GAUSSIAN, guess=value), rel=AGREES)


@pytest.mark.parametrize("rule", [GD, GDM], ids=["gd", "gdm"])
def test_the_horizon_agrees_with_the_explicit_recursion(rule):
    for examples in problems(4, seed=1):
        for size in (1, len(examples.hessians) // 2):
            value = estimated(examples, size, rule, steps=40)
            true = explicit_threshold(examples, size, rule, GAUSSIAN, guess=value, steps=40)
            assert value == pytest.approx(true, rel=AGREES)


@pytest.mark.parametrize("steps", [None, 40])
@pytest.mark.parametrize(("name", "beta"), [("gd", 0.0), ("gdm", 0.8)])
def test_weight_decay_moves_the_mean_alone(name, beta, steps):
    for examples in problems(3, seed=3):
        decay = 0.4 * float(np.trace(examples.mean)) / len(examples.mean)
        rule = update_rule(name, beta=beta, weight_decay=decay)
        value = estimated(examples, 2, rule, steps=steps)
        true = explicit_threshold(examples, 2, rule, GAUSSIAN, guess=value, steps=steps)
        assert value == pytest.approx(true, rel=AGREES)
        plain = estimated(examples, 2, update_rule(name, beta=beta), steps=steps)
        assert abs(value / plain - 1) > 0.05


def test_other_estimators_agree_too():
    moments = estimator_moments("sphere", queries=3, dimension=4)
    for examples in problems(4, seed=2):
        value = estimated(examples, 2, GD, moments=moments)
        assert value == pytest.approx(explicit_threshold(examples, 2, GD, moments, guess=value), rel=AGREES)


@pytest.mark.parametrize("steps", [None, 50])
@pytest.mark.parametrize("rule", [GD, GDM], ids=["gd", "gdm"])
def test_all_examples_at_every_step_give_the_full_batch_threshold(rule, steps):
    for examples in problems(4, seed=3):
        sampled, noise = noise_of(examples)
        found = MiniBatchCondition(rule, 0.0, GAUSSIAN, steps).estimate(sampled, noise)
        assert found.value == StabilityCondition(rule, GAUSSIAN, steps).threshold(sampled.fine)


def test_modes_in_the_rest_differ_from_modes_one_by_one_by_their_coupling_alone():
    rng = np.random.default_rng(4)
    examples = Examples.random(rng, examples=60, dimension=40, rank=3)
    whole, parted = (estimated(examples, 8, GD, steps=100, modes=modes) for modes in (None, 8))
    assert whole <= parted <= 1.1 * whole


def test_proved_bounds_enclose_the_threshold():
    """``1/(b Tr Q + a λ_max(Q)) ≤ η* ≤ 1/(b Tr Q)`` with ``HQ + QH = C``, and ``Tr Q ≤ (n/2B) Tr H`` for H_e ⪰ 0."""
    for index, examples in enumerate(problems(8)):
        values, vectors = np.linalg.eigh(examples.mean)
        for size in batch_sizes(examples):
            square = MiniBatchMoments(examples, size, GD, GAUSSIAN, 1.0).square
            lyapunov = vectors.T @ square @ vectors / (values[:, None] + values)
            upper = 1 / (GAUSSIAN.b * np.trace(lyapunov))
            lower = 1 / (GAUSSIAN.b * np.trace(lyapunov) + GAUSSIAN.a * np.linalg.eigvalsh(lyapunov)[-1])
            true = explicit_threshold(examples, size, GD, GAUSSIAN, guess=lower)
            assert lower * 0.997 <= true <= upper * 1.003
            if index % 4 != 2:
                assert np.trace(lyapunov) <= len(examples.hessians) / size / 2 * values.sum() * (1 + 1e-12)


def test_spread_along_flat_curvature_leaves_no_step_size_stable_for_ever():
    noise = HessianNoise(np.array([0.0, 1.0]), np.ones((3, 2, 2)), np.full((3, 2), 2.0), (), complete=True)
    sampled = SampledSpectrum.exact([0.0, 1.0])
    assert MiniBatchCondition(GD, 0.5).estimate(sampled, noise) is None
    for_a_while = MiniBatchCondition(GD, 0.5, steps=100).estimate(sampled, noise)
    assert 0 < for_a_while.value < math.inf


def test_error_bars_come_from_groups_and_probe_vectors():
    rng = np.random.default_rng(5)
    spread = rng.uniform(1, 2, (16, 2))
    coupling = np.einsum("ki,kj->kij", spread, spread) / 8
    rules = [Spectrum([0.1, 0.2], rng.uniform(1, 2, 2)) for _ in range(4)]
    pairs = tuple(zip(rules, rules, strict=True))
    noise = HessianNoise(np.array([1.0, 2.0]), coupling, spread, pairs, complete=False)
    found = MiniBatchCondition(GD, 0.3, steps=100).estimate(SampledSpectrum.exact([0.1, 0.2, 1.0, 2.0]), noise)
    assert 0 < found.stderr < 0.5 * found.value


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_batch_sizes_are_positive_integers(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        spread_of_batches(10, batch_size)
