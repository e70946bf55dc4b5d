"""Checks of option values. Each raises a ``UsageError`` of one paragraph that names the option."""

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoscope.errors import UsageError


def choice(option: str, value: str, allowed: Sequence[str]) -> Any:
    """``value``, which must be one of ``allowed``; otherwise the error names the nearest.

    Returns:
        ``value``, as ``Any``: where it goes the type is a ``Literal`` of the names in ``allowed``.
    """
    if value in allowed:
        return value
    near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"{option}: unknown value '{value}'. Expected one of {', '.join(allowed)}.{hint}")


def positive(option: str, value: float) -> float:
    """A finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{option}: got {value:g}. Expected a finite number above 0.")
    return value


def relative(option: str, value: float) -> float:
    """A relative precision, strictly between 0 and 1."""
    if not 0 < value < 1:
        raise UsageError(
            f"{option}: got {value:g}. Expected a relative precision strictly between 0 and 1, such as 0.02 for 2 %; "
            "an exact answer needs --method dense."
        )
    return value


def at_least(option: str, value: int, least: int) -> int:
    """An integer not below ``least``."""
    if value < least:
        raise UsageError(f"{option}: got {value}. Expected an integer of at least {least}.")
    return value


def size(option: str, text: str) -> int:
    """Bytes, from a number with a unit or without: 500MB, 2 GiB, 1.5g, 4096."""
    from zoscope.config.keys import bytes_of  # late, for a fast --help

    found = bytes_of(text)
    if found is None:
        raise UsageError(
            f"{option}: got '{text}'. Expected a size in bytes, or with a unit, such as 500MB, 2GB or 1.5GiB."
        )
    return found


def momentum(option: str, value: float) -> float:
    """A momentum coefficient in [0, 1)."""
    if not 0 <= value < 1:
        raise UsageError(f"{option}: got {value:g}. Expected a number in [0, 1), such as 0.9.")
    return value


def pair(option: str, text: str) -> tuple[float, float]:
    """``B1,B2``, two momentum coefficients in [0, 1)."""
    parts = text.split(",")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        raise UsageError(
            f"{option}: got '{text}'. Expected two numbers in [0, 1) with a comma between them, such as 0.9,0.999."
        ) from None
    return momentum(option, first), momentum(option, second)


def device(option: str, value: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i``; whether it exists is for the measurement to find out."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise UsageError(f"{option}: unknown device '{value}'. Expected auto, cpu, cuda or cuda:i, such as cuda:0.")
    return value


def preconditioner(option: str, value: str) -> str:
    """``expected`` or ``state:FILE`` with a file that exists."""
    if value == "expected":
        return value
    kind, _, name = value.partition(":")
    if kind != "state" or not name:
        raise UsageError(
            f"{option}: unknown value '{value}'. Expected 'expected', or 'state:FILE' with the state_dict of a "
            "torch.optim.Adam or AdamW."
        )
    existing(option, Path(name))
    return value


def existing(option: str, path: Path) -> Path:
    """A file that is there."""
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {path}. Expected the path of an existing file.")
    return path


def regex(option: str, pattern: str) -> str:
    """A regular expression that compiles."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option}: '{pattern}' is not a regular expression ({error}).") from None
    return pattern
