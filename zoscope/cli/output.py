"""What commands print and where: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import errno
import gc
import io
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zoscope import files
from zoscope.errors import OutputError, UsageError, ZoscopeError, require_package
from zoscope.files import is_special, reason
from zoscope.report.console import CleanConsole
from zoscope.text import clean, clean_json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from zoscope.cli.options import Given, OutputOptions
    from zoscope.problem import Notice
    from zoscope.result import RichResult


def load_torch() -> None:
    """Import torch without looking for garbage among what it makes: none of it goes before the program ends.

    Half a million objects, at every one of the collections that making them sets off; frozen, they are left out of
    the later ones too.
    """
    if "torch" in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if collects:
            gc.enable()
    gc.freeze()


Report = Callable[..., None]


def visible(*, quiet: bool) -> bool:
    """Whether progress may be shown: stderr is a terminal and nobody asked for silence."""
    return not quiet and CleanConsole(stderr=True).is_terminal


@contextmanager
def loading(spec: str, *, quiet: bool) -> Iterator[None]:
    """A sign of life while a spec runs, which may well train a model; what it prints appears above."""
    if not visible(quiet=quiet):
        with aside():
            yield
        return
    with progress_line() as progress, aside():
        progress.add_task(f"running {clean(spec)}: its model and data load or train here", total=None)
        yield


@contextmanager
def measuring(*, max_hvps: int, rtol: float, quiet: bool) -> Iterator[Report | None]:
    """A bar over Hessian-vector products, with the precision so far and the time left.

    Args:
        max_hvps: Most products that a stage may spend.
        rtol: The precision wanted, shown beside the one reached.
        quiet: Show nothing.

    Yields:
        A callback ``(stage, num_hvps, precision)`` for the measurement, or ``None`` when nothing is shown. Precision
        means the relative 95 % half-width reached so far, or ``None``.
    """
    if not visible(quiet=quiet):
        with aside():
            yield None
        return
    with progress_line("{task.completed:.0f}/{task.total:.0f} HVPs", "{task.fields[precision]}") as progress, aside():
        task = progress.add_task("first products", total=max_hvps, precision="")
        spent = 0

        def report(stage: str, num_hvps: int, precision: float | None = None) -> None:
            nonlocal spent
            if num_hvps < spent:  # another operator
                progress.reset(task)
            spent = num_hvps
            reached = "" if precision is None else f"±{precision:.1%} (want {rtol:.1%})"
            total = products_needed(num_hvps, precision, max_hvps=max_hvps, rtol=rtol)
            progress.update(task, description=stage, completed=num_hvps, total=max(total, num_hvps), precision=reached)

        yield report


@contextmanager
def aside() -> Iterator[None]:
    """Send what the user's own code prints to stderr, also from below Python: stdout is for the result."""
    with redirect_stdout(sys.stderr), _descriptor_aside():
        yield


@contextmanager
def _descriptor_aside() -> Iterator[None]:
    try:
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # closed, or full
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def about(spec: str) -> Iterator[None]:
    """Name the spec in an error that does not say what it is about."""
    try:
        yield
    except ZoscopeError as error:
        message = str(error)
        if spec.partition(":")[0] not in message and not message.startswith("--"):
            error.args = (f"{spec}: {message}",)
        raise


def products_needed(num_hvps: int, precision: float | None, *, max_hvps: int, rtol: float) -> int:
    """About how many products the precision wanted takes: the error of a mean falls with the square root of them."""
    if precision is None or not math.isfinite(precision):
        return max_hvps
    return min(max_hvps, math.ceil(num_hvps * max(precision / rtol, 1.0) ** 2))


def progress_line(*middle: str) -> Progress:
    """One line on stderr: what is done, with columns such as a count a bar and the time left, the time so far last."""
    # Late: only a terminal needs it.
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    counts = (BarColumn(bar_width=24), *map(TextColumn, middle), TimeRemainingColumn(compact=True), TextColumn("left,"))
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *(counts if middle else ()),
        TimeElapsedColumn(),
        TextColumn("so far"),
        console=CleanConsole(stderr=True),
        transient=True,
    )


PICTURES = (".png", ".svg", ".pdf")


def emit(result: RichResult, options: OutputOptions, notices: Iterable[Notice] | None = None) -> None:
    """Write a result to stdout, its notices to stderr and, if asked, the whole of it to a file.

    Args:
        result: What was found.
        options: Where to and in which form.
        notices: What there is to say about it, where that is not what the result itself says.
    """
    document = as_json(result)
    remember(document)
    if options.output is not None:
        whole = options.file_format == "json"
        write_whole(options.output, document if whole else as_text(result.report(verbose=True)))
    used = 0
    if options.json:
        say(document)
    else:
        used = show(result.report(verbose=options.verbose, warnings=False))
    warn(result.warnings if notices is None else notices, options, used=used)


PLAIN = str.maketrans("━─╌●┃◆▲≤×–·…█→", "=-.o|*^<x-,.#>")
"""Signs of tables and rulers for terminals of other encodings, as wide as they are."""


def show(shown: RenderableType) -> int:
    """Print on stdout, in colours where it is a terminal; the number of lines."""
    console = CleanConsole()
    text = as_text(shown, width=console.width)
    if not (sys.stdout.encoding or "utf-8").lower().startswith("utf"):  # what is left becomes question marks
        say(text.translate(PLAIN))
    elif console.is_terminal:
        with to_stdout():
            console.print(shown)
    else:
        say(text)
    return text.count("\n")


