import math

import numpy as np
import pytest

from zoscope.theory.quadratic import GradientMeasure, QuadraticModel
from zoscope.theory.rules import GAUSSIAN, estimator_moments, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

FEW = np.array([20.0, 6.0, 3.0, *np.full(40, 0.2)])
MANY = np.linspace(0.5, 1.5, 60)


def simulated(eigenvalues, *, lr, beta, queries, start, steps, runs, seed):
    """Oracle: the optimizer itself on the quadratic; median step at which the loss has doubled."""
    rng = np.random.default_rng(seed)
    x = np.tile(start, (runs, 1))
    m = np.zeros_like(x)
    first = 0.5 * eigenvalues @ start**2
    risen = np.zeros(runs, dtype=bool)
    for step in range(1, steps + 1):
        u = rng.standard_normal((queries, *x.shape))
        estimate = (u * (u * (eigenvalues * x)).sum(axis=2, keepdims=True)).mean(axis=0)
        m = beta * m + estimate
        x = x - lr * m
        risen |= 0.5 * (x**2) @ eigenvalues >= 2 * first
        if 2 * risen.sum() >= runs:
            return step
    return math.inf


@pytest.mark.parametrize("name", ["gd", "gdm"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("eigenvalues", [FEW, MANY], ids=["few modes", "many modes"])
def test_typical_runs_double_when_real_ones_do(name, queries, eigenvalues):
    rule, moments = update_rule(name, beta=0.9), estimator_moments(queries=queries)
    spectrum = Spectrum.of(eigenvalues)
    lr = 1.6 * StabilityCondition(rule, moments).threshold(spectrum)
    # Gradient spread over slow modes, as after training: the start is far out in flat directions.
    start = np.where(eigenvalues < 2, 1.0 / eigenvalues, 0.0)
    g = eigenvalues * start
    options = {"lr": lr, "steps": 3000}
    real = simulated(eigenvalues, beta=rule.momentum, queries=queries, start=start, runs=400, seed=1, **options)
    loss = 0.5 * eigenvalues @ start**2
    model = QuadraticModel(spectrum, rule, moments, GradientMeasure(eigenvalues, g**2), loss)
    found = model.doubling_time(runs=400, **options)
    # Two medians of 400 runs, each known to about 8 % where times scatter by their own size.
    assert found == pytest.approx(real, rel=0.3, abs=2)


def test_a_typical_run_outlives_the_mean_square_where_one_mode_dominates():
    spectrum = Spectrum.of([10.0, 0.01])
    lr = 1.2 * StabilityCondition(update_rule("gd")).threshold(spectrum)
    gradient = GradientMeasure(np.array([0.01]), np.array([1e-4]))
    assert QuadraticModel(spectrum, update_rule("gd"), gradient=gradient, loss=1.0).doubling_time(lr, 2000) == math.inf


def test_a_stable_step_size_never_doubles_the_loss():
    lr = 0.5 * StabilityCondition(update_rule("gd")).threshold(Spectrum.of(MANY))
    gradient = GradientMeasure(np.array([1.0]), np.array([0.5]))
    found = QuadraticModel(
        Spectrum.of(MANY), update_rule("gd"), moments=GAUSSIAN, gradient=gradient, loss=1.0
    ).doubling_time(lr, 500)
    assert found == math.inf


def test_bulk_nodes_stand_for_the_eigenvalues_that_they_count():
    eigenvalues = np.concatenate([[8.0, 4.0], np.full(3000, 0.01)])
    grouped = Spectrum(np.array([8.0, 4.0, 0.01]), np.array([1.0, 1.0, 3000.0]))
    gradient = GradientMeasure(np.array([0.01]), np.array([1.0]))
    times = [
        QuadraticModel(spectrum, update_rule("gd"), gradient=gradient, loss=2.0).doubling_time(0.08, 500, runs=200)
        for spectrum in (Spectrum.of(eigenvalues), grouped)
    ]
    assert times[0] == pytest.approx(times[1], rel=0.25)
