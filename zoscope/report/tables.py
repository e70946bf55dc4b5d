"""Building blocks that the reports share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import JustifyMethod


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
