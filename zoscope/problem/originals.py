"""Copies of tensors, kept where they cost no working memory."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Protocol, cast

import torch
from torch import Tensor

IN_MEMORY = 1 << 26
"""Bytes up to which copies stay in memory; more go to the host (from a GPU) or to a temporary file (from the host)."""

CHUNK = 1 << 22
"""Bytes that travel between a file and memory at a time."""


class _Copy(Protocol):
    def put_back(self, tensor: Tensor) -> None: ...


class Originals:
    """The values of some tensors, to be put back bit for bit.

    Args:
        tensors: What to keep; they must stay where they are in memory.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._file: BinaryIO | None = None
        size = sum(t.numel() * t.element_size() for t in self._tensors)
        self._copies: list[_Copy] = []
        for tensor in self._tensors:
            if size <= IN_MEMORY or not _flat(tensor):
                self._copies.append(_InMemory(tensor.clone()))
            elif tensor.device.type != "cpu":
                self._copies.append(_InMemory(tensor.cpu()))
            else:
                self._copies.append(self._on_disk(tensor))

    def _on_disk(self, tensor: Tensor) -> _Copy:
        try:
            if self._file is None:
                self._file = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - open as long as this object
            return _InFile(self._file, tensor)
        except OSError:  # no room or no right to write: memory it is
            return _InMemory(tensor.clone())

    @property
    def in_memory(self) -> int:
        """Bytes that the copies take on the tensors' own device."""
        pairs = zip(self._copies, self._tensors, strict=True)
        held = [t for copy, t in pairs if isinstance(copy, _InMemory) and copy.value.device == t.device]
        return sum(t.numel() * t.element_size() for t in held)

    @torch.no_grad()
    def put_back(self, indices: Sequence[int] | None = None) -> None:
        """Give tensors the values that they had; all of them, or those of some indices."""
        for index in range(len(self._tensors)) if indices is None else indices:
            self._copies[index].put_back(self._tensors[index])

    def close(self) -> None:
        """Forget the copies."""
        self._copies.clear()
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[Originals]:
    """Put tensors back on exit."""
    originals = Originals(tensors)
    try:
        yield originals
    finally:
        originals.put_back()
        originals.close()


class _InMemory:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def put_back(self, tensor: Tensor) -> None:
        _put(tensor, self.value)


class _InFile:
    """Bytes of a tensor at the end of a file, read through one small buffer."""

    def __init__(self, file: BinaryIO, tensor: Tensor) -> None:
        self._file = file
        self._start = file.seek(0, 2)
        for part in torch.split(_bytes(tensor), CHUNK):
            file.write(part.numpy().data)

    def put_back(self, tensor: Tensor) -> None:
        self._file.seek(self._start)
        buffer = bytearray(CHUNK)
        for part in torch.split(_bytes(tensor), CHUNK):
            view = memoryview(buffer)[: len(part)]
            if cast("int", self._file.readinto(view)) != len(part):  # type: ignore[attr-defined]
                raise OSError("a temporary file with the values of parameters is shorter than what was written to it")
            _put(part, torch.frombuffer(view, dtype=torch.uint8))


def _flat(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.is_contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _put(tensor: Tensor, value: Tensor) -> None:
    # Only what changed: writing bumps the version counter, which would break graphs that the caller still holds.
    if value.device != tensor.device or not torch.equal(tensor, value):
        tensor.copy_(value)
