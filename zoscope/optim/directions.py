"""Directions of the zeroth-order estimate: how they are drawn, and drawn again without being kept."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoscope.registry import DIRECTIONS, Directions

Seed = int | np.random.SeedSequence
Buffers = dict[tuple[torch.dtype, torch.device], Tensor]


def check_law(name: str) -> Directions:
    """``name`` as a law of directions.

    Raises:
        ValueError: If it is none.
    """
    if name not in DIRECTIONS:
        raise ValueError(f"unknown directions {name!r}: expected one of {', '.join(DIRECTIONS)}")
    return DIRECTIONS[name].name


def new_generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own, seeded through `numpy.random.SeedSequence`."""
    sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    generator = torch.Generator(device=device)
    generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
    return generator


def spawn_streams(seed: int, count: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """``count`` independent generators, the same for the same seed whatever runs on them and in which order."""
    return [new_generator(child, device) for child in np.random.SeedSequence(seed).spawn(count)]


def fill_rows(rows: Tensor, *, law: Directions, streams: Sequence[torch.Generator]) -> Tensor:
    """Draw one direction per row of ``rows`` ``(R, d)`` in place, row ``r`` from ``streams[r]``.

    Gaussian directions have independent N(0, 1) entries, Rademacher ones entries ±1; sphere directions are uniform on
    the sphere of radius √d.
    """
    for row, stream in zip(rows, streams, strict=True):
        _fill(row, law, stream)
    if law == "sphere":
        rows.mul_(math.sqrt(rows.shape[1]) / rows.norm(dim=1, keepdim=True))
    return rows


def _fill(entries: Tensor, law: Directions, stream: torch.Generator) -> None:
    """Independent entries; those of the sphere are scaled to its radius afterwards."""
    if law == "rademacher":
        entries.bernoulli_(0.5, generator=stream).mul_(2.0).sub_(1.0)
    else:
        entries.normal_(generator=stream)


@dataclass(frozen=True)
class Block:
    """Slices of parameters whose part of a direction is drawn in one call.

    Args:
        pieces: Tensors that share memory with the parameters.
        owners: For each piece, the index of its parameter and its ``[start, stop)`` there; ``None`` for a whole one.
    """

    pieces: list[Tensor]
    owners: list[tuple[int, tuple[int, int] | None]]

    @property
    def sizes(self) -> list[int]:
        """Number of entries of every piece."""
        return [p.numel() for p in self.pieces]

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its parameters."""
        return self.pieces[0].dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.pieces[0].device

    def views(self, flat: Tensor) -> list[Tensor]:
        """The entries of ``flat``, ``(size,)``, in the shapes of the pieces."""
        return [u.view(p.shape) for u, p in zip(torch.split_with_sizes(flat, self.sizes), self.pieces, strict=True)]

    def select(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The slices of ``tensors``, shaped like the parameters, that belong to this block."""
        return [
            tensors[index] if span is None else tensors[index].view(-1)[span[0] : span[1]]
            for index, span in self.owners
        ]


def partition(params: Sequence[Tensor], *, block_size: int) -> list[Block]:
    """Cut parameters into blocks of about ``block_size`` entries, each of one dtype and on one device.

    A block is what has to exist of a direction at a time: large parameters are cut, small ones share a block.
    A parameter that is not contiguous in memory stays whole.
    """
    blocks: list[Block] = []
    for index, parameter in enumerate(params):
        data = parameter.detach()
        for piece, span in _cut(data, block_size):
            last = blocks[-1] if blocks else None
            full = last is None or last.size + piece.numel() > block_size
            if last is None or full or (last.dtype, last.device) != (data.dtype, data.device):
                last = Block([], [])
                blocks.append(last)
            last.pieces.append(piece)
            last.owners.append((index, span))
    return blocks


def _cut(data: Tensor, block_size: int) -> Iterator[tuple[Tensor, tuple[int, int] | None]]:
    if data.numel() <= block_size or not data.is_contiguous():
        yield data, None
        return
    flat = data.view(-1)
    for start in range(0, flat.numel(), block_size):
        stop = min(start + block_size, flat.numel())
        yield flat[start:stop], (start, stop)


def buffer_for(block: Block, dtype: torch.dtype, blocks: Sequence[Block], buffers: Buffers) -> Tensor:
    """Room for the entries of a block, out of what is shared by all blocks on its device."""
    key = dtype, block.device
    if key not in buffers:
        largest = max(b.size for b in blocks if b.device == block.device)
        buffers[key] = torch.empty(largest, device=block.device, dtype=dtype)
    return buffers[key][: block.size]


class Direction:
    """One direction over all blocks. A large one is never held whole: its blocks are drawn again when they are needed.

    Args:
        blocks: What it covers.
        generator: Its stream, or one for every device that the blocks are on; the direction moves it on once, while its
            blocks are asked for the first time, in order.
        law: Their law.
        keep: Hold on to the blocks instead of drawing them again; the numbers are the same.
        buffers: Where blocks are drawn, by dtype and device; directions that share them take turns.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        generator: torch.Generator | Mapping[torch.device, torch.Generator],
        *,
        law: Directions,
        keep: bool,
        buffers: Buffers | None = None,
    ) -> None:
        self._blocks = blocks
        self._generator = generator
        self._law = law
        self._keep = keep
        self._kept: list[list[Tensor]] = []
        self._states: list[Tensor] = []
        # One buffer for all blocks: a fresh one each time, between what is kept, would leave the heap in pieces.
        self._buffers: Buffers = {} if buffers is None else buffers
        self._scale = 1.0
        if law == "sphere":
            self._scale = self._sphere_scale()

    def part(self, index: int) -> list[Tensor]:
        """The pieces of block ``index``, float64 for float64 parameters and float32 for others.

        Kept pieces are the same tensors every time; others are valid, and may be overwritten, until the next call.
        """
        if index < len(self._kept):
            return self._kept[index]
        if index < len(self._states):
            generator = self._stream(index)
            ahead = generator.get_state()
            generator.set_state(self._states[index])
            pieces = self._draw(index)
            generator.set_state(ahead)
            return pieces
        if not self._keep:
            self._states.append(self._stream(index).get_state())
            return self._draw(index)
        self._kept.append(self._draw(index))
        return self._kept[index]

    def _stream(self, index: int) -> torch.Generator:
        return self._generator[self._blocks[index].device] if isinstance(self._generator, Mapping) else self._generator

    def _draw(self, index: int) -> list[Tensor]:
        block = self._blocks[index]
        dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
        if self._keep:
            flat = torch.empty(block.size, device=block.device, dtype=dtype)
        else:
            flat = buffer_for(block, dtype, self._blocks, self._buffers)
        _fill(flat, self._law, self._stream(index))
        if self._scale != 1.0:
            flat.mul_(self._scale)
        return block.views(flat)

    def _sphere_scale(self) -> float:
        square = sum(float(u.double().square().sum()) for i in range(len(self._blocks)) for u in self.part(i))
        scale = math.sqrt(sum(b.size for b in self._blocks) / square)
        for pieces in self._kept:
            torch._foreach_mul_(pieces, scale)
        return scale
