"""What ``zoscope bounds --estimate`` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoscope._version import __version__
from zoscope.analysis.shown import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "zoscope.estimate/1"

SHARE = 0.8
"""Part of the free memory that a recommendation may fill."""


@dataclass(frozen=True)
class KindCost:
    """Cost of one kind of curvature.

    Args:
        kind: ``hessian``, ``ggn`` or ``forward``.
        products: Hessian-vector products expected; directions of two forward passes for ``forward``.
        most: The most that there can be.
        seconds_each: Seconds of one over all data; ``None`` where the kind is not available.
        seconds: Seconds in all.
        fixed_bytes: Memory besides the model that does not depend on the batches.
        batch_bytes: Memory for the largest micro-batch.
        largest: Its examples.
        problem: Why the kind is not available.
    """

    kind: str
    products: int
    most: int
    seconds_each: float | None
    seconds: float | None
    fixed_bytes: int | None
    batch_bytes: int | None
    largest: int
    problem: str | None = None

    @classmethod
    def impossible(cls, kind: str, problem: str) -> KindCost:
        """A kind that is not available here."""
        return cls(kind, 0, 0, None, None, None, None, 1, problem)

    @property
    def total_bytes(self) -> int | None:
        """Memory besides the model."""
        if self.fixed_bytes is None or self.batch_bytes is None:
            return None
        return self.fixed_bytes + self.batch_bytes

    def fitting(self, room: float) -> int | None:
        """Examples at a time that fit into ``room`` bytes; ``None`` when not even one does."""
        if self.fixed_bytes is None or self.batch_bytes is None:
            return None
        each = self.batch_bytes / self.largest
        left = room - self.fixed_bytes
        if left < each:
            return None
        return self.largest if each == 0 else min(self.largest, int(left / each))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "available": self.problem is None,
            "problem": self.problem,
            "num_hvps": self.products if self.problem is None else None,
            "num_hvps_most": self.most if self.problem is None else None,
            "seconds_per_hvp": self.seconds_each,
            "seconds": self.seconds,
            "bytes": self.total_bytes,
            "bytes_fixed": self.fixed_bytes,
            "bytes_per_micro_batch": self.batch_bytes,
        }


@dataclass(frozen=True)
class CostEstimate(Shown):
    """What each kind of curvature would cost.

    Args:
        spec: What would be measured.
        device: Where.
        dtype: Floating-point type of the parameters.
        num_params: Number of parameters d.
        num_examples: Examples in all.
        timed_examples: Examples of the timed micro-batch.
        seconds_forward: Seconds of one evaluation over all data, about.
        available: Free bytes on the device.
        kinds: The costs.
        recommended: The kind to use.
        reason: Why, in one sentence.
    """

    spec: str | None
    device: str
    dtype: str
    num_params: int
    num_examples: int
    timed_examples: int
    seconds_forward: float | None
    available: int
    kinds: tuple[KindCost, ...]
    recommended: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The document ``zoscope.estimate/1``."""
        return {
            "schema": SCHEMA,
            "zoscope": __version__,
            "spec": self.spec,
            "device": self.device,
            "dtype": self.dtype,
            "problem": {"num_params": self.num_params, "num_examples": self.num_examples},
            "timed_examples": self.timed_examples,
            "seconds_per_evaluation": self.seconds_forward,
            "bytes_available": self.available,
            "curvature": {cost.kind: cost.to_dict() for cost in self.kinds},
            "recommended": {"curvature": self.recommended, "reason": self.reason},
        }

    def __rich__(self) -> RenderableType:
        """A table for the terminal."""
        from zoscope.report.estimate import render

        return render(self)


def recommended(kinds: Sequence[KindCost], *, available: int) -> tuple[str, str]:
    """The kind to use and why: the one that tells most among those that fit."""
    costs = {cost.kind: cost for cost in kinds}
    room = SHARE * available
    hessian = costs["hessian"]
    if hessian.problem is not None:
        return "forward", "the loss has no second derivatives that could be had here"
    fitting = hessian.fitting(room)
    if fitting is None:
        return "forward", "Hessian-vector products do not fit into the free memory, even for one example at a time"
    if fitting < hessian.largest:
        return "hessian", f"it fits with --micro-batch {fitting}, and only the spectrum gives η*(N) and λ_max"
    return "hessian", "it fits, and only the spectrum gives η*(N) and λ_max"
