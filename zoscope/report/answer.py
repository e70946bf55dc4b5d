"""What every report begins with: an answer of a few lines, a ruler of step sizes, a line for each notice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rich.text import Text

from zoscope.analysis.explanations import PROVISIONAL, explanation, rank
from zoscope.report.console import cleaned
from zoscope.report.style import grid, heading, to_html, to_text
from zoscope.report.words import quantity

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from zoscope.problem import Notice
    from zoscope.result import RichResult

Result = TypeVar("Result", bound="RichResult")
Sections = Callable[[Result, int], Iterator["RenderableType"]]

MOST_LINES = 12
"""Lines of an answer with its notices, in a terminal of 80 columns."""


@dataclass(frozen=True)
class Report(Generic[Result]):
    """Lays a result out for the width that it is printed at: its answer, or everything.

    Args:
        result: What to show.
        answer: ``answer(result, width)``: a few lines.
        details: ``details(result, width)``: everything else.
        verbose: Whether to show that, too, and notices in full.
        warnings: Whether to end with the notices.
    """

    result: Result
    answer: Sections[Result]
    details: Sections[Result] | None = None
    verbose: bool = False
    warnings: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Everything, top to bottom, with signs in place of control characters on any console."""
        yield from cleaned(self._segments(console, options.update(markup=False)))

    def _segments(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        used = 0
        for renderable in self.answer(self.result, options.max_width):
            for line in console.render_lines(renderable, options, pad=False, new_lines=True):
                used += 1
                yield from line
        for renderable in self._rest(options.max_width, room=MOST_LINES - used):
            yield from console.render(renderable, options)

    def _rest(self, width: int, *, room: int) -> Iterator[RenderableType]:
        if not self.verbose:
            if self.warnings:
                yield from notice_lines(self.result.warnings, width=width, room=room, more=IN_PYTHON)
            return
        if self.details is not None:
            yield from self.details(self.result, width)
        told = [notice.message for notice in self.result.warnings if notice.code != PROVISIONAL]  # that is above
        if self.warnings and told:
            yield heading("Warnings")
            yield grid(("•", message) for message in told)

    def __str__(self) -> str:
        """The same without colours."""
        return to_text(self).rstrip()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The same for a notebook."""
        return {"text/html": to_html(self), "text/plain": str(self)}


def as_report(answer: Sections[Result], details: Sections[Result] | None = None) -> Callable[..., Report[Result]]:
    """The sections of a report as ``render(result, *, verbose=False, warnings=True)``.

    With ``warnings=False`` they are left to another stream.
    """

    def render(result: Result, *, verbose: bool = False, warnings: bool = True) -> Report[Result]:
        return Report(result, answer, details, verbose, warnings)

    return render


MOST_NOTICES = 2
"""Notices with a line of their own; the others are named in one."""

IN_PYTHON = "result.report(verbose=True)"
"""What shows everything there."""


def notice_lines(
    notices: Iterable[Notice], *, width: int, room: int, more: str = "-v", guide: str | None = None
) -> list[Text]:
    """A line for each notice that matters, those that matter most first, and one that names the others.

    Args:
        notices: What there is to say.
        width: Columns; a longer line ends in an ellipsis.
        room: Lines to keep to; one there is always.
        more: What shows notices in full.
        guide: Address of a page on notices, for terminals in which a code can be a link.
    """
    found = sorted({notice.code: notice for notice in notices}.values(), key=lambda notice: rank(notice.code))
    if not found:
        return []
    serious = sum(explanation(notice.code).serious for notice in found)
    own = min(max(serious, 1), MOST_NOTICES, max(room - (len(found) > 1), 0))
    lines = [_notice_line(notice, guide) for notice in found[:own]]
    others = [notice.code for notice in found[own:]]
    if others or room > own:
        lines.append(_last_line(others, own=own, width=width, hint=f"({more}; zoscope explain CODE)", guide=guide))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _last_line(codes: Sequence[str], *, own: int, width: int, hint: str, guide: str | None) -> Text:
    """How many notices there are besides, as many of their codes as fit, and where to read on."""
    if not codes:
        return Text(f"More: {hint.strip('()')}", style="dim")
    line = Text(f"+{len(codes)} more: " if own else f"{len(codes)} notice{'s' * (len(codes) > 1)}: ", style="dim")
    for number, code in enumerate(codes):
        last = number == len(codes) - 1
        needed = len(code) + (0 if last else len(", …")) + 1 + len(hint)
        if line.cell_len + needed > width:
            line.append("…")
            break
        line.append_text(_code(code, guide)).append("" if last else ", ")
    return line.append(f" {hint}")


def _notice_line(notice: Notice, guide: str | None) -> Text:
    found = explanation(notice.code)
    line = Text.assemble((f"{found.word} ", "yellow" if found.serious else ""), _code(notice.code, guide))
    return line.append(f": {found.clause or ' '.join(notice.message.split())}")


def _code(code: str, guide: str | None) -> Text:
    return Text(code, style="" if guide is None else f"link {guide}#{code}")


# --- the ruler --------------------------------------------------------------------------------------------------------

SHORTEST, LONGEST = 16, 60
"""Columns of the axis of a ruler."""

REACH = 3.0
"""How much of the axis is left of the smallest mark, and right of the largest, as a factor."""

FALLS, CAREFUL, DIVERGES = "━", "─", "╌"
"""Where the loss falls, where it may not, where runs diverge."""

MARKS = {"use": "●", "best": "●", "edge": "┃", "lr": "▲", "FO": "◆"}


def ruler(marks: dict[str, float | None], *, width: int, label: str = "") -> Text | None:
    """Step sizes on a logarithmic axis, in one line with its legend; ``None`` where no edge is known.

    Args:
        marks: Step sizes by name, of ``MARKS``; those that are not finite and above 0 are left out.
        width: Columns.
        label: What stands before it.
    """
    known = {name: lr for name, lr in marks.items() if lr is not None and 0 < lr < math.inf}
    if "edge" not in known:
        return None
    low, high = min(known.values()) / REACH, max(known.values()) * REACH
    ends = [quantity(end, digits=1) for end in (low, high)]
    legend = f"  {FALLS} falls  " + "  ".join(f"{MARKS[name]} {name}" for name in MARKS if name in known)
    legend += f"  {DIVERGES} diverges"
    taken = len(label) + sum(map(len, ends)) + 2
    if taken + len(legend) + SHORTEST > width:
        legend = ""
    cells = min(max(width - taken - len(legend), SHORTEST), LONGEST)
    places = _places(known, low=low, high=high, cells=cells)
    first, edge = min(places[name] for name in known if name != "FO"), places["edge"]
    first = places.get("use", places.get("best", first))
    text = Text(f"{label}{ends[0]} ")
    signs = {place: MARKS[name] for name, place in places.items()}
    for cell in range(cells):
        style = "green" if cell <= first else "yellow" if cell < edge else "red"
        zone = FALLS if cell <= first else CAREFUL if cell < edge else DIVERGES
        text.append(signs.get(cell, zone), style="bold" if cell in signs else style)
    return text.append(f" {ends[1]}{legend}")


def _places(known: dict[str, float], *, low: float, high: float, cells: int) -> dict[str, int]:
    """A cell of its own for each, in their order."""
    places: dict[str, int] = {}
    last = -1
    for name, lr in sorted(known.items(), key=lambda item: item[1]):
        exact = round(math.log(lr / low) / math.log(high / low) * (cells - 1))
        last = places[name] = max(exact, last + 1)
    return places


def one_line(facts: Sequence[str], *, width: int) -> Text:
    """Facts joined by dots, the first bold; those at the end that have no room are left out, and of a name its head."""
    name, most = facts[0], max(width - LEAST_FACTS, LEAST_FACTS)
    line = Text(name if len(name) <= most else f"…{name[1 - most :]}", style="bold")
    line = Text.assemble(line)
    for fact in facts[1:]:
        if line.cell_len + len(fact) + 3 > width:
            break
        line.append(f" · {fact}", style="dim")
    return line


LEAST_FACTS = 30
"""Columns that a long name leaves to the facts."""
