"""``zoscope report``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoscope.cli.options import Given, takes_options
from zoscope.cli.output import to_stderr
from zoscope.errors import UsageError
from zoscope.files import parse_json, read_bytes, reason

BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
"""What a document raises that is of the right name and not whole."""


@takes_options("report")
def command(given: Given) -> None:
    """One HTML page from results: JSON documents of any commands, and folders of tracked runs."""
    if given.html is None:
        raise UsageError("--html is missing: a report is a page. Expected a file name, such as --html page.html.")
    if not given.results:
        raise UsageError("RESULT is missing. Expected JSON documents that zoscope wrote, or folders of tracked runs.")
    documents = [_document(path) for path in given.results]
    from zoscope.report.html import write  # late, for a fast --help

    write(documents, given.html, command=shlex.join(("zoscope", *given.line)))
    to_stderr(f"{given.html}: {given.html.stat().st_size / 1e6:.1f} MB", quiet=given.quiet)


def _document(path: Path) -> Mapping[str, Any]:
    """The result in a file, or that of the runs in a folder.

    Raises:
        UsageError: If there is none of which a page can be made.
    """
    if path.is_dir():
        from zoscope.analysis.track import compare  # late: it takes torch

        found = compare([path])
        return found.results[0][1].to_dict() if len(found.entries) == 1 else found.to_dict()
    try:
        document = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({reason(error)}). Expected a JSON document of zoscope.") from None
    from zoscope.report.html import SCHEMAS, section

    schema = document.get("schema") if isinstance(document, Mapping) else None
    if schema not in SCHEMAS:
        kind = str(schema).rpartition("/")[0]
        known = any(name.startswith(f"{kind}/") for name in SCHEMAS)
        what = f"a {schema} document of another version" if known else "no result"
        raise UsageError(f"{path}: this is {what} of zoscope. Expected a document with one of {', '.join(SCHEMAS)}.")
    try:
        section(document, 0)
    except BROKEN as error:
        raise UsageError(
            f"{path}: this is no whole {schema} document ({type(error).__name__}: {error}). Expected what zoscope "
            "--json wrote."
        ) from None
    return dict(document)
