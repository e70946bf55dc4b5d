"""The Typer application and the one way out of it."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import IO, Annotated, Any, NoReturn

import typer
from rich.text import Text

from zoscope._version import __version__
from zoscope.cli.output import to_stdout
from zoscope.errors import OutputError, SpecError, UsageError, ZoscopeError
from zoscope.files import reason
from zoscope.report.console import CleanConsole, usable
from zoscope.text import clean

# Order of the help page. Each is a module of this package whose ``command`` is the command of that name.
COMMANDS = ("bounds", "plan", "probe", "check", "track", "spectrum", "report", "explain", "init")

EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MISTAKES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)  # in a name that was given
COMPLETES = "_ZOSCOPE_COMPLETE"  # set by a shell that wants completions; what it has so far is in other variables
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for a program that the signal ends

# Newer releases of Typer ship a click of their own, so that click itself may be absent or another one.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zoscope {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """How large may the step size be? First- and zeroth-order stability bounds from your model's own curvature."""


def build(args: Sequence[str] = ()) -> typer.Typer:
    """The application with its commands: the one that ``args`` begin with, as its modules take time to load, or all."""
    app = typer.Typer(
        name="zoscope",
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in [name for name in COMMANDS if name in args[:1]] or COMMANDS:
        command = import_module(f"zoscope.cli.{name}").command
        app.command(name, help=_paragraphs(command.__doc__ or ""))(command)
    return app


def _paragraphs(text: str) -> str:
    """A docstring whose lines end where the terminal does: Typer keeps line ends in all paragraphs but the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; every exit code of zoscope leaves through here."""
    _occupy_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without η prints '?' rather than a traceback
    for name in os.environ.keys() - usable(os.environ).keys():
        del os.environ[name]  # Typer reads them, too
    os.environ.update(usable(os.environ))
    given = sys.argv[1:] if args is None else args
    try:
        code = run_ranked(given) if is_ranked(os.environ) else run(given)
    except UsageError as error:
        code = report(error)
    sys.exit(code)


def _occupy_streams() -> None:
    """Put something in the place of standard streams that are closed: the next file opened would become one of them.

    Stdout gets what refuses to be written to, so that a result does not get lost without a word.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, flags)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def run(args: Sequence[str]) -> int:
    """Run the command line on ``args`` and return the exit code, with any error already reported on stderr."""
    try:
        code = _invoke(list(args) or ["--help"])
        with to_stdout():
            sys.stdout.flush()
    except BaseException as error:
        return report(error)
    return code if args else EXIT_USAGE


def _invoke(args: list[str]) -> int:
    # Not command.main(): it turns a broken pipe and every usage error into exits of its own.
    command: Any = typer.main.get_command(build(args))
    if COMPLETES in os.environ:
        command.main(args, prog_name="zoscope")
    try:
        with command.make_context("zoscope", args, obj=tuple(args)) as context:  # typer itself exits here
            try:
                command.invoke(context)
            except SystemExit as error:
                if isinstance(error.__context__, BrokenPipeError):  # rich's
                    raise
                raise _exit_within(error) from error
    except typer.Exit as done:
        return done.exit_code
    return 0


def _exit_within(error: SystemExit) -> ZoscopeError:
    """What the user's code, which is not asked to end this program, has done."""
    from zoscope.problem.data import format_frames, where  # late: it takes torch

    return SpecError(
        f"The spec's own code called sys.exit({error.code!r}){where(error)} while it was measured. Expected that it "
        "returns, or raises an error that says what is wrong.",
        frame=format_frames(error),
    )


def report(error: BaseException) -> int:
    """Say on stderr what went wrong, and return the exit code for it."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        return _broken_pipe()  # rich raises SystemExit out of it
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, (KeyboardInterrupt, EOFError, typer.Abort)):
        complain("Interrupted.", label="")
        return EXIT_INTERRUPTED
    if isinstance(error, OutputError):
        _discard_output()
    if isinstance(error, ZoscopeError):
        complain(str(error), frame=error.frame if isinstance(error, SpecError) else "")
        return error.exit_code
    if isinstance(error, ClickException):
        complain(_usage_message(error))
        return EXIT_USAGE
    if _is_out_of_memory(error):
        complain(
            f"out of memory ({_first_line(error)}). A smaller --micro-batch, fewer batches in the spec, "
            "or --params with fewer parameters needs less."
        )
        return EXIT_FAILED
    if isinstance(error, OSError):  # a disk, a network, a name: the system's refusal, wherever it came up
        complain(_refusal(error))
        return EXIT_USAGE if error.errno in MISTAKES else EXIT_FAILED
    with suppress(OSError):
        sys.stderr.write(clean("".join(traceback.format_exception(error))))
    complain(f"{type(error).__name__} inside zoscope: this is a bug in zoscope, the lines above show where.")
    return EXIT_FAILED


def complain(message: str, *, frame: str = "", label: str = "Error: ", file: IO[str] | None = None) -> None:
    """One paragraph on stderr, or in another file, with the user's own traceback lines below it."""
    console = CleanConsole(stderr=True, file=file, soft_wrap=True)
    console.print(Text(label, style="bold red") + Text(" ".join(message.split()), style="default"))
    if frame:
        console.print(Text(frame.rstrip("\n"), style="dim"))


CLOSE = 0.7
"""Likeness of two names from which one is suggested for the other."""

UNREADABLE = "Input should be a valid integer"
"""How the reader of options begins to say that a text is no number."""


def _usage_message(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "zoscope"
    if getattr(error, "possibilities", None):  # "--html" is no help to who wants "--lr"
        error.possibilities = get_close_matches(error.option_name, error.possibilities, cutoff=CLOSE)
    message = error.format_message()
    if UNREADABLE in message:
        message = message.partition(UNREADABLE)[0] + "expected a whole number, such as 2000"
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} See '{where} --help'."


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    runtime = sys.modules.get("zoscope.runtime")  # not loaded: then torch was not, and it is none of its errors
    return runtime is not None and bool(runtime.is_out_of_memory(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refusal(error: OSError) -> str:
    from zoscope.config.sources import shorten  # late: it takes the readers of configurations

    name = "" if error.filename is None else f" ({shorten(os.fsdecode(error.filename))})"
    return f"The system refused: {reason(error)}{name}. Expected a file or folder that can be read or written there."


def _broken_pipe() -> int:
    _discard_output()
    return EXIT_BROKEN_PIPE


def _discard_output() -> None:
    # The interpreter flushes stdout once more on exit; there must be something that takes it.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_ranked(environment: Mapping[str, str]) -> bool:
    """Whether the environment names a job of more than one process.

    Raises:
        UsageError: If what it names cannot be.
    """
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if not rank or not size:
        return False
    found = {name: environment[name] for name in JOB if environment.get(name)}
    numbers = {name: int(text) for name, text in found.items() if re.fullmatch("[0-9]{1,6}", text)}
    wrong = [name for name in found if name not in numbers]
    if not wrong and not numbers["RANK"] < numbers["WORLD_SIZE"]:
        wrong = ["RANK"] if numbers["WORLD_SIZE"] else ["WORLD_SIZE"]
    if wrong:
        from zoscope.config.sources import shorten  # late: it takes the readers of configurations

        raise UsageError(
            f"The environment names a job of several processes, and {wrong[0]} is {shorten(found[wrong[0]])}. Expected "
            f"RANK from 0 to WORLD_SIZE − 1, as torchrun sets it; unset {' and '.join(found)} to run alone."
        )
    return numbers["WORLD_SIZE"] > 1


def run_ranked(args: Sequence[str]) -> int:
    """Run the command line on rank 0 with the help of the others; every rank returns the same exit code."""
    rank = int(os.environ["RANK"])
    speaker = sys.stderr if rank == 0 else _silenced()
    from zoscope import runtime  # late: it takes torch

    ends = _Ends(rank, speaker)
    try:
        with runtime.joined(on_lost=ends.lost, on_stop=ends.stopped) as ranks:
            if not ranks.leads:
                return runtime.serve(ranks)
            code = run(args)
            ranks.stop(code)
            return code
    except BaseException as error:
        return report(error)


class _Ends:
    """How a process ends that another one is gone from under; called on a thread, while the main one is busy."""

    def __init__(self, rank: int, speaker: IO[str]) -> None:
        self._rank, self._speaker = rank, speaker

    def lost(self, rank: int) -> NoReturn:
        """A process has gone: rank 0 says so and ends the others; rank 1 speaks where rank 0 is the one."""
        if self._rank <= 1:
            complain(
                f"The process of rank {rank} has gone, so this job ends: it was killed (out of memory, a time limit) "
                "or crashed outside of Python. Look at the system's log and at what torchrun says, then start again.",
                file=self._speaker,
            )
        from zoscope.runtime import current_ranks

        ranks = current_ranks()
        if ranks is not None and ranks.watch is not None:
            ranks.watch.send(EXIT_FAILED)
        self.stopped(EXIT_FAILED)

    def stopped(self, code: int) -> NoReturn:
        """End at once: the main thread may wait in an operation that will never be over."""
        sys.stdout.flush()
        os._exit(code)


def _silenced() -> IO[str]:
    """Send whatever this process prints nowhere, since rank 0 prints it already; what is left to speak with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interruption means
    speaker = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    return speaker
