"""What goes wrong on one rank, told to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zoscope.errors import NumericalError, SpecError, UsageError, ZoscopeError
from zoscope.runtime.memory import is_out_of_memory


class LostRankError(ZoscopeError):
    """Another process of the job has gone: exit code 3."""


class DroppedError(Exception):
    """Common work failed somewhere; rank 0 reports it, the others wait for what comes next."""


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, in a form that travels."""

    rank: int
    kind: str
    message: str
    frame: str = ""

    @classmethod
    def of(cls, rank: int, error: Exception) -> Failure:
        """An exception as words."""
        kind = "memory" if is_out_of_memory(error) else type(error).__name__
        frame = error.frame if isinstance(error, SpecError) else ""
        return cls(rank, kind, " ".join(str(error).split()), frame)

    def error(self) -> Exception:
        """The exception for rank 0 to raise."""
        message = f"{self.message} (This is what rank {self.rank} says; rank 0 had no such trouble.)"
        if self.kind == "memory":
            return torch.OutOfMemoryError(message)
        if self.kind == SpecError.__name__:
            return SpecError(message, frame=self.frame)
        known = {cls.__name__: cls for cls in (UsageError, NumericalError)}
        return known[self.kind](message) if self.kind in known else RuntimeError(f"{self.kind}: {message}")
