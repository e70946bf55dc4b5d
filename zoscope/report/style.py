"""How tables and headings look, the same everywhere."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from zoscope.report.console import CleanConsole
from zoscope.report.words import count, duration, quantity

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType

    from zoscope.result import MeasuredResult


def header(
    result: MeasuredResult,
    name: str,
    *,
    width: int,
    how: Iterable[str] = (),
    cost: str = "HVPs",
    more: Iterable[str] = (),
) -> Text:
    """What was measured, where and at which cost; lines break between facts.

    Args:
        result: What the facts are of.
        name: The first line, such as the spec.
        width: Columns.
        how: Facts before the cost.
        cost: What the count of products is called.
        more: Facts at the end.
    """
    problem = result.problem
    facts = [
        f"{count(problem.num_params)} parameters",
        count(problem.num_examples, "example"),
        f"loss {quantity(problem.loss)}",
        f"‖g‖ {quantity(problem.grad_norm)}",
        f"{result.device} {result.dtype}",
        *how,
        f"{count(result.num_hvps)} {cost}",
        duration(result.seconds),
        *more,
    ]
    text = Text.assemble((name, "bold"))
    for line in lines_of(facts, width=width):
        text.append(f"\n{line}", style="dim")
    return text


def heading(title: str, remark: str = "") -> Text:
    """A line that opens a section, after an empty one."""
    text = Text.assemble("\n", (title, "bold"))
    if remark:
        text.append(f"  {remark}", style="dim")
    return text


def grid(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Label and sentence, the sentence wrapped beside its label; brackets in them are no markup."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, sentence in rows:
        table.add_row(label, Text(sentence) if isinstance(sentence, str) else sentence)
    return table


def number_table(*columns: str, justify: JustifyMethod = "right") -> Table:
    """A table whose first column holds labels and all others numbers: in a narrow terminal they wrap, never cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(columns[0], no_wrap=True, vertical="bottom")
    for column in columns[1:]:
        table.add_column(column, justify=justify, overflow="fold", vertical="bottom")
    return table


def lines_of(facts: Iterable[str], *, width: int) -> list[str]:
    """Facts joined by dots into lines that break between facts only."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + len(fact) + 3 <= width:
            lines[-1] += f" · {fact}"
        else:
            lines.append(fact)
    return lines


WIDTH = 120
PAGE = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


def to_html(renderable: RenderableType, *, width: int = WIDTH) -> str:
    """HTML with inline styles, which a notebook keeps."""
    console = _recorder(width)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=PAGE)


def to_text(renderable: RenderableType, *, width: int = WIDTH) -> str:
    """The same without colours."""
    console = _recorder(width)
    console.print(renderable)
    return console.export_text(styles=False)


def _recorder(width: int) -> CleanConsole:
    return CleanConsole(width=width, record=True, file=io.StringIO(), force_terminal=True, force_jupyter=False)
