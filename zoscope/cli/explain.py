"""``zoscope explain``: what a notice means, why it matters, what to do."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import typer
from rich.console import Group

from zoscope.cli.output import remembered, show
from zoscope.errors import UsageError

Code = Annotated[str | None, typer.Argument(help="Code of a notice, such as few-modes; without one all are listed.")]


def command(code: Code = None) -> None:
    """What a notice means, why it matters, and what to do; with the numbers of the last run if it had it."""
    from zoscope.report.explain import explained, listed  # late, for a fast --help

    last = remembered()
    said = {str(notice.get("code")): str(notice.get("message")) for notice in _notices(last)}
    show(Group(*(listed(said) if code is None else explained(_known(code), said, last))))


def _notices(document: dict[str, Any]) -> list[dict[str, Any]]:
    found = document.get("warnings")
    return [notice for notice in found if isinstance(notice, dict)] if isinstance(found, list) else []


def _known(code: str) -> str:
    """A code that there is.

    Raises:
        UsageError: With the nearest ones, for another.
    """
    from zoscope.analysis.explanations import EXPLANATIONS  # late, for a fast --help

    if code in EXPLANATIONS:
        return code
    near = difflib.get_close_matches(code.lower(), EXPLANATIONS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(f"CODE: there is no notice '{code}'.{hint} 'zoscope explain' lists them all.")
