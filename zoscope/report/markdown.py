"""Markdown, for ``$GITHUB_STEP_SUMMARY`` and merge-request comments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from zoscope.report.check import advice_cell, place, shared_notices, threshold_cells

if TYPE_CHECKING:
    from zoscope.analysis.checking.results import CheckReport

MARKS = {"pass": "✅ pass", "warn": "⚠️ warn", "fail": "❌ fail", "error": "💥 error"}
HEADER = ("check", "optimizer", "lr", "threshold", "95 % interval", "ratio", "status", "passes up to")

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def markdown(report: CheckReport) -> str:
    """A table of the checks and a list of what there is to say."""
    rows = [
        (escape(c.name), c.optimizer, f"{c.lr:.3g}", *threshold_cells(c), MARKS[c.status], advice_cell(c))
        for c in report.checks
    ]
    lines = ["### zoscope check", "", _row(HEADER), _row(("---",) * len(HEADER)), *(_row(row) for row in rows), ""]
    for check in report.checks:
        if check.status != "pass" or check.baseline is not None:
            lines.append(f"- **{escape(place(check))}**: {escape(check.message)}")
    for notice, names in shared_notices(report).items():
        lines.append(f"- note ({escape(', '.join(names))}): {escape(notice)}")
    return "\n".join(lines).rstrip("\n") + "\n"


def escape(text: str) -> str:
    """Text as itself: no markup, no table cell, no line of its own."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
