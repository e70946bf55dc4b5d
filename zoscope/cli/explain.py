"""``zoscope explain``: what a notice means, why it matters, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from zoscope.analysis.explanations import EXPLANATIONS
from zoscope.cli.output import remembered, show
from zoscope.errors import UsageError
from zoscope.report.style import grid

Code = Annotated[str | None, typer.Argument(help="Code of a notice, such as few-modes; without one all are listed.")]


def command(code: Code = None) -> None:
    """What a notice means, why it matters, and what to do; with the numbers of the last run if it had it."""
    last = remembered()
    said = {str(notice.get("code")): str(notice.get("message")) for notice in _notices(last)}
    show(Group(*(_listed(said) if code is None else _explained(_known(code), said, last))))


def _notices(document: dict[str, Any]) -> list[dict[str, Any]]:
    found = document.get("warnings")
    return [notice for notice in found if isinstance(notice, dict)] if isinstance(found, list) else []


def _known(code: str) -> str:
    """A code that there is.

    Raises:
        UsageError: With the nearest ones, for another.
    """
    if code in EXPLANATIONS:
        return code
    near = difflib.get_close_matches(code.lower(), EXPLANATIONS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(f"CODE: there is no notice '{code}'.{hint} 'zoscope explain' lists them all.")


def _listed(said: Container[str]) -> Iterator[RenderableType]:
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


def _explained(code: str, said: Mapping[str, str], last: Mapping[str, Any]) -> Iterator[RenderableType]:
    found = EXPLANATIONS[code]
    yield Text.assemble((f"{found.word} {code}", "bold"), f": {found.clause}" if found.clause else "")
    rows: list[tuple[str, str | Text]] = [("means", found.means), ("matters", found.matters), ("do", found.remedy)]
    if code in said:
        rows.append(("last run", f"{last.get('spec') or last.get('config') or last.get('schema')}: {said[code]}"))
    yield grid(rows)
