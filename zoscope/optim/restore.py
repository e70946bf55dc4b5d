"""Perturb parameters in place and bring them back exactly.

``(θ + δ) − δ`` is not θ in floating point, and a run that trusts it drifts. Two ways around it:

* `Snapshot` keeps a copy of the parameters. Exact for every dtype; costs the memory of the parameters once more.
* `FixedPoint` makes the additions themselves exact and keeps nothing. θ is rounded, once, to the spacing that floats
  have at ``|θ| + B`` where ``B`` bounds every entry of ``δ = μu``, and δ to multiples of the coarsest such spacing (at
  least ``μ/128``, far below what the law of u notices). Then θ, δ, ``θ + δ`` and ``θ − δ`` all lie on one grid that
  floats represent, so no addition rounds. Parameters move once by at most half that spacing (1e-9 in float32 at
  μ = 1e-3 and ``|θ| < 0.01``, less than a float32 forward pass can tell); from then on they come back bit for bit.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from zoscope.optim.directions import Block

Restore = Literal["auto", "snapshot", "fixed-point"]
SNAPSHOT_BYTES = 1 << 26


class Perturbation(Protocol):
    """Moves blocks of parameters to ``θ + μu``, from there to ``θ − μu``, and back to θ.

    Attributes:
        overwrites: Whether the directions handed over are written to; if so, they must be fresh each time.
    """

    overwrites: ClassVar[bool]

    def begin(self) -> None:
        """Take the parameters as they are now as θ."""
        ...

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from θ to ``θ + μu``."""
        ...

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """Block ``index`` from ``θ + μu`` to ``θ − μu``."""
        ...

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """Block ``index`` from ``θ + sign·μu`` back to θ; returns the u that was really used."""
        ...

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """The u that was really used for block ``index``."""
        ...


def choose_perturbation(blocks: Sequence[Block], *, mu: float, restore: Restore) -> Perturbation:
    """The perturbation that ``restore`` names.

    ``auto`` is a snapshot for parameters of up to 64 MiB and for half precision, where a grid would be too coarse to
    train on, and fixed point for what is larger.

    Raises:
        ValueError: If ``restore`` is unknown, or names ``fixed-point`` for parameters in half precision.
    """
    half = any(b.dtype not in (torch.float32, torch.float64) for b in blocks)
    if restore not in get_args(Restore):
        raise ValueError(f"unknown restore {restore!r}: expected one of {', '.join(get_args(Restore))}")
    if restore == "fixed-point" and half:
        raise ValueError("restore='fixed-point' needs float32 or float64 parameters; use 'snapshot' for half precision")
    size = sum(p.numel() * p.element_size() for b in blocks for p in b.pieces)
    if restore == "snapshot" or (restore == "auto" and (half or size <= SNAPSHOT_BYTES)):
        return Snapshot(blocks, mu=mu)
    return FixedPoint(blocks, mu=mu)


class Snapshot:
    """Keeps a copy of θ; see the module's text."""

    overwrites: ClassVar[bool] = False

    def __init__(self, blocks: Sequence[Block], *, mu: float) -> None:
        self._blocks = blocks
        self._mu = mu
        self._saved = [[torch.empty_like(p) for p in b.pieces] for b in blocks]

    def begin(self) -> None:
        """See `Perturbation.begin`."""
        for block, saved in zip(self._blocks, self._saved, strict=True):
            torch._foreach_copy_(saved, block.pieces)

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.plus`."""
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=self._mu)

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.minus`."""
        torch._foreach_add_(self._blocks[index].pieces, self.used(index, direction), alpha=-2.0 * self._mu)

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """See `Perturbation.restore`."""
        torch._foreach_copy_(self._blocks[index].pieces, self._saved[index])
        return self.used(index, direction)

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """See `Perturbation.used`."""
        dtype = self._blocks[index].dtype
        return list(direction) if direction[0].dtype == dtype else [u.to(dtype) for u in direction]


class FixedPoint:
    """Keeps θ on a grid on which every perturbation is exact; see the module's text."""

    overwrites: ClassVar[bool] = True

    def __init__(self, blocks: Sequence[Block], *, mu: float) -> None:
        self._blocks = blocks
        self._mu = mu
        unit = 2.0 ** math.floor(math.log2(mu))
        self._bound = 16.0 * unit
        self._finest = unit / 64.0
        self._spacing: list[list[float]] = []

    def begin(self) -> None:
        """See `Perturbation.begin`: rounds θ to its grid, which changes nothing where it lies there already."""
        self._spacing = []
        for block in self._blocks:
            shift = torch._foreach_sign(block.pieces)
            torch._foreach_mul_(shift, self._bound)
            torch._foreach_add_(block.pieces, shift)
            torch._foreach_sub_(block.pieces, shift)
            self._spacing.append([self._spacing_for(value, block.dtype) for value in _largest(block.pieces)])

    def plus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.plus`."""
        torch._foreach_add_(self._blocks[index].pieces, self._delta(index, direction))

    def minus(self, index: int, direction: Sequence[Tensor]) -> None:
        """See `Perturbation.minus`."""
        torch._foreach_sub_(self._blocks[index].pieces, self._delta(index, direction), alpha=2.0)

    def restore(self, index: int, direction: Sequence[Tensor], *, sign: int) -> list[Tensor]:
        """See `Perturbation.restore`."""
        delta = self._delta(index, direction)
        torch._foreach_sub_(self._blocks[index].pieces, delta, alpha=float(sign))
        torch._foreach_div_(delta, self._mu)
        return delta

    def used(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        """See `Perturbation.used`."""
        delta = self._delta(index, direction)
        torch._foreach_div_(delta, self._mu)
        return delta

    def _delta(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        spacing = self._spacing[index]
        delta = list(direction)
        torch._foreach_mul_(delta, [self._mu / s for s in spacing])
        torch._foreach_round_(delta)
        torch._foreach_mul_(delta, spacing)
        return delta

    def _spacing_for(self, largest: float, dtype: torch.dtype) -> float:
        # A run that blew up is data: whatever δ is then, its parameters stay non-finite.
        if not math.isfinite(largest):
            return self._finest
        exponent = math.floor(math.log2(largest + self._bound))
        return max(self._finest, 2.0**exponent * torch.finfo(dtype).eps)


def _largest(pieces: Sequence[Tensor]) -> list[float]:
    """Largest absolute value of each tensor."""
    # A maximum norm takes as long as drawing the direction; the two extremes a twentieth of it.
    ends = torch.stack([end for piece in pieces for end in torch.aminmax(piece)])
    return ends.abs_().view(-1, 2).amax(1).tolist()
