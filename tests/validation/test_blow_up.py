"""When real ZO-GD leaves the valley, against the times that theory gives.

The time to blow-up T is where noise feeds back as much as was put in. It is when a run is seen to leave where two
things hold: many modes share the trace, so that a typical run is like the mean; and T is 50 to 100 steps, longer than
the growth that follows and shorter than the time in which the curvature itself changes. At T of a few steps the growth
decides, at several hundred the sharpening, and near a minimum with few modes always the growth.
"""

from collections.abc import Callable

import numpy as np
import pytest

import zoscope
from zoscope.analysis.request import wanted_precision
from zoscope.curvature.operators import HessianOperator
from zoscope.curvature.slq import measure
from zoscope.theory.quadratic import QuadraticModel
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

from .networks import Subject, exit_step, middle, rectified, wide

pytestmark = pytest.mark.slow

GD = update_rule("gd")
RUNS = range(200, 211)


def spectrum_of(problem: zoscope.Problem) -> Spectrum:
    wanted = wanted_precision([GD], steps=1000, moments=GAUSSIAN)
    with problem.prepare(device="cpu", dtype="float32") as objective:
        return measure(HessianOperator(objective), method="deflated-slq", precision=wanted, max_hvps=400).spectrum.fine


def median_exit(problem: zoscope.Problem, lr: float, *, steps: int) -> float:
    return float(np.median([exit_step(problem, lr=lr, steps=steps, seed=seed) for seed in RUNS]))


@pytest.mark.parametrize("make", [rectified, middle, wide])  # d = 3,466, 26,122 and 112,810
def test_runs_leave_between_the_two_times_to_blow_up(make: Callable[[], zoscope.Problem]) -> None:
    problem = make()
    spectrum = spectrum_of(problem)
    planned = StabilityCondition(GD, steps=1000).threshold(spectrum)
    for horizon in (100, 70, 50):
        lr = StabilityCondition(GD, steps=horizon).threshold(spectrum)
        assert lr > 1.1 * planned
        full = QuadraticModel(spectrum, GD).time_to_blow_up(lr, version="full")
        positive = QuadraticModel(spectrum, GD).time_to_blow_up(lr, version="positive")
        seen = median_exit(problem, lr, steps=4 * horizon)
        assert full / 1.5 <= seen <= 1.5 * positive, (horizon, full, seen, positive)


@pytest.mark.parametrize("ratio", [1.15, 1.5, 2.0])
def test_with_few_modes_a_typical_run_of_the_quadratic_model_tells_when(cnn: Subject, ratio: float) -> None:
    """Six modes share the trace: noise feeds itself after five steps or sooner, and then grows slowly, or not yet."""
    lr = ratio * StabilityCondition(GD, steps=1000).threshold(cnn.spectrum)
    assert QuadraticModel(cnn.spectrum, GD).time_to_blow_up(lr) <= 5
    seen = median_exit(cnn.problem, lr, steps=1000)
    typical = float(np.median(model_exits(cnn, lr, steps=1000)))
    assert typical / 2 <= seen <= 2 * typical, (ratio, typical, seen)


def model_exits(subject: Subject, lr: float, *, steps: int, runs: int = 32) -> np.ndarray:
    """Steps after which runs of the quadratic model first have twice their loss, ``(runs,)``."""
    rng = np.random.default_rng(0)
    eigenvalues, slope = subject.spectrum.nodes, np.sqrt(subject.gradient.weights)
    x, exits = np.zeros((runs, eigenvalues.size)), np.full(runs, np.inf)
    for step in range(1, steps + 1):
        u = rng.standard_normal(x.shape, dtype=np.float32)
        x -= lr * ((slope + eigenvalues * x) * u).sum(axis=1, keepdims=True) * u
        loss = subject.loss + x @ slope + 0.5 * (x * x) @ eigenvalues
        exits[(loss > 2 * subject.loss) & np.isinf(exits)] = step
        if np.isfinite(exits).mean() > 0.6:  # the median is settled
            break
    return exits
