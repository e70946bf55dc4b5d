"""Results to stdout, files whole or not at all, warnings to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from rich.console import Console, RenderableType
from rich.text import Text

from zoscope.errors import UsageError

if TYPE_CHECKING:
    from zoscope.cli.options import OutputOptions
    from zoscope.problem import Notice

PICTURES = (".png", ".svg", ".pdf")


class Document(Protocol):
    """A result: a JSON document that renders itself in rich."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""

    def __rich__(self) -> RenderableType:
        """The same for a terminal."""


class PipeConsole(Console):
    """A console on which a closed pipe is an error like any other, not an exit of its own."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise what rich would turn into exit code 1, which means "no" here."""
        raise BrokenPipeError


def emit(result: Document, options: OutputOptions, *, shown: RenderableType | None = None) -> None:
    """Write ``result`` to stdout and, if asked, to a file: JSON or tables.

    Args:
        result: What was found.
        options: Where to and in which form.
        shown: What stdout shows in place of the whole result, when it shows tables.
    """
    if options.output is not None:
        write_whole(options.output, as_json(result) if options.file_format == "json" else as_text(result))
    if options.json:
        sys.stdout.write(as_json(result))
    else:
        _print(result if shown is None else shown)
    sys.stdout.flush()


def _print(shown: RenderableType) -> None:
    console = PipeConsole()
    if console.is_terminal:
        console.print(shown)
    else:
        sys.stdout.write(as_text(shown, width=console.width))


def as_json(result: Document) -> str:
    """One JSON document; never NaN or Infinity."""
    return json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_text(result: RenderableType, *, width: int = 120) -> str:
    """The tables without colours, and without the spaces that fill a terminal's lines."""
    console = Console(width=width, no_color=True, force_terminal=False, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    with console.file:
        console.print(result)
    text = console.export_text(styles=False)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def warn(notices: Iterable[Notice], *, quiet: bool) -> None:
    """Warnings on stderr, one paragraph each."""
    if quiet:
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for notice in notices:
        console.print(Text("Warning: ", style="yellow") + Text(notice.message, style="default"))


def check_writable(path: Path, *, option: str = "--output") -> None:
    """Refuse a file that cannot be written, before the work and not after it."""
    target = path.resolve()
    if path.is_dir():
        raise UsageError(f"{option}: {path} is a folder. Expected the path of a file.")
    if not _is_special(path) and not target.parent.is_dir():
        raise UsageError(f"{option}: there is no folder {path.parent} to write {path.name} in. Create it first.")
    try:
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "permission denied")
        else:
            tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path} ({error.strerror}). Choose another place.") from None


def check_picture(path: Path, *, option: str = "--plot") -> None:
    """Refuse a picture that cannot be drawn or written, before the work and not after it."""
    from zoscope.report.figures import require_matplotlib  # late, for a fast --help

    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{option}: {path} has no picture's name. Expected one that ends in {', '.join(PICTURES)}.")
    require_matplotlib(option)
    check_writable(path, option=option)


def write_whole(path: Path, text: str, *, option: str = "--output") -> None:
    """Write ``text`` to ``path`` so that no reader ever sees a part of it; an old file stays until then."""
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path.resolve(), text)  # resolved: a link keeps pointing where it did
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path} ({error.strerror}). Nothing was written there.") from None


def _replace(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, _mode_of(target))
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _mode_of(target: Path) -> int:
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()  # /dev/stderr, a named pipe: replacing those would destroy them
