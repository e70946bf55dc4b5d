"""Results in a notebook: what the terminal shows, as HTML."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def _recorder(width: int) -> Console:
    return Console(width=width, record=True, file=io.StringIO(), force_terminal=True, force_jupyter=False)
