"""What the pictures share: matplotlib when it is there, colours that everyone can tell apart, files whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoscope.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito: distinct for every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 150


def require_matplotlib(option: str = "--plot") -> None:
    """Fail early, and say how to go on.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{option} needs matplotlib, which is not installed. Install it with: pip install 'zoscope[plot]'"
        ) from None


def new_figure(*, width: float, height: float) -> Figure:
    """An empty figure, in inches; pyplot is left out, which would choose a window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, *, option: str = "--plot") -> None:
    """Write the picture; its format follows the file name.

    Raises:
        UsageError: If the format is not known, or the file cannot be written.
    """
    import matplotlib

    # Fixed ids and no date: the same result makes the same file.
    metadata: dict[str, Any] | None = {"Date": None} if path.suffix == ".svg" else None
    try:
        with matplotlib.rc_context({"svg.hashsalt": "zoscope"}):
            figure.savefig(path, dpi=DPI, metadata=metadata)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option}: cannot write {path} ({error}). Choose another name, such as {path.stem or 'plot'}.png."
        ) from None


def gaps(values: Iterable[float | None]) -> list[float]:
    """Numbers for a line that is left out where there is none."""
    return [float("nan") if value is None else value for value in values]
