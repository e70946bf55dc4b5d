"""The sampled thresholds against dense eigenvalues, over fifty seeds each.

The products are those of the dense Hessian, which cost less; some seeds are run through autograd as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from zoscope import Estimate
from zoscope.analysis.request import wanted_precision
from zoscope.curvature.operators import DenseOperator, HessianOperator, LinearOperator
from zoscope.curvature.slq import Curvature, measure
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition

from .networks import Subject

pytestmark = pytest.mark.slow

SEEDS = 50
GD = update_rule("gd")
EXACT = StabilityCondition(GD)
FULL = StabilityCondition(GD, steps=300, version="full")
POSITIVE = StabilityCondition(GD, steps=300)

QUANTITIES: dict[str, tuple[Callable[[Curvature], Estimate], Callable[[Spectrum], float]]] = {
    "exact": (lambda c: EXACT.estimate(c.spectrum), EXACT.threshold),
    "full": (lambda c: FULL.estimate(c.spectrum), FULL.threshold),
    "positive": (lambda c: POSITIVE.estimate(c.spectrum), POSITIVE.threshold),
    "trace": (lambda c: c.trace, lambda s: s.trace),
    "frobenius_sq": (lambda c: c.frobenius_sq, lambda s: s.frobenius_sq),
}


@dataclass(frozen=True)
class Sample:
    """What fifty seeds say, by quantity.

    Args:
        error: ``(50,)`` relative errors.
        covered: Number of 95 % intervals that hold the truth.
        num_hvps: ``(50,)`` products spent.
    """

    error: dict[str, np.ndarray]
    covered: dict[str, int]
    num_hvps: np.ndarray

    def median(self, name: str) -> float:
        return float(np.median(self.error[name]))


def sampled(operator: LinearOperator, seed: int, *, infinite_time: bool, max_hvps: int) -> Curvature:
    wanted = wanted_precision([GD], steps=300, moments=GAUSSIAN, always_exact=infinite_time)
    return measure(operator, method="deflated-slq", precision=wanted, max_hvps=max_hvps, seed=seed)


def sample(subject: Subject, **options: int) -> Sample:
    operator = DenseOperator(subject.matrix)
    found = [sampled(operator, seed, **options) for seed in range(SEEDS)]
    error, covered = {}, {}
    for name, (estimate_of, truth_of) in QUANTITIES.items():
        truth, estimates = truth_of(subject.spectrum), [estimate_of(curvature) for curvature in found]
        error[name] = np.array([abs(estimate.value / truth - 1) for estimate in estimates])
        covered[name] = sum(lower <= truth <= upper for lower, upper in (estimate.interval for estimate in estimates))
    return Sample(error, covered, np.array([curvature.num_hvps for curvature in found]))


def told(sample: Sample) -> str:
    rows = [f"{name} {sample.median(name):.2%} covered {sample.covered[name]}" for name in QUANTITIES]
    return f"{np.median(sample.num_hvps):.0f} HVPs; " + "; ".join(rows)


@pytest.fixture(scope="module", params=["cnn", "relu", "transformer"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def subject(name: str, request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="module")
def infinite_time(subject: Subject) -> Sample:
    return sample(subject, infinite_time=True, max_hvps=600)


@pytest.fixture(scope="module")
def horizon(subject: Subject) -> Sample:
    return sample(subject, infinite_time=False, max_hvps=100)


def test_the_infinite_time_threshold_is_right_within_its_budget(name: str, infinite_time: Sample) -> None:
    error, hvps = {"cnn": (0.005, 150), "relu": (0.02, 600), "transformer": (0.02, 600)}[name]
    assert infinite_time.median("exact") <= error, told(infinite_time)
    assert np.median(infinite_time.num_hvps) <= hvps, told(infinite_time)


def test_a_hundred_products_suffice_for_a_horizon(name: str, horizon: Sample) -> None:
    # The decoder's curvature is spread over some ninety modes: sampling noise alone is about 1.5 % there.
    tolerance = 0.02 if name == "transformer" else 0.015
    assert horizon.num_hvps.max() <= 100, told(horizon)
    assert horizon.median("full") <= tolerance, told(horizon)
    assert horizon.median("positive") <= tolerance, told(horizon)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_intervals_cover_the_truth_as_often_as_they_say(quantity: str, infinite_time: Sample, horizon: Sample) -> None:
    least = 43  # 95 % of 50 less three standard deviations of 1.5: there are thirty of these counts
    assert infinite_time.covered[quantity] >= least, told(infinite_time)
    assert horizon.covered[quantity] >= least, told(horizon)


def test_autograd_products_give_what_the_dense_matrix_gives(subject: Subject) -> None:
    with subject.problem.prepare(device="cpu", dtype="float32") as objective:
        for seed in range(2):
            real = sampled(HessianOperator(objective), seed, infinite_time=False, max_hvps=100)
            dense = sampled(DenseOperator(subject.matrix), seed, infinite_time=False, max_hvps=100)
            for quantity, (estimate_of, _) in QUANTITIES.items():
                # Rounding may end a chain elsewhere; what comes out must agree far within its error bar.
                ours, theirs = estimate_of(real), estimate_of(dense)
                assert ours.value == pytest.approx(theirs.value, abs=0.1 * theirs.half_width + 1e-4 * theirs.value), (
                    quantity
                )
