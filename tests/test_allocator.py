"""Memory that is kept between products, and given back."""

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zoscope import Problem
from zoscope.runtime import available_memory, held_memory, kept_memory, memory_limit, release_memory
from zoscope.runtime import memory as allocator

SIZE = 200 * 2**20
NEAR = 40 * 2**20  # others than tensors come and go too

needs_glibc = pytest.mark.skipif(allocator._glibc() is None, reason="not glibc, or the environment sets its thresholds")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _no_free_memory() -> None:
    """What earlier tests have freed would be taken again without a trace in what is resident."""
    if (library := allocator._glibc()) is not None:
        library.malloc_trim(0)


def allocate_and_free() -> None:
    _ = [torch.ones(SIZE // 5, dtype=torch.uint8) for _ in range(5)]


@needs_glibc
def test_memory_is_kept_inside_and_given_back_after() -> None:
    before = resident()
    with kept_memory():
        allocate_and_free()
        assert resident() > before + SIZE - NEAR
        with kept_memory():
            pass
        assert resident() > before + SIZE - NEAR  # the inner one gives nothing back
    assert resident() < before + NEAR
    allocate_and_free()
    assert resident() < before + 64 * 2**20 + NEAR  # glibc's own threshold


@needs_glibc
def test_an_error_inside_gives_memory_back() -> None:
    before = resident()
    with contextlib.suppress(KeyError), kept_memory():
        allocate_and_free()
        raise KeyError
    assert resident() < before + NEAR


@needs_glibc
def test_memory_that_ran_out_is_given_back_at_once() -> None:
    before = resident()
    with kept_memory():
        allocate_and_free()
        release_memory(torch.device("cpu"))
        assert resident() < before + NEAR


@needs_glibc
def test_what_is_merely_kept_counts_as_available() -> None:
    with kept_memory():
        held, free = held_memory("cpu"), available_memory("cpu")
        allocate_and_free()
        assert held_memory("cpu") < held + NEAR
        assert allocator.unused_memory() > SIZE - NEAR
        assert available_memory("cpu") > free - SIZE // 2  # others use the machine too
    assert allocator.unused_memory() == 0


class Library:
    """Notes what it is told, as a glibc that takes no threshold above 32 MiB."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, name: int, value: int) -> int:
        if name == allocator._MMAP_THRESHOLD and value > 2**25:
            return 0
        self.values[name] = value
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.trimmed += 1
        return 1


def test_an_older_glibc_is_told_to_map_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(allocator, "_glibc", lambda: library)
    with kept_memory():
        assert library.values == {allocator._MMAP_MAX: 0, allocator._TRIM_THRESHOLD: 2**31 - 1}
        assert allocator.unused_memory() == 0  # it does not say
        with kept_memory():
            pass
        assert not library.trimmed
    assert library.values == dict(allocator._USUAL)
    assert library.trimmed == 1


def test_other_libraries_and_settings_of_the_user_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=None))  # musl has no malloc_trim
    assert allocator._glibc() is None
    with kept_memory():
        assert allocator._users == 0
    monkeypatch.undo()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert allocator._glibc() is None
    monkeypatch.undo()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=100000")
    assert allocator._glibc() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator._glibc() is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, True), ({"differentiable": False}, False), ({"max_memory": 2**40}, False)],
)
def test_derivatives_keep_memory_and_limits_do_not(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], kept: bool
) -> None:
    monkeypatch.setattr(allocator, "_glibc", Library)
    problem = Problem.from_criterion(nn.Linear(3, 1), [(torch.randn(8, 3), torch.randn(8, 1))], nn.MSELoss())
    with problem.prepare(device="cpu", **options):  # type: ignore[arg-type]
        assert allocator._users == int(kept)
    with memory_limit(2**40), problem.prepare(device="cpu"):
        assert allocator._users == 0
    assert allocator._users == 0
