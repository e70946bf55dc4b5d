"""What ``zoscope explain`` prints."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zoscope.analysis.explanations import EXPLANATIONS
from zoscope.report.style import grid

if TYPE_CHECKING:
    from rich.console import RenderableType


def listed(said: Container[str]) -> Iterator[RenderableType]:
    """All notices in a line each; those of the last run, by ``said``, first."""
    codes = list(EXPLANATIONS)
    others = [code for code in codes if code not in said]
    for title, group in (
        ("In the last run", [code for code in codes if code in said]),
        ("Warnings", [code for code in others if EXPLANATIONS[code].serious]),
        ("Good to know", [code for code in others if not EXPLANATIONS[code].serious]),
    ):
        if group:
            yield Text(title, style="bold")
            yield grid((f"  {code}", EXPLANATIONS[code].clause or EXPLANATIONS[code].means) for code in group)


def explained(code: str, said: Mapping[str, str], last: Mapping[str, Any]) -> Iterator[RenderableType]:
    """One notice: what it means, why it matters, what to do, and what the last run said."""
    found = EXPLANATIONS[code]
    yield Text.assemble((f"{found.word} {code}", "bold"), f": {found.clause}" if found.clause else "")
    rows: list[tuple[str, str | Text]] = [("means", found.means), ("matters", found.matters), ("do", found.remedy)]
    if code in said:
        rows.append(("last run", f"{last.get('spec') or last.get('config') or last.get('schema')}: {said[code]}"))
    yield grid(rows)
