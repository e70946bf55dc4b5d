"""How numbers and tables look, the same everywhere."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from decimal import ROUND_DOWN, Context
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from zoscope.registry import OPTIMIZERS, family_of, is_zeroth_order
from zoscope.report.console import CleanConsole

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType

    from zoscope.result import MeasuredResult
    from zoscope.theory.spectrum import Estimate

MISSING = "–"
INFINITE = "∞"
MOST_DIGITS = 4
NEGLIGIBLE = 5e-5
"""Relative error that does not reach the last of four digits: not worth a ±."""

POOR = 0.5
"""Relative error from which a number has one digit."""


def optimizer_name(name: str) -> str:
    """``ZO-Adam`` for ``zo-adam``."""
    label = OPTIMIZERS[family_of(name)].label
    return f"ZO-{label}" if is_zeroth_order(name) else label


OPERATOR_NAMES = {
    "hessian": "Hessian H",
    "preconditioned_hessian": "P^-½ H P^-½ (Adam)",
    "ggn": "Gauss-Newton G",
    "preconditioned_ggn": "P^-½ G P^-½ (Adam)",
}
"""Matrices that are measured, by their key in documents."""


def term_of(optimizer: str) -> str:
    """What the step size allows, as a formula."""
    options = OPTIMIZERS[family_of(optimizer)].options
    if is_zeroth_order(optimizer):
        return "2(1−β)/η" if "beta" in options else "2/η"
    return "2(1+β)/η" if "beta" in options else "2(1+β₁)/((1−β₁)η)" if "betas" in options else "2/η"


def digits_for(value: float, half_width: float) -> int:
    """Significant digits that a value with this error deserves, 1 to 4."""
    relative = _relative(value, half_width)
    if relative < NEGLIGIBLE:
        return MOST_DIGITS
    if relative > POOR:
        return 1
    return min(max(math.ceil(-math.log10(relative)) + 1, 2), MOST_DIGITS)


def quantity(value: float | None, *, digits: int = MOST_DIGITS) -> str:
    """A number in plain notation where that is short: ``87.13``, ``-4.9``, ``1,440``, ``3.1e-7``."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return INFINITE if value > 0 else f"-{INFINITE}"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if not -3 <= exponent < 5:
        return _scientific(value, digits)
    return f"{rounded:,.{max(digits - 1 - exponent, 0)}f}"


def step_size(value: float | None, *, digits: int = 3) -> str:
    """A step size, ready to be pasted: ``1.63e-2``, ``0.500``, ``12.3``."""
    if value is not None and math.isfinite(value) and 0 < value < 0.1:
        return _scientific(value, digits)
    return quantity(value, digits=digits)


def step_size_at_most(value: float, *, digits: int = 3) -> str:
    """A step size rounded down: whoever pastes it stays below it."""
    if not (math.isfinite(value) and value > 0):
        return step_size(value, digits=digits)
    return step_size(float(Context(prec=digits, rounding=ROUND_DOWN).create_decimal(value)), digits=digits)


def error(value: float, half_width: float) -> str:
    """`` ± 0.8 %``, rounded up; empty for an error that no digit shows, absolute where the value may be zero."""
    relative = _relative(value, half_width)
    if relative < NEGLIGIBLE:
        return ""
    if not math.isfinite(half_width):
        return f" ± {INFINITE}"
    if relative >= 1:
        return f" ± {quantity(half_width, digits=2)}"
    percent = relative * 100
    if percent > 9.9:
        return f" ± {math.ceil(percent - 1e-6)} %"
    return f" ± {math.ceil(percent * 10 - 1e-6) / 10:.1f} %"


def quantity_with_error(value: float, half_width: float) -> str:
    """A curvature and its error."""
    return quantity(value, digits=digits_for(value, half_width)) + error(value, half_width)


def step_size_with_error(value: float, half_width: float) -> str:
    """A step size and its error."""
    return step_size(value, digits=digits_for(value, half_width)) + error(value, half_width)


def curvature_of(estimate: Estimate) -> str:
    """An estimated curvature and its error."""
    return quantity_with_error(estimate.value, estimate.half_width)


def step_size_of(estimate: Estimate | None) -> str:
    """An estimated step size and its error."""
    return MISSING if estimate is None else step_size_with_error(estimate.value, estimate.half_width)


def step_range(low: float | None, high: float | None, *, digits: int = 3) -> str:
    """``1.44e-2 – 2.30e-2``; one number where both look the same."""
    ends = [step_size(end, digits=digits) for end in (low, high)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} – {ends[1]}"


def count(value: float) -> str:
    """A whole number with thousands separated; two digits from 10,000 on are enough for an estimate of steps."""
    return INFINITE if math.isinf(value) else f"{round(value):,}"


def counted(value: int, noun: str) -> str:
    """``1 example``, ``1,797 examples``."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def rough_count(value: float) -> str:
    """A number of steps that is only known roughly: two digits."""
    if math.isinf(value) or value < 100:
        return count(value)
    scale = 10 ** (math.floor(math.log10(value)) - 1)
    return count(round(value / scale) * scale)


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _relative(value: float, half_width: float) -> float:
    if half_width == 0 or (math.isinf(value) and not math.isinf(half_width)):
        return 0.0
    return half_width / abs(value) if value != 0 and math.isfinite(value) else math.inf


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


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
        counted(problem.num_examples, "example"),
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
