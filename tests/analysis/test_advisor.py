import numpy as np
import pytest

from zoscope.analysis.advice import LONG_WAY, Advisor, decrease
from zoscope.theory.quadratic import GradientMeasure
from zoscope.theory.rules import GAUSSIAN, update_rule
from zoscope.theory.spectrum import SampledSpectrum


@pytest.mark.parametrize(
    ("node", "gain"),
    [
        (0.5, (1 - (1 - 0.07 * 0.5) ** 2000) / 1.0),
        (0.0, 70.0),
        (1e-15, 70.0),
        (-1e-3, (1 - (1 + 0.07e-3) ** 2000) / -2e-3),
    ],
)
def test_the_gain_of_a_run_is_that_of_the_quadratic_model(node: float, gain: float) -> None:
    found = decrease(GradientMeasure(np.array([node]), np.array([2.0])), step=0.07, steps=1000)
    assert found == pytest.approx(2 * gain)


def test_a_gain_without_bound_counts_as_a_long_way() -> None:
    gradient = GradientMeasure(np.array([-50.0, 14.0]), np.array([1.0, 1.0]))
    assert decrease(gradient, step=0.07, steps=1000) > LONG_WAY


def test_each_number_of_steps_has_its_own_doubts() -> None:
    gradient = GradientMeasure(np.array([0.01]), np.array([2.0]))
    spectrum = SampledSpectrum.exact(np.geomspace(1e-3, 10, 30))
    advisor = Advisor(update_rule("gd"), GAUSSIAN, spectrum, gradient, 1.0, None, None)
    assert advisor.at(1, "binding").doubts == ()
    assert advisor.at(1000, "binding").doubts == ("gradient-not-small",)
