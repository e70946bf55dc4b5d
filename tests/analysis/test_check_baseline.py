import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from zoscope import CheckReport, CheckResult, UsageError
from zoscope.analysis.advice import Limit
from zoscope.analysis.check import Baseline, baseline_document, compare, load_baseline


def result(
    value: float, *, error: float = 0.0, name: str = "a", steps: int = 1000, status: str = "pass"
) -> CheckResult:
    return CheckResult(
        name=name,
        spec="m.py",
        optimizer="zo-gd",
        lr=1e-3,
        status=status,  # type: ignore[arg-type]
        message="Fine.",
        exit_code=0,
        settings={"steps": steps, "betas": (0.9, 0.999)},
        threshold=Limit("exact", value, value - error, value + error, error),
    )


def written(tmp_path: Path, *results: CheckResult) -> Baseline:
    file = tmp_path / "baseline.json"
    document = baseline_document(CheckReport(results), earlier=None, keep_absent=False)
    file.write_text(json.dumps(document, allow_nan=False))
    return load_baseline(file)


def compared(now: CheckResult, baseline: Baseline, *, on_warn: str = "pass") -> CheckResult:
    return compare(now, baseline, max_drop=0.2, on_warn=on_warn)


def test_a_fall_beyond_the_limit_fails(tmp_path: Path) -> None:
    now = compared(result(0.79), written(tmp_path, result(1.0)))
    assert (now.status, now.exit_code) == ("fail", 1)
    assert "21.0% below the baseline's 1, more than --max-drop 20% allows" in now.message


def test_a_fall_within_the_limit_passes(tmp_path: Path) -> None:
    now = compared(result(0.81), written(tmp_path, result(1.0)))
    assert (now.status, now.exit_code) == ("pass", 0)
    assert now.baseline is not None
    assert now.baseline.drop == pytest.approx(0.19)


@pytest.mark.parametrize(("value", "status"), [(0.76, "pass"), (0.74, "fail")])
def test_a_fall_counts_only_beyond_the_combined_error_bars(tmp_path: Path, value: float, status: str) -> None:
    # allowed 0.8; the error of now - 0.8 before is hypot(0.03, 0.8 * 0.05) = 0.05
    now = compared(result(value, error=0.03), written(tmp_path, result(1.0, error=0.05)))
    assert now.status == status


def test_a_rise_passes(tmp_path: Path) -> None:
    now = compared(result(2.0), written(tmp_path, result(1.0)))
    assert now.status == "pass"
    assert "100.0% above" in now.message


def test_a_full_report_serves_as_a_baseline(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(CheckReport((result(1.0),)).to_dict()))
    assert compared(result(0.5), load_baseline(file)).status == "fail"


@pytest.mark.parametrize("now", [result(1.0, name="b"), result(1.0, steps=2000)])
def test_what_cannot_be_compared_warns(tmp_path: Path, now: CheckResult) -> None:
    baseline = written(tmp_path, result(1.0))
    assert compared(now, baseline).status == "warn"
    assert compared(now, baseline, on_warn="fail").exit_code == 1


def test_a_limit_that_was_not_there_before_fails(tmp_path: Path) -> None:
    unlimited = result(1.0)
    unlimited = replace(unlimited, threshold=Limit("exact", math.inf, math.inf, math.inf))
    baseline = written(tmp_path, unlimited)
    assert compared(result(1.0), baseline).status == "fail"
    assert compared(unlimited, baseline).status == "pass"


def test_a_check_with_an_error_keeps_its_earlier_entry(tmp_path: Path) -> None:
    earlier = written(tmp_path, result(1.0), result(2.0, name="gone"))
    failed = replace(result(0.0, status="error"), threshold=None, exit_code=3)
    document = baseline_document(CheckReport((failed,)), earlier=earlier, keep_absent=False)
    assert [(entry["name"], entry["threshold"]) for entry in document["checks"]] == [("a", 1.0)]


def test_checks_that_were_left_out_keep_their_entries(tmp_path: Path) -> None:
    earlier = written(tmp_path, result(1.0), result(2.0, name="b"))
    document = baseline_document(CheckReport((result(3.0),)), earlier=earlier, keep_absent=True)
    assert {entry["name"]: entry["threshold"] for entry in document["checks"]} == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"schema": "zoscope.bounds/1"}', "[" * 9999,
     '{"schema": "zoscope.check/1", "checks": [{"name": "a"}]}', '{"schema": "zoscope.check/1", "checks": 3}'],
)  # fmt: skip
def test_another_document_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(content)
    with pytest.raises(UsageError, match="is not a document"):
        load_baseline(file)


def test_a_missing_file_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--update-baseline"):
        load_baseline(tmp_path / "none.json")
