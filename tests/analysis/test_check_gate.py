import json
import math

import numpy as np
import pytest

from zoscope import CheckReport, CheckResult, UsageError
from zoscope.analysis.advice import Limit
from zoscope.analysis.check import decide, round_down
from zoscope.analysis.check_results import EXIT_ORDER
from zoscope.analysis.check_runner import Held, OptimizerThresholds

EXACT = Limit("exact", 1.0, 0.9, 1.1, 0.1)


def status(lr: float, *, margin: float = 0.8, on_warn: str = "pass", threshold: Limit = EXACT) -> str:
    return decide(lr, threshold, margin=margin, on_warn=on_warn, steps=1000).status


def test_an_lr_up_to_the_margin_of_the_lower_end_passes() -> None:
    assert status(0.8 * 0.9) == "pass"
    assert status(math.nextafter(0.8 * 0.9, 1)) == "warn"


def test_an_lr_above_the_upper_end_fails() -> None:
    assert status(1.1) == "warn"
    assert status(math.nextafter(1.1, 2)) == "fail"


def test_a_warning_fails_where_the_policy_says_so() -> None:
    assert status(1.0, on_warn="fail") == "fail"
    assert status(0.1, on_warn="fail") == "pass"


def test_every_lr_passes_where_no_curvature_limits_it() -> None:
    flat = Limit("exact", math.inf, math.inf, math.inf)
    decision = decide(1e9, flat, margin=0.8, on_warn="fail", steps=1)
    assert (decision.status, decision.largest_lr) == ("pass", None)


def test_an_interval_down_to_zero_passes_nothing_and_says_so() -> None:
    vague = Limit("exact", 1.0, 0.0, 5.0, 3.0)
    decision = decide(1e-9, vague, margin=0.8, on_warn="pass", steps=1)
    assert (decision.status, decision.largest_lr) == ("warn", None)
    assert "No lr passes" in decision.message


def test_the_advice_passes_and_the_next_two_digit_number_does_not() -> None:
    rng = np.random.default_rng(0)
    for low in 10.0 ** rng.uniform(-9, 3, size=500):
        threshold = Limit("exact", low * 1.05, low, low * 1.1)
        decision = decide(1.0, threshold, margin=0.8, on_warn="pass", steps=1)
        assert decision.largest_lr is not None
        assert status(decision.largest_lr, threshold=threshold) == "pass"
        step = 10.0 ** (math.floor(math.log10(decision.largest_lr)) - 1)
        assert status(decision.largest_lr + 1.01 * step, threshold=threshold) != "pass"


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.01629, 0.016), (0.0199999, 0.019), (123.0, 120.0), (5e-324, 4.9e-324)]
)
def test_rounding_goes_down_to_two_digits(value: float, rounded: float) -> None:
    assert round_down(value) == rounded


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_there_is_no_rounded_value_of_what_is_no_step_size(value: float) -> None:
    assert round_down(value) is None


def test_a_first_order_optimizer_is_held_against_the_first_order_threshold() -> None:
    fo = Limit("fo", 2.0, 1.9, 2.0)
    known = OptimizerThresholds(fo, {9: {"binding": Held(EXACT, ("kinks",))}})
    assert known.choose("exact", zeroth_order=False, steps=9, curvature="hessian") == Held(fo)
    assert known.choose("binding", zeroth_order=True, steps=9, curvature="hessian") == Held(EXACT, ("kinks",))


def test_a_threshold_that_is_not_known_is_a_usage_error_that_names_the_known_ones() -> None:
    known = OptimizerThresholds(EXACT, {9: {"binding": Held(EXACT)}})
    with pytest.raises(UsageError, match=r"the horizon threshold is not known .*\(known: binding\)"):
        known.choose("horizon", zeroth_order=True, steps=9, curvature="forward")
    with pytest.raises(UsageError, match=r"the fo threshold is not known"):
        OptimizerThresholds(None).choose("binding", zeroth_order=False, steps=9, curvature="forward")


def test_what_is_kept_in_a_cache_comes_back_the_same() -> None:
    vague = Limit("short-horizon", 1.0, 0.5, math.inf, 0.1, edge=2.0)
    known = OptimizerThresholds(EXACT, {9: {"binding": Held(vague, ("kinks",))}}, minibatch=True)
    assert OptimizerThresholds.from_dict(json.loads(json.dumps(known.to_dict(), allow_nan=False))) == known


def test_a_provisional_threshold_is_said_to_be_one() -> None:
    short = Limit("short-horizon", 1.0, 0.9, 1.3, 0.1)
    decision = decide(0.5, short, margin=0.8, on_warn="pass", steps=1000, doubts=("kinks",))
    assert "for 300 steps" in decision.message
    assert "provisional" in decision.message
    assert "zoscope plan" in decision.message


def result(status: str, code: int) -> CheckResult:
    return CheckResult(f"{status}{code}", "m.py", "zo-gd", 0.1, status, "…", code)  # type: ignore[arg-type]


def test_the_worst_exit_code_is_two_then_three_then_one_then_zero() -> None:
    results = [result("pass", 0), result("fail", 1), result("error", 3), result("error", 2)]
    worst = [CheckReport(tuple(results[:n])).exit_code for n in range(5)]
    assert worst == [0, 0, 1, 3, 2]
    assert EXIT_ORDER == (0, 1, 3, 2)


def test_the_report_has_the_worst_status() -> None:
    assert CheckReport((result("pass", 0), result("warn", 0))).status == "warn"
    assert CheckReport((result("warn", 0), result("fail", 1), result("pass", 0))).status == "fail"
    assert CheckReport(()).status == "pass"