def say(text: str) -> None:
    """Write a text to stdout, with signs in place of control characters."""
    with to_stdout():
        sys.stdout.write(clean(text))
        sys.stdout.flush()


@contextmanager
def to_stdout() -> Iterator[None]:
    """Say what is wrong with a stdout that takes nothing more; a closed pipe only ends the program."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"Standard output does not take the result ({reason(error)}). Send it to a place with room, or to a file "
            "with --output."
        ) from None


def as_json(result: RichResult) -> str:
    """One JSON document; never NaN or Infinity."""
    return clean_json(json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def as_text(result: RenderableType, *, width: int = 120) -> str:
    """The tables without colours, and without the spaces that fill a terminal's lines."""
    console = CleanConsole(width=width, no_color=True, force_terminal=False, file=io.StringIO(), record=True)
    console.print(result)
    text = console.export_text(styles=False)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def warn(notices: Iterable[Notice], options: OutputOptions, *, used: int = 0) -> None:
    """Notices on stderr: a line for each that matters, or with ``--verbose`` and ``--json`` a paragraph for each.

    Args:
        notices: What there is to say.
        options: In which form.
        used: Lines that the answer has.
    """
    if options.quiet:
        return
    from zoscope.analysis.explanations import PROVISIONAL  # late, for a fast --help
    from zoscope.report.answer import MOST_LINES, notice_lines

    console = CleanConsole(stderr=True)
    if not (options.verbose or options.json):
        guide = guide_address() if console.is_terminal else None
        for line in notice_lines(notices, width=console.width, room=MOST_LINES - used, guide=guide):
            console.print(line, soft_wrap=True)
        return
    for notice in notices:
        if notice.code != PROVISIONAL or options.json:  # the report shows it beside the step size
            text = Text("Warning: ", style="yellow") + Text(notice.message, style="default")
            console.print(text, soft_wrap=True)


def guide_address() -> str | None:
    """Where the guide's page on notices is on the web, if the package says where its documentation is."""
    try:
        addresses = metadata("zoscope").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    found = dict(entry.split(", ", 1) for entry in addresses if ", " in entry)
    return f"{found['Documentation'].rstrip('/')}/notices.md" if "Documentation" in found else None


# --- the last result, for ``zoscope explain`` -------------------------------------------------------------------------

LAST = "last.json"
MOST_REMEMBERED = 4 * 2**20
"""Characters of a document that is kept whole; of a larger one only what it warns of."""


def remember(document: str) -> None:
    """Keep the last result; where there is no room for it, nothing is said."""
    if len(document) > MOST_REMEMBERED:
        found = json.loads(document)
        document = json.dumps({key: found[key] for key in ("schema", "spec", "warnings") if key in found})
    with suppress(OSError, RuntimeError):
        folder = files.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(folder / LAST, document.encode())


def remembered() -> dict[str, Any]:
    """The last result as a document; empty without one."""
    with suppress(OSError, RuntimeError, ValueError):
        found = files.parse_json(files.read_bytes(files.cache_folder() / LAST))
        return found if isinstance(found, dict) else {}
    return {}


def to_stderr(text: str, *, quiet: bool) -> None:
    """One line on stderr."""
    if not quiet:
        CleanConsole(stderr=True, soft_wrap=True).print(Text(text, style="default"))


def check_writable(path: Path, *, option: str = "--output") -> None:
    """Refuse a file that cannot be written, before the work and not after it."""
    try:
        if path.is_dir():
            raise UsageError(f"{option}: {path} is a folder. Expected the path of a file.")
        if is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "permission denied")
            return
        target = files.target_of(path)
        if not target.parent.is_dir():
            raise UsageError(f"{option}: there is no folder {path.parent} to write {path.name} in. Create it first.")
        os.stat(target)  # a name that is too long
    except FileNotFoundError:
        _try_folder(path, target.parent, option)
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path} ({reason(error)}). Choose another place.") from None
    else:
        _try_folder(path, target.parent, option)


def _try_folder(path: Path, folder: Path, option: str) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path} ({reason(error)}). Choose another place.") from None


def check_picture(path: Path, *, option: str = "--plot") -> None:
    """Refuse a picture that cannot be drawn or written, before the work and not after it."""
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{option}: {path} has no picture's name. Expected one that ends in {', '.join(PICTURES)}.")
    require_package("matplotlib", option=option, extra="plot")
    check_writable(path, option=option)


def check_page(path: Path, *, option: str = "--html") -> None:
    """Refuse a page that cannot be made or written, before the work and not after it."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{option}: {path} has no page's name. Expected one that ends in .html.")
    require_package("plotly.offline", option=option, extra="report")
    check_writable(path, option=option)


def illustrate(result: RichResult, given: Given) -> None:
    """Write the picture and the page of a result, those that were asked for."""
    if given.plot is not None:
        from zoscope.report.figures import draw  # late: pictures take time to load

        draw(result.to_dict(), [given.plot])
    if given.html is not None:
        from zoscope.report.html import write

        write([result.to_dict()], given.html, command=shlex.join(("zoscope", *given.line)))


def write_whole(path: Path, text: str, *, option: str = "--output") -> None:
    """Write ``text`` to ``path`` so that no reader ever sees a part of it; an old file stays until then."""
    try:
        files.write_whole(path, text.encode("utf-8"))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path} ({reason(error)}). Nothing was written there.") from None
