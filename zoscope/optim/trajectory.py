"""What replicas of a run did."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What R replicas did.

    Args:
        steps: ``(n,)`` steps at which they were looked at, 0 first.
        losses: ``(n, R)``; infinite from where a replica has left.
        distances: ``(n, R)`` squared distances from the start, param²; infinite likewise.
        left: For each replica the step at which its loss passed the limit or stopped being finite; ``None`` if never.
        last: ``(R, d)`` where each replica was when it was last seen in the valley.
        last_steps: The step of that.
        second_moment: ``(R, d)`` Adam's v at that step; ``None`` for other rules.
        length: Steps asked for.
        done: Steps run by the replicas that stayed.
        seconds: Wall time.
    """

    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    distances: NDArray[np.float64]
    left: tuple[int | None, ...]
    last: Tensor
    last_steps: tuple[int, ...]
    second_moment: Tensor | None
    length: int
    done: int
    seconds: float

    @property
    def capped(self) -> bool:
        """Whether time ran out before the run was over."""
        return self.done < self.length

    def to(self, device: torch.device) -> "Trajectory":
        """The same with its tensors on a device."""
        moment = None if self.second_moment is None else self.second_moment.to(device)
        return replace(self, last=self.last.to(device), second_moment=moment)


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """The trajectories of groups, in the order of their replicas, as one."""
    if len(parts) == 1:
        return parts[0]
    longest = max(parts, key=lambda part: len(part.steps))

    def side_by_side(columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        rows = len(longest.steps)
        return np.hstack([np.pad(c, ((0, rows - len(c)), (0, 0)), constant_values=np.inf) for c in columns])

    stayed = [part.done for part in parts if None in part.left]
    moments = [part.second_moment for part in parts if part.second_moment is not None]
    return Trajectory(
        longest.steps,
        side_by_side([part.losses for part in parts]),
        side_by_side([part.distances for part in parts]),
        tuple(step for part in parts for step in part.left),
        torch.cat([part.last for part in parts]),
        tuple(step for part in parts for step in part.last_steps),
        torch.cat(moments) if moments else None,
        longest.length,
        min(stayed, default=longest.length),
        sum(part.seconds for part in parts),
    )
