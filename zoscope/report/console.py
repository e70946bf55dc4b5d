"""The console that everything of zoscope is printed on: text from outside is shown and never acted on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from zoscope.text import clean

NARROWEST, WIDEST = 50, 1000
"""Columns of a terminal that tables are laid out for; what says otherwise is taken for a mistake."""

SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH", "JUPYTER_COLUMNS", "JUPYTER_LINES")


class CleanConsole(Console):
    """A console that shows control characters of names, data and messages as signs, and reads no markup in them.

    A closed pipe is an error like any other, not an exit of its own. What stderr does not take is lost, as there is
    nowhere left to say so.

    Args:
        **options: Those of ``rich.console.Console``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, _environ=usable(os.environ), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See ``rich``; here every piece of text passes."""
        return cleaned(super().render(renderable, options))

    def print(self, *objects: Any, **options: Any) -> None:
        """See ``rich``."""
        if not self.stderr:
            super().print(*objects, **options)
            return
        with suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Raise what rich would turn into exit code 1, which means "no" here."""
        raise BrokenPipeError


def cleaned(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Pieces of text without control characters; what rich itself controls the terminal with stays."""
    for segment in segments:
        text = segment.text if segment.control else clean(segment.text)
        yield segment if text == segment.text else Segment(text, segment.style)


def usable(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without sizes of a terminal that no terminal has; a real width that is extreme is brought near."""
    found = dict(environment)
    for name in SIZES:
        text = found.get(name)
        if text is None:
            continue
        size = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
        if not size:
            del found[name]
        elif name in ("COLUMNS", "TERMINAL_WIDTH"):
            found[name] = str(min(max(size, NARROWEST), WIDEST))
    return found
