"""Checks of option values, by the table of options. Each raises a ``UsageError`` of one paragraph with the option."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoscope.errors import UsageError
from zoscope.options import DEVICE, MOMENTUM, SAID, Option, Real, Several, Single, Whole, Words, bytes_of


def checked(option: Option, value: Any) -> Any:
    """A value of the command line as the rest of the program takes it; ``None`` where the option was not given."""
    if value is None:
        return None
    if isinstance(option.domain, Several):
        return [_checked(option.flag, option.domain.item, item) for item in value]
    return _checked(option.flag, option.domain, value)


def _checked(option: str, domain: Single, value: Any) -> Any:
    if isinstance(domain, Words):
        return choice(option, value, domain.names)
    if isinstance(domain, Whole | Real):
        return number(option, value, domain)
    form = getattr(domain, "form", "")
    return FORMS[form](option, value) if form else value


def choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """``value``, which must be one of ``allowed``; otherwise the error names the nearest."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"{option}: unknown value '{value}'. Expected one of {', '.join(allowed)}.{hint}")


def number(option: str, value: float, domain: Whole | Real) -> float:
    """A number in range."""
    expected = domain.expected(value)
    if expected is not None:
        got = value if isinstance(domain, Whole) else f"{value:g}"
        raise UsageError(f"{option}: got {got}. Expected {expected}.")
    return value


def size(option: str, text: str) -> int:
    """Bytes, from a number with a unit or without: 500MB, 2 GiB, 1.5g, 4096."""
    found = bytes_of(text)
    if found is None:
        raise UsageError(
            f"{option}: got '{text}'. Expected a size in bytes, or with a unit, such as 500MB, 2GB or 1.5GiB."
        )
    return found


def pair(option: str, text: str) -> tuple[float, float]:
    """``B1,B2``, two momentum coefficients."""
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option}: got '{text}'. Expected two numbers in [0, 1) with a comma between them, such as 0.9,0.999."
        ) from None
    return number(option, first, MOMENTUM), number(option, second, MOMENTUM)


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between them."""
    try:
        return tuple(number(option, float(part), Real()) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option}: got '{text}'. Expected numbers above 0 with commas between them, such as 0.8,1.25."
        ) from None


def steps(option: str, text: str) -> int | None:
    """A number of steps; ``None`` for auto."""
    if text == "auto":
        return None
    try:
        return int(number(option, int(text), Whole()))
    except ValueError:
        raise UsageError(f"{option}: got '{text}'. Expected 'auto' or a whole number of at least 1.") from None


def device(option: str, value: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:i``; whether it exists is for the measurement to find out."""
    if not re.fullmatch(DEVICE.pattern or "", value):
        raise UsageError(f"{option}: unknown device '{value}'. Expected {SAID['device']}.")
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


def picture(option: str, path: Path) -> Path:
    """A picture that can be drawn and written."""
    from zoscope.cli.output import check_picture

    check_picture(path, option=option)
    return path


def page(option: str, path: Path) -> Path:
    """A page that can be made and written."""
    from zoscope.cli.output import check_page

    check_page(path, option=option)
    return path


def output(option: str, path: Path) -> Path:
    """A file that can be written."""
    from zoscope.cli.output import check_writable

    check_writable(path, option=option)
    return path


FORMS: dict[str, Callable[[str, Any], Any]] = {
    check.__name__: check
    for check in (size, pair, numbers, steps, device, preconditioner, existing, regex, picture, page, output)
}
"""What reads a text or a path of each form."""
