"""A report with every status and with names that a format might trip over."""

import pytest

from zoscope import CheckReport, CheckResult
from zoscope.analysis.advice import Limit
from zoscope.analysis.check_results import BaselineComparison

HOSTILE = (
    "100%", "a\nb", "::error::x", "a,b", "c:d", "%0A%25", "pipe|pipe", "<b>&\"'", "\x00\x07\x1b[31m", "]]>",
    "é🙂\u202e",
    "file=x,line=1", "\r\n", "[link](x)", "`code`",
)  # fmt: skip


def check(name: str, status: str = "fail", **changes: object) -> CheckResult:
    values: dict[str, object] = {
        "name": name,
        "spec": "model.py:problem",
        "optimizer": "zo-gd",
        "lr": 0.02,
        "status": status,
        "message": f"Message of {name}.",
        "exit_code": {"pass": 0, "warn": 0, "fail": 1, "error": 3}[status],
        "threshold": None if status == "error" else Limit("exact", 0.016, 0.0155, 0.0165, 0.0005),
        "largest_lr": None if status == "error" else 0.012,
        "file": "ci/zoscope.yaml",
        "line": 7,
    }
    return CheckResult(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def report() -> CheckReport:
    dropped = BaselineComparison(0.03, 0.47, True, "It fell.")
    return CheckReport(
        (
            check("passes", "pass"),
            check("warns", "warn", notices=("A note.",)),
            check("fails", "fail"),
            check("errors", "error", details='  File "model.py", line 3, in problem\n'),
            check("dropped", "fail", baseline=dropped),
            check("no file", "fail", file=None, line=None),
        ),
        config="ci/zoscope.yaml",
        seconds=1.5,
    )


@pytest.fixture
def hostile() -> CheckReport:
    return CheckReport(tuple(check(name, message=f"{name} in {name}", file=f"{name}.yaml") for name in HOSTILE))


@pytest.fixture
def hostile_names() -> tuple[str, ...]:
    return HOSTILE
