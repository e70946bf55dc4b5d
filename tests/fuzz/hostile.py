"""Values and damage that nobody means well with, and the command line under them."""

import contextlib
import io
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

from zoscope.cli.app import run

EXAMPLES = int(os.environ.get("FUZZ", "8"))
"""Inputs of every test: few by default, as many as wanted with FUZZ=1000 pytest tests/fuzz."""

HANGS = 60
"""Seconds after which a command counts as hanging: a machine may be busy, and the first one imports torch."""

WORKS = 10
"""Seconds of processor time that a command may take: a busy machine does not add to them."""

SEED = os.environ.get("FUZZ_SEED")
"""Other inputs than the usual ones: FUZZ_SEED=1."""

bounded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # to shrink an input takes longer than to read it
    suppress_health_check=list(HealthCheck),
)


def seeded(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the usual inputs, or of those of ``FUZZ_SEED``."""
    return bounded(test) if SEED is None else seed(int(SEED))(bounded(test))


SPEC = """
import torch, zoscope
E = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
def problem(scale=1.0):
    x = torch.ones(3, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * scale * (E * x * x).sum(), x)
"""

# No path separators: nothing is written outside of the working folder.
WORDS = st.text(st.characters(blacklist_characters="/\\\0", blacklist_categories=()), max_size=30)
# ruff: noqa: RUF005 - lists of values read best as lists
NUMBERS = st.sampled_from(
    ["0", "-0", "-1", "1", "2", "0.5", "1e-3", "1e-300", "1e400", "-1e400", "nan", "inf", "-inf", "9" * 25, "9" * 5000]
    + [
        "1_0",
        "0x10",
        "²",
        "١",
        "1.",
        ".5",
        "1e",
        "1e9999",
        "1,2",
        "0.9,0.999",
        "1;2",
        "1/2",
        " 1 ",
        "1 2",
        "+3",
        "--",
        "-",
    ]
)
ODD = st.sampled_from(
    ["", " ", "\n", "\x1b[2J\x1b]0;T\x07", "\x9b31m", "\udc80", "\u202eabc", "[red]x[/foo]", "%s%n{0}", "[" * 3000]
    + [
        "a" * 300,
        "~",
        ".",
        "folder",
        "pipe",
        "loop",
        "/dev/zero",
        "/dev/null",
        "model.py",
        "model.py:x",
        "true",
        "null",
    ]
    + [
        "&a [*a]",
        "!!python/object:os.system x",
        "{a: 1}",
        "[1, 2]",
        "auto",
        "zo-gd",
        "adam",
        "=",
        "a=b",
        "x=1e5",
        "(a+)+$",
    ]
)
VALUES = st.one_of(NUMBERS, ODD, WORDS)

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.sampled_from([10**400, -1, 2**63])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


class HangError(BaseException):
    """A command took too long."""


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def folder_of(files: Mapping[str, bytes | str]) -> Iterator[Path]:
    """A working folder with some files, and with what is no file under ``folder``, ``pipe`` and ``loop``.

    No part of a file is left in it.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name)
        (place / "folder").mkdir()
        (place / "loop").symlink_to("loop")
        if hasattr(os, "mkfifo"):
            os.mkfifo(place / "pipe")
        for path, content in {"model.py": SPEC, **files}.items():
            (place / path).parent.mkdir(exist_ok=True)
            (place / path).write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
        os.chdir(place)
        try:
            yield place
            left = [path.name for path in place.rglob(".*.*") if path.is_file()]
            assert not left, left  # of files that are written whole or not at all
        finally:
            os.chdir(before)


def zoscope_says(args: Sequence[str]) -> Said:
    """Run a command; it ends in time, without a traceback, with one paragraph at most and no control characters."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise HangError

    out, err = io.StringIO(), io.StringIO()
    timers = (signal.SIGALRM, signal.ITIMER_REAL, HANGS), (signal.SIGPROF, signal.ITIMER_PROF, WORKS)
    before = [signal.signal(number, hangs) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(args)
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
    said = Said(code, out.getvalue(), err.getvalue())
    everything = said.out + said.err
    assert code in (0, 1, 2, 3), (args, code, everything)
    assert "this is a bug" not in everything, (args, everything)
    assert "Traceback" not in everything, (args, everything)
    assert len(re.findall("^Error: ", said.err, re.MULTILINE)) <= 1, (args, said.err)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", everything), (args, everything)
    assert code == 0 or everything, args
    return said


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes with a piece cut off, overwritten, doubled, or filled in."""
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece = draw(
            st.sampled_from([b"", b"\0" * 40, b"\xff", b"\n", b"[" * 2000, b"9" * 5000, b"NaN", b"-", data[a:b]])
        )
        how = draw(st.sampled_from(["truncate", "insert", "replace", "flip", "tail"]))
        if how == "truncate":
            data = data[:a]
        elif how == "insert":
            data = data[:a] + piece + data[a:]
        elif how == "replace":
            data = data[:a] + piece + data[b:]
        elif how == "tail":
            data += piece
        elif a < len(data):
            data = data[:a] + bytes([data[a] ^ 1 << draw(st.integers(0, 7))]) + data[a + 1 :]
    return data


def changed(draw: Any, document: Any) -> Any:
    """A document of mappings and lists with one value, somewhere in it, replaced, removed or renamed."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw(st.sampled_from(keys))
    copy = dict(document) if isinstance(document, dict) else list(document)
    how = draw(st.integers(0, 6))
    if how == 0:
        del copy[key]
    elif how == 1 and isinstance(copy, dict):
        copy[draw(WORDS)] = copy.pop(key)
    else:
        copy[key] = changed(draw, copy[key])
    return copy
