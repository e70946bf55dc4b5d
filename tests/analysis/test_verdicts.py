import math

import numpy as np
import pytest

from zoscope.analysis.advice import GATE, MARGIN, MID_TRAINING, Advice, Limit, judge
from zoscope.theory.quadratic import GradientMeasure, QuadraticModel
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition, Version

GD = update_rule("gd")
SPECTRUM = Spectrum.of(np.geomspace(1e-3, 10, 40))


@pytest.mark.parametrize("doubts", [(), ("kinks",), ("gradient-not-small",)])
@pytest.mark.parametrize(("at", "outlook"), [("gate", "stable"), (0.99, "uncertain"), (1.01, "unstable")])
def test_the_verdict_turns_at_the_margin_and_at_the_threshold(
    at: str | float, outlook: str, doubts: tuple[str, ...]
) -> None:
    share = MID_TRAINING / MARGIN if "gradient-not-small" in doubts else 1.0
    factor = 0.99 * GATE * share if isinstance(at, str) else at
    edge = StabilityCondition(GD, steps=200).threshold(SPECTRUM)
    verdict = judge(
        factor * edge,
        steps=200,
        momentum=0.0,
        blow_up=lambda version: QuadraticModel(SPECTRUM, GD).time_to_blow_up(factor * edge, version),
        advice=Advice(None, Limit("horizon", edge, edge, edge), None, "", doubts),
        descent=edge,
    )
    assert verdict.outlook == outlook
    assert verdict.ratio == pytest.approx(factor)
    assert verdict.descends == (factor < 1)


def test_without_a_limit_the_outlook_is_uncertain_between_the_full_and_the_positive_horizon() -> None:
    spectrum = Spectrum.of([*np.geomspace(1e-3, 10, 40), -2.0])
    ends = [StabilityCondition(GD, steps=200, version=version).threshold(spectrum) for version in ("full", "positive")]
    lr = sum(ends) / 2

    def blow_up(version: Version) -> float:
        return QuadraticModel(spectrum, GD).time_to_blow_up(lr, version)

    verdict = judge(lr, steps=200, momentum=0.0, blow_up=blow_up, advice=Advice(None, None, None, ""), descent=None)
    assert verdict.outlook == "uncertain"
    assert verdict.blow_up[0] <= 200 < verdict.blow_up[1]
    assert verdict.ratio is None


def test_the_predicted_loss_doubles_sooner_at_larger_steps_and_never_at_small_ones() -> None:
    gradient = GradientMeasure(np.array([1.0]), np.array([0.01]))
    edge = StabilityCondition(GD).threshold(SPECTRUM)
    model = QuadraticModel(SPECTRUM, GD, gradient=gradient, loss=0.5)
    first = [model.doubling_times(factor * edge, 2000)[0] for factor in (0.9, 1.2, 1.5, 2.0)]
    assert math.isinf(first[0])
    assert first[1] > first[2] > first[3] > 1
