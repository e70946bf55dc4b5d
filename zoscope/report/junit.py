"""JUnit XML, as GitLab and Jenkins read it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from zoscope.analysis.checking.results import CheckReport, CheckResult

# What XML 1.0 cannot hold even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: CheckReport) -> str:
    """One ``testcase`` per check: ``failure`` for fail, ``error`` for error, else ``system-out`` with the words."""
    counts = report.counts()
    totals = {
        "tests": str(len(report.checks)),
        "failures": str(counts["fail"]),
        "errors": str(counts["error"]),
        "time": f"{report.seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "zoscope", **totals})
    suite = ET.SubElement(
        root, "testsuite", {"name": _clean(report.config or "zoscope check"), "skipped": "0", **totals}
    )
    for check in report.checks:
        _case(suite, check)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, check: CheckResult) -> None:
    attributes = {"name": check.name, "classname": f"zoscope.{check.spec}", "time": f"{check.seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", {name: _clean(value) for name, value in attributes.items()})
    if check.status in ("fail", "error"):
        kind = "failure" if check.status == "fail" else "error"
        problem = ET.SubElement(case, kind, {"message": _clean(check.message), "type": f"zoscope.{check.status}"})
        problem.text = _clean("\n".join(_lines(check)))
    else:
        ET.SubElement(case, "system-out").text = _clean("\n".join([f"{check.status}: {check.message}", *check.notices]))


def _lines(check: CheckResult) -> list[str]:
    where = [] if check.file is None else [f"{check.file}:{check.line}" if check.line is not None else check.file]
    return [*where, check.message, *check.notices, *([check.details] if check.details else [])]


def _clean(text: str) -> str:
    return _FORBIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
