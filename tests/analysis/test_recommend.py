import math

import numpy as np
import pytest

from zoscope.analysis.optimizer_bounds import Binding
from zoscope.analysis.recommend import MARGIN, choose_binding, doubling_steps, judge, recommend
from zoscope.theory.curve import GradientMeasure
from zoscope.theory.mean_square import StabilityCondition
from zoscope.theory.moments import GAUSSIAN
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum

GD = update_rule("gd")
SPECTRUM = Spectrum.of(np.geomspace(1e-3, 10, 40))


@pytest.mark.parametrize(
    ("horizon", "descent", "name"), [(1.0, 2.0, "horizon"), (2.0, 1.0, "descent"), (2.0, None, "horizon")]
)
def test_the_smaller_of_horizon_and_descent_binds(horizon: float, descent: float | None, name: str) -> None:
    assert choose_binding("binding", horizon=horizon, descent=descent, exact=0.1).name == name


def test_a_threshold_that_was_chosen_binds() -> None:
    values = {"horizon": 1.0, "descent": 2.0, "exact": 3.0}
    for name, value in values.items():
        assert choose_binding(name, **values) == Binding(name, value)


def test_nothing_binds_where_nothing_is_known() -> None:
    assert choose_binding("descent", horizon=1.0, descent=None, exact=1.0) is None
    assert choose_binding("binding", horizon=None, descent=None, exact=1.0) == Binding("exact", 1.0)


def test_the_recommendation_keeps_its_margin() -> None:
    value, reason = recommend(Binding("horizon", 2.0))
    assert value == MARGIN * 2.0
    assert reason


@pytest.mark.parametrize("binding", [None, Binding("horizon", math.inf)])
def test_nothing_is_recommended_where_nothing_limits(binding: Binding | None) -> None:
    assert recommend(binding)[0] is None


@pytest.mark.parametrize(("factor", "outlook"), [(0.99, "stable"), (1.01, "unstable")])
def test_the_verdict_turns_at_the_horizon_threshold(factor: float, outlook: str) -> None:
    edge = StabilityCondition(GD, steps=200).threshold(SPECTRUM)
    verdict = judge(
        factor * edge,
        steps=200,
        spectrum=SPECTRUM,
        rule=GD,
        moments=GAUSSIAN,
        binding=Binding("horizon", edge),
        descent=edge,
    )
    assert verdict.outlook == outlook
    assert verdict.ratio == pytest.approx(factor)
    assert verdict.descends == (factor < 1)


def test_the_outlook_is_uncertain_between_the_full_and_the_positive_horizon() -> None:
    spectrum = Spectrum.of([*np.geomspace(1e-3, 10, 40), -2.0])
    ends = [StabilityCondition(GD, steps=200, version=version).threshold(spectrum) for version in ("full", "positive")]
    verdict = judge(sum(ends) / 2, steps=200, spectrum=spectrum, rule=GD, moments=GAUSSIAN, binding=None, descent=None)
    assert verdict.outlook == "uncertain"
    assert verdict.blow_up[0] <= 200 < verdict.blow_up[1]
    assert verdict.ratio is None


def test_the_predicted_loss_doubles_sooner_at_larger_steps_and_never_at_small_ones() -> None:
    gradient = GradientMeasure(np.array([1.0]), np.array([0.01]))
    edge = StabilityCondition(GD).threshold(SPECTRUM)
    first = [
        doubling_steps(
            factor * edge, steps=2000, spectrum=SPECTRUM, gradient=gradient, loss=0.5, rule=GD, moments=GAUSSIAN
        )[0]
        for factor in (0.9, 1.2, 1.5, 2.0)
    ]
    assert math.isinf(first[0])
    assert first[1] > first[2] > first[3] > 1
