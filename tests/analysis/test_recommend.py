import math

import pytest

from zoscope import Estimate
from zoscope.analysis.advice import (
    APART,
    DOUBTS,
    GATE,
    MARGIN,
    MID_TRAINING,
    Limit,
    Thresholds,
    advise,
    choose_binding,
    stand,
)
from zoscope.analysis.thresholds import Binding
from zoscope.theory.stability import HorizonPoint


def thresholds(
    *,
    horizon: float = 1.0,
    full: float | None = None,
    short: float | None = None,
    descent: float | None = None,
    error: float = 0.0,
    minibatch: bool = False,
) -> Thresholds:
    def known(value: float) -> Estimate:
        return Estimate(value, quadrature=error * value)

    point = HorizonPoint(1000, known(horizon if full is None else full), known(horizon))
    falling = None if descent is None else known(descent)
    return Thresholds(point, falling, known(0.5), None if short is None else known(short), minibatch)


@pytest.mark.parametrize(
    ("horizon", "descent", "name"), [(1.0, 2.0, "horizon"), (2.0, 1.0, "descent"), (2.0, None, "horizon")]
)
def test_the_smaller_of_horizon_and_descent_binds(horizon: float, descent: float | None, name: str) -> None:
    found = choose_binding("binding", thresholds(horizon=horizon, descent=descent))
    assert found is not None
    assert found.name == name


def test_a_threshold_that_was_chosen_binds() -> None:
    known = thresholds(horizon=1.0, descent=2.0)
    assert choose_binding("horizon", known) == Binding("horizon", 1.0)
    assert choose_binding("descent", known) == Binding("descent", 2.0)
    assert choose_binding("exact", known) == Binding("exact", 0.5)


def test_nothing_binds_where_nothing_is_known() -> None:
    found = advise("descent", thresholds(descent=None))
    assert (found.binding, found.limit, found.recommended) == (None, None, None)


def test_the_recommendation_keeps_its_margin() -> None:
    found = advise("binding", thresholds(horizon=2.0))
    assert found.recommended == MARGIN * 2.0
    assert not found.doubts
    assert "provisional" not in found.reason


@pytest.mark.parametrize("code", DOUBTS)
def test_in_doubt_eta_300_of_all_eigenvalues_counts_too_and_the_reason_is_said(code: str) -> None:
    found = advise("binding", thresholds(horizon=2.0, descent=1.5, short=1.2), (code,))
    margin = MID_TRAINING if code == "gradient-not-small" else MARGIN
    assert found.recommended == pytest.approx(margin * 1.2)
    assert found.reason.startswith(f"{margin:g} × the smallest")
    assert found.binding == Binding("descent", 1.5)
    assert found.limit is not None
    assert (found.limit.name, found.limit.high) == ("short-horizon", 2.0)
    assert found.reason.endswith(f"provisional, because {DOUBTS[code]}")


def test_the_lower_end_at_a_long_horizon_never_counts() -> None:
    found = advise("binding", thresholds(horizon=1.0, full=0.1, short=1.5), ("ends-apart",))
    assert found.recommended == pytest.approx(MARGIN)
    assert found.limit is not None
    assert found.limit.low == 1.0


@pytest.mark.parametrize(("full", "apart"), [(1.01 * APART, False), (0.99 * APART, True)])
def test_the_ends_are_apart_below_four_fifths(full: float, apart: bool) -> None:
    assert thresholds(full=full).ends_are_apart is apart


def test_nothing_is_recommended_where_nothing_limits() -> None:
    found = advise("binding", thresholds(horizon=math.inf))
    assert found.recommended is None
    assert "nothing limits" in found.reason


def test_without_positive_curvature_the_lower_end_is_all_there_is() -> None:
    known = thresholds(horizon=math.inf, full=0.2, short=0.4)
    assert known.ends_are_apart
    assert advise("binding", known, ("ends-apart",)).recommended == pytest.approx(MARGIN * 0.4)


def test_a_threshold_that_is_poorly_known_is_kept_clear_of() -> None:
    known = advise("horizon", thresholds(error=0.4))
    assert known.recommended == pytest.approx(GATE * 0.6)
    assert "95 %" in known.reason
    unknown = advise("horizon", thresholds(error=1.2))
    assert unknown.recommended is None
    assert "reaches down to 0" in unknown.reason


def test_where_the_gradient_is_not_small_less_passes_by_as_much_as_less_is_recommended() -> None:
    doubts = ("gradient-not-small",)
    known = advise("horizon", thresholds(error=0.4), doubts)
    assert known.limit is not None
    assert known.recommended == pytest.approx(min(MID_TRAINING, GATE * MID_TRAINING / MARGIN * 0.6))
    assert stand(known.recommended, known.limit, doubts=doubts) == "stable"
    assert stand(0.99 * GATE * 0.6, known.limit) == "stable"
    assert stand(0.99 * GATE * 0.6, known.limit, doubts=doubts) == "uncertain"


def test_between_descent_and_horizon_a_step_size_is_uncertain() -> None:
    limit = advise("binding", thresholds(horizon=2.0, descent=1.0)).limit
    assert limit is not None
    assert [stand(lr, limit) for lr in (GATE, 0.9, 1.5, 2.0, 2.1)] == ["stable", *["uncertain"] * 3, "unstable"]


@pytest.mark.parametrize(("minibatch", "edge"), [(False, 1.0), (True, 2.0)])
def test_runs_leave_where_something_binds_and_with_mini_batches_at_the_horizon(minibatch: bool, edge: float) -> None:
    limit = advise("binding", thresholds(horizon=2.0, descent=1.0, short=0.5, minibatch=minibatch), ("kinks",)).limit
    assert limit is not None
    assert limit.edge == edge


@pytest.mark.parametrize(("error", "wide"), [(0.0, False), (0.49, False), (0.51, True), (2.0, True)])
def test_an_interval_is_wide_where_its_ends_are_more_than_three_apart(error: float, wide: bool) -> None:
    assert Limit("exact", 1.0, 1 - error, 1 + error, error).is_wide is wide
