import math

import numpy as np
import pytest

from zoscope import Estimate
from zoscope.analysis.request import relative_half_width, wanted_precision
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import SampledSpectrum, Spectrum
from zoscope.theory.stability import StabilityCondition, horizon_curve

GD = update_rule("gd")


def sampled(nodes: np.ndarray) -> SampledSpectrum:
    spectrum = Spectrum.of(nodes)
    return SampledSpectrum(spectrum, spectrum, num_probes=4, dimension=nodes.size)


# The noise of many modes caps the step size: at η* each of 2,000 equal ones needs about 1,000 steps, 4 need about 2.
SLOW = sampled(np.linspace(1, 2, 2000))
FAST = sampled(np.linspace(1, 2, 4))


def test_an_exact_spectrum_is_precise() -> None:
    assert wanted_precision([GD], steps=100, moments=GAUSSIAN)(SampledSpectrum.exact([1.0, 2.0])) == 0


def test_a_zero_spectrum_needs_no_more_products() -> None:
    nothing = Spectrum(np.zeros(3), np.ones(3))
    spectrum = SampledSpectrum(nothing, nothing, num_probes=4, dimension=3)
    assert wanted_precision([GD], steps=100, moments=GAUSSIAN)(spectrum) == 0


def test_infinite_time_counts_only_where_it_is_close_to_binding() -> None:
    for spectrum, counts in ((SLOW, False), (FAST, True)):
        (point,) = horizon_curve(spectrum, [100], rule=GD)
        of_horizon = max(relative_half_width(point.lower), relative_half_width(point.upper))
        of_exact = relative_half_width(StabilityCondition(GD).estimate(spectrum))
        expected = max(of_horizon, of_exact) if counts else of_horizon
        assert wanted_precision([GD], steps=100, moments=GAUSSIAN)(spectrum) == pytest.approx(expected)
        asked_for = wanted_precision([GD], steps=100, moments=GAUSSIAN, always_exact=True)(spectrum)
        assert asked_for == pytest.approx(max(of_horizon, of_exact))


def test_the_worst_of_the_rules_that_share_an_operator_counts() -> None:
    rules = [GD, update_rule("gdm")]
    each = [wanted_precision([rule], steps=100, moments=GAUSSIAN)(FAST) for rule in rules]
    assert wanted_precision(rules, steps=100, moments=GAUSSIAN)(FAST) == max(each)


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(2.0, 0.1 / 1.96), 0.05),
        (Estimate(math.inf), 0.0),
        (Estimate(math.inf, quadrature=math.inf), math.inf),
        (Estimate(0.0, 1.0), math.inf),
    ],
)
def test_the_relative_half_width_is_never_a_nan(estimate: Estimate, expected: float) -> None:
    assert relative_half_width(estimate) == pytest.approx(expected)
