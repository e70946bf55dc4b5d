"""Comparison with an earlier report: has a threshold fallen while the step size was still stable?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoscope.analysis.checking.results import SCHEMA, BaselineComparison, CheckReport, CheckResult
from zoscope.analysis.recommend import Limit
from zoscope.errors import UsageError

_KEPT = ("name", "optimizer", "threshold", "threshold_name", "ci95", "error", "status", "settings")


@dataclass(frozen=True)
class Baseline:
    """An earlier report, by the names of its checks."""

    entries: Mapping[str, Mapping[str, Any]]


def load_baseline(file: Path) -> Baseline:
    """Read a document ``zoscope.check/1``.

    Raises:
        UsageError: If the file is missing or is not such a document.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError
        entries = {str(entry["name"]): _checked(entry) for entry in document["checks"]}
    except FileNotFoundError:
        raise UsageError(f"--baseline: there is no file {file}. Write it first with --update-baseline.") from None
    except OSError as error:
        raise UsageError(f"--baseline: cannot read {file} ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f"--baseline: {file} is not a document {SCHEMA}. Write it with --update-baseline, or with --format json."
        ) from None
    return Baseline(entries)


def baseline_document(report: CheckReport, *, earlier: Baseline | None, keep_absent: bool) -> dict[str, Any]:
    """What ``--update-baseline`` writes: the thresholds of a report, without times, so that diffs are small.

    Args:
        report: The checks of now. One that had an error keeps its earlier entry.
        earlier: The baseline that is replaced.
        keep_absent: Whether entries of checks that did not run are kept.
    """
    before = earlier.entries if earlier is not None else {}
    entries = {name: dict(entry) for name, entry in before.items()} if keep_absent else {}
    for check in report.checks:
        document = check.to_dict()
        if check.status != "error":
            entries[check.name] = {key: document[key] for key in _KEPT}
        elif check.name in before:
            entries[check.name] = dict(before[check.name])
    return {"schema": SCHEMA, "zoscope": report.version, "checks": list(entries.values())}


def _checked(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry whose numbers are numbers."""
    ends = [entry["threshold"], entry["error"]]
    if not all(end is None or (isinstance(end, int | float) and math.isfinite(end)) for end in ends):
        raise ValueError
    if not isinstance(entry["settings"], Mapping):
        raise TypeError
    return entry


def compare(result: CheckResult, baseline: Baseline, *, max_drop: float, on_warn: str) -> CheckResult:
    """The result with its comparison; a drop beyond ``max_drop`` turns pass and warn into fail.

    What cannot be compared (no entry of this name, or one with other settings) turns pass into warn.

    Args:
        result: A check of now.
        baseline: The earlier report.
        max_drop: Largest fall allowed, as a fraction of the earlier threshold.
        on_warn: ``fail`` turns that warning into a fail.
    """
    if result.threshold is None:
        return result
    comparison = _comparison(result, result.threshold, baseline.entries.get(result.name), max_drop)
    message = f"{result.message} {comparison.message}"
    if comparison.failed:
        return replace(result, baseline=comparison, message=message, status="fail", exit_code=max(result.exit_code, 1))
    if comparison.before is None and result.status == "pass":
        if on_warn == "fail":
            return replace(result, baseline=comparison, message=message, status="fail", exit_code=1)
        return replace(result, baseline=comparison, message=message, status="warn")
    return replace(result, baseline=comparison, message=message)


def _comparison(
    result: CheckResult, now: Limit, entry: Mapping[str, Any] | None, max_drop: float
) -> BaselineComparison:
    if entry is None:
        return _incomparable("The baseline has no check of this name")
    if entry["status"] == "error" or entry["threshold_name"] is None:
        return _incomparable("The baseline's check of this name had an error")
    same = entry["optimizer"] == result.optimizer and entry["settings"] == _plain(result.settings)
    if not same:
        return _incomparable("The baseline's check of this name had other settings")
    before = math.inf if entry["threshold"] is None else float(entry["threshold"])
    if math.isinf(before):
        dropped = math.isfinite(now.value)
        text = "nothing limited the step size" if dropped else "nothing limits the step size, as"
        return BaselineComparison(before, None, dropped, f"In the baseline {text} before.")
    return _drop(now, before, entry["error"] or 0.0, max_drop)


def _drop(now: Limit, before: float, before_error: float, max_drop: float) -> BaselineComparison:
    """Fail when ``now < (1 - max_drop) before`` by more than the error of the difference."""
    allowed = (1.0 - max_drop) * before
    error = math.hypot(now.error, (1.0 - max_drop) * before_error)
    drop = 1.0 - now.value / before if math.isfinite(now.value) else -math.inf
    failed = now.value + error < allowed
    moved = f"{abs(drop):.1%} {'below' if drop > 0 else 'above'}" if math.isfinite(drop) else "above"
    text = f"The threshold is {moved} the baseline's {before:.3g}"
    text += f", more than --max-drop {max_drop:.0%} allows." if failed else "."
    return BaselineComparison(before, drop, failed, text)


def _incomparable(reason: str) -> BaselineComparison:
    return BaselineComparison(None, None, False, f"{reason}, so nothing was compared; --update-baseline writes it.")


def _plain(settings: Mapping[str, Any]) -> Any:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(dict(settings)))
