"""How much memory is left, and whether an error says that it ran out."""

import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from zoscope.runtime.allocator import give_back, resident_memory, unused_memory

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
