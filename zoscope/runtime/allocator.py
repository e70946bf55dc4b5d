"""glibc's malloc, told to keep the memory that one product frees for the next one.

By itself it hands large blocks back to the kernel as soon as they are freed, and the next product gets them from there
anew, page by page and zeroed.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
_KEPT = 2**29
"""Bytes of the largest blocks that are kept: of larger ones, such as bases, parts may never have been touched."""
_MOST = 2**31 - 1  # that mallopt takes
_USUAL = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26), (_MMAP_MAX, 65_536))
"""Where glibc's own thresholds are once large blocks were freed. Setting one ends their adjustment for good."""

_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")

_lock = threading.Lock()
_users = 0  # of kept memory
_rest = 0  # bytes that were resident and not malloc's when the first of them came

_MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO.split())


def _glibc() -> Any:
    """The C library of this process; ``None`` where it is another one, or the user has set its thresholds."""
    if sys.platform != "linux" or any(name in os.environ for name in _OWN):
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    library = ctypes.CDLL(None)
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in names) else None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Have this process keep the host memory that it frees, and give it back at the end of the outermost use.

    Nothing happens without glibc, and where the environment sets its thresholds.
    """
    library = _glibc()
    if library is None:
        yield
        return
    _count(library, 1)
    try:
        yield
    finally:
        _count(library, -1)


def give_back() -> None:
    """Hand what is kept and not in use back to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def resident_memory() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def unused_memory() -> int:
    """Bytes that are in memory only because they are kept."""
    library = _glibc() if _users else None
    used = 0 if library is None else _used(library)
    return max(0, resident_memory() - _rest - used) if used else 0


def _used(library: Any) -> int:
    """Bytes that malloc has handed out, whether they were touched or not; 0 where it does not say."""
    if not hasattr(library, "mallinfo2"):  # before glibc 2.33
        return 0
    library.mallinfo2.restype = _Mallinfo2
    about = library.mallinfo2()
    return int(about.uordblks + about.hblkhd)


def _count(library: Any, change: int) -> None:
    global _users, _rest
    with _lock:
        before, _users = _users, _users + change
        if not before:
            _rest = resident_memory() - _used(library)
            if not library.mallopt(_MMAP_THRESHOLD, _KEPT):  # older ones take 32 MiB at most
                library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, _MOST)
        elif not _users:
            for name, value in _USUAL:
                library.mallopt(name, value)
            library.malloc_trim(0)
