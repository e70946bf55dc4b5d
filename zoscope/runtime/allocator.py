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
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
_MOST = 2**31 - 1  # that mallopt takes
_USUAL = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26), (_MMAP_MAX, 65_536))
"""Where glibc's own thresholds are once large blocks were freed. Setting one ends their adjustment for good."""

_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")

_lock = threading.Lock()
_users = 0  # of kept memory
_free_before = 0  # bytes, when the first of them came


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in (*"abcdefgh", "free", "top"))


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


def unused_memory() -> int:
    """Bytes that this process holds only because they are kept."""
    return max(0, _free(_glibc()) - _free_before) if _users else 0


def _free(library: Any) -> int:
    """Bytes of free blocks."""
    if not hasattr(library, "mallinfo2"):  # before glibc 2.33
        return 0
    library.mallinfo2.restype = _Mallinfo2
    return int(library.mallinfo2().free)


def _count(library: Any, change: int) -> None:
    global _users, _free_before
    with _lock:
        before, _users = _users, _users + change
        if not before:
            _free_before = _free(library)
            if not library.mallopt(_MMAP_THRESHOLD, _MOST):  # older ones take 32 MiB at most
                library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, _MOST)
        elif not _users:
            for name, value in _USUAL:
                library.mallopt(name, value)
            library.malloc_trim(0)
