"""How a result shows itself: in a terminal, in a notebook, and where somebody prints it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


class Shown(ABC):
    """A result with tables of its own. The report is imported late: results know nothing of how they are shown."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Tables for the terminal."""

    def __str__(self) -> str:
        """The same without colours."""
        from zoscope.report.notebook import to_text

        return to_text(self.__rich__()).rstrip()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The same for a notebook."""
        from zoscope.report.notebook import to_html

        return {"text/html": to_html(self.__rich__()), "text/plain": str(self)}
