"""How much memory is left, what a computation takes, and what an allocator keeps."""

import ctypes
import gc
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def release_memory(device: torch.device) -> None:
    """Hand cached blocks back after an out-of-memory error."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back()


_limits: list[int] = []  # of the sessions entered, outermost first


@contextmanager
def memory_limit(size: int | None) -> Iterator[None]:
    """Have `available_memory` count what is left of a limit.

    Args:
        size: Bytes that this process may hold in all, on each device; None leaves the limit that there is.
    """
    if size is None:
        yield
        return
    _limits.append(size)
    try:
        yield
    finally:
        _limits.remove(size)


def is_limited() -> bool:
    """Whether a limit was set."""
    return bool(_limits)


def available_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device; for the CPU what the machine and the container leave.

    Within `memory_limit`, no more than what the process does not hold yet of it.
    """
    device = torch.device(device)
    left = [max(0, limit - held_memory(device)) for limit in _limits]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)), *left, 2**62)
    return min([min(_machine_memory(), *_container_memory()) + unused_memory(), *left])


def held_memory(device: torch.device | str) -> int:
    """Bytes that this process holds: tensors on a CUDA device, and for the CPU what is resident and not merely kept."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return resident_memory() - unused_memory() or _peak_resident()


def _peak_resident() -> int:
    """Where the system does not say what is resident now: the most that ever was."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine_memory() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no figure for what is free: half of all
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _container_memory() -> Sequence[int]:
    """What control groups (v2, v1) leave; caches of files count as free, since the kernel drops them."""
    left = [2**62]
    for folder, limit, usage, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            root = Path(folder)
            total, used = int((root / limit).read_text()), int((root / usage).read_text())
            reclaimable = re.search(rf"^{cache} (\d+)", (root / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such group, or the limit is the word "max"
            continue
        left.append(max(0, total - used + (int(reclaimable.group(1)) if reclaimable else 0)))
    return left


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors on a device that ``run`` had alive at a time, besides those from before.

    CUDA's allocator keeps count; elsewhere every operation of torch is watched, which slows small ones down.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return max(0, int(torch.cuda.max_memory_allocated(device)) - before)
    watch = _Watch()
    with watch:
        run()
    return watch.peak


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):  # what existed before is not new because a view of it is
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
