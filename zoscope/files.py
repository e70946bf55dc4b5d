"""Files of the user: read with a limit, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

MOST_TEXT = 64 * 2**20
"""Bytes of a text that is read into memory: far more than any configuration, document or run has."""

LARGEST = 2**63
"""Integers in a document are smaller than this."""

STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""What a shell hands over is a pipe on purpose, with a writer at its other end."""


def read_bytes(path: Path, *, most: int = MOST_TEXT) -> bytes:
    """What a file holds.

    Raises:
        OSError: Also for what is no file (a folder, a device, a pipe nobody may ever write to) or holds more than
            ``most`` bytes; its ``strerror`` says so.
    """
    is_stream = str(path).startswith(STREAMS)
    if not is_stream:
        require_file(path)
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most // 2**20} MiB", str(path))
    return data


def read_text(path: Path, *, most: int = MOST_TEXT) -> str:
    """A text in UTF-8, with or without a byte order mark.

    Raises:
        OSError: As `read_bytes`.
        UnicodeDecodeError: If it is not UTF-8.
    """
    return read_bytes(path, most=most).decode("utf-8-sig")


def require_file(path: Path) -> None:
    """Refuse what is no regular file: to read a pipe may take forever, and a device has no end.

    Raises:
        OSError: If it is none, or not there.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device, pipe or socket, not a file", str(path))


def parse_json(text: str | bytes) -> Any:
    """A JSON document: numbers are finite, integers fit 64 bits.

    Raises:
        ValueError: If it is none, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:40])


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else LARGEST
    return value if abs(value) < LARGEST else _refuse(text[:40])


def resolved(path: Path) -> Path:
    """The absolute path without links. A link that leads to itself stays; opening it says what is wrong."""
    return Path(os.path.realpath(path))


def target_of(path: Path) -> Path:
    """The place that is written to for ``path``, links followed.

    Raises:
        OSError: If the link leads to itself.
    """
    target = resolved(path)
    if target.is_symlink():
        raise OSError(errno.ELOOP, "the link leads to itself", str(path))
    return target


def write_whole(path: Path, data: bytes | memoryview, *, durable: bool = False) -> None:
    """Write a file so that no reader ever sees a part of it; an old one stays until then.

    Devices and pipes are written to; a link keeps pointing where it did. With ``durable`` the file is on disk
    afterwards.

    Raises:
        OSError: If that is not possible; also for a pipe that nobody reads.
    """
    if is_special(path):
        _write_through(path, data)
        return
    target = target_of(path)
    where, prefix = target.parent, f".{target.name[:40]}."
    temporary = tempfile.NamedTemporaryFile(dir=where, prefix=prefix, delete=False, buffering=0)  # noqa: SIM115
    try:
        with temporary as file:
            write_all(file, data)
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary.name, _mode_of(target))
        os.replace(temporary.name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary.name)
        raise
    if durable:
        _sync_folder(target.parent)


def write_all(file: Any, data: bytes | memoryview) -> None:
    """Write everything to a file without a buffer."""
    view = memoryview(data)
    while view:  # a disk that fills up takes a part, and says so on the next call
        view = view[file.write(view) :]


def _sync_folder(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # not possible on this system
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_through(path: Path, data: bytes | memoryview) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:  # open() would wait for a reader, maybe forever
            raise OSError(errno.ENXIO, "nobody reads from this pipe", str(path)) from None
        raise
    os.set_blocking(handle, True)
    with open(handle, "wb", buffering=0) as file:
        write_all(file, data)


def _mode_of(target: Path) -> int:
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again; it may not exist yet.

    Raises:
        RuntimeError: If the user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(home) if home else Path.home() / ".cache") / "zoscope"


def is_special(path: Path) -> bool:
    """Whether it is there and no regular file, such as /dev/stderr or a named pipe: to replace it would destroy it."""
    return path.exists() and not path.is_file()


def reason(error: BaseException) -> str:
    """One line on what the system, or a reader of a format, refused."""
    said = getattr(error, "strerror", None) or str(error)
    return (str(said).splitlines() or [type(error).__name__])[0]
