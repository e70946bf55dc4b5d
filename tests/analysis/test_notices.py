import dataclasses
import math

import pytest
import torch

from zoscope import Estimate, Notice, OptimizerBounds
from zoscope.analysis import notices
from zoscope.analysis.thresholds import Binding, Horizon
from zoscope.curvature.preconditioner import Preconditioner
from zoscope.curvature.slq import Curvature, Eigenvalue
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import SampledSpectrum

CALM = Curvature(
    trace=Estimate(10.0),
    frobenius_sq=Estimate(2.0),
    lambda_max=Eigenvalue(1.0, 0.0, True),
    lambda_min=Eigenvalue(0.0, 0.0, True),
    trace_positive=Estimate(10.0),
    negative_mass=0.0,
    effective_rank=50.0,
    method="dense",
    num_hvps=0,
    seconds=0.0,
    spectrum=SampledSpectrum.exact([1.0]),
)
BOUNDS = OptimizerBounds(
    name="gd",
    rule=update_rule("gd"),
    operator="hessian",
    settings={},
    fo=1.0,
    zo_lower=0.2,
    zo_upper=0.3,
    lower_tight=0.2,
    upper_tight=0.3,
    exact=Estimate(0.1),
    horizon=Horizon(1000, 0.1, 0.1, (0.1, 0.1), ()),
    descent=1.0,
    binding=Binding("horizon", 0.1),
    recommended=0.07,
    recommended_reason="",
)


def codes(found) -> list[str]:
    return [notice.code for notice in found]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"negative_mass": 0.05}, None),
        ({"negative_mass": 5.0}, "indefinite-hessian"),
        ({"trace_positive": Estimate(0.0)}, "zero-curvature"),
        ({"effective_rank": 2.0}, "few-modes"),
        ({"lambda_max": Eigenvalue(1.0, 0.3, False)}, "lambda-max"),
    ],
)
def test_each_trouble_of_the_spectrum_has_its_notice(changes, code) -> None:
    found = codes(notices.curvature_notices(dataclasses.replace(CALM, **changes), BOUNDS))
    assert found == ([] if code is None else [code])


def test_an_interval_that_misses_the_threshold_is_named() -> None:
    (notice,) = notices.curvature_notices(dataclasses.replace(CALM, negative_mass=5.0), BOUNDS)
    assert "wholly above" in notice.message
    assert "50 %" in notice.message


def test_a_run_that_leaves_the_neighbourhood_is_announced_once() -> None:
    steep = dataclasses.replace(BOUNDS, doubts=("gradient-not-small",))
    assert codes(notices.gradient_notices([BOUNDS])) == []
    assert codes(notices.gradient_notices([BOUNDS, steep, steep])) == ["gradient-not-small"]


def test_a_provisional_recommendation_is_announced_once() -> None:
    doubted = dataclasses.replace(BOUNDS, doubts=("kinks", "ends-apart"))
    assert codes(notices.provisional_notices([BOUNDS])) == []
    assert codes(notices.provisional_notices([doubted, doubted])) == [notices.PROVISIONAL]


@pytest.mark.parametrize(
    ("collapsed", "commutator", "expected"),
    [(0.0, 0.004, []), (0.9, 0.004, ["preconditioner-collapsed"]), (0.0, 0.3, ["commutator"])],
)
def test_a_preconditioner_that_breaks_an_assumption_is_announced(collapsed, commutator, expected) -> None:
    preconditioner = Preconditioner(torch.ones(1), "expected", collapsed)
    assert codes(notices.preconditioner_notices(preconditioner, Estimate(commutator))) == expected


@pytest.mark.parametrize(("reached", "expected"), [(0.02, []), (0.021, ["precision"]), (math.inf, ["precision"])])
def test_a_missed_precision_is_announced(reached: float, expected: list[str]) -> None:
    assert codes(notices.precision_notices({"hessian": reached}, rtol=0.02, max_hvps=10, dimension=9000)) == expected


def test_a_notice_is_given_once() -> None:
    assert notices.without_repeats([Notice("a", "x"), Notice("b", "y"), Notice("a", "x")]) == (
        Notice("a", "x"),
        Notice("b", "y"),
    )
