"""What second derivatives are taken of while a problem trains: float32 at least, and no autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from zoscope.problem.session import AUTOCAST
from zoscope.problem.together import Crew, Post
from zoscope.runtime import HALF, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from zoscope.problem.core import Problem
    from zoscope.problem.objective import Objective


class Measurable:
    """A problem that trains, in a form that can be differentiated twice.

    Args:
        objective: Prepared with ``trains=True``.
        twin: The same problem in float32, likewise, where ``objective`` is in half precision.
    """

    def __init__(self, objective: Objective, twin: Objective | None = None) -> None:
        self._objective, self._twin = objective, twin

    @property
    def num_params(self) -> int:
        """``d``."""
        return self._objective.num_params

    @property
    def apart(self) -> bool:
        """Whether a copy is measured."""
        return self._twin is not None

    @contextmanager
    def at(self, theta: Tensor | None = None) -> Iterator[Objective]:
        """What to measure at the parameters where training stands, or at ``(d,)`` others; without autocast.

        It is not to be used after the context, nor are the steps of training within it.
        """
        training, found = self._objective, self._twin or self._objective
        before = training.read() if theta is not None and self._twin is None else None
        if self._twin is not None:
            _follow(training, self._twin)
        if theta is not None:
            found.write(theta)
        try:
            with without_autocast(lambda: training.notify("autocast", AUTOCAST)), _others(found):
                yield found
        finally:
            if before is not None:
                found.write(before)
            if self._twin is not None:  # what was noticed belongs to the result
                for notice in self._twin.warnings:
                    training.notify(notice.code, notice.message)


@contextmanager
def measurable(problem: Problem, objective: Objective, **options: Any) -> Iterator[Measurable]:
    """What is measured of a problem that is being trained.

    Args:
        problem: The problem.
        objective: Prepared of it with ``trains=True``.
        **options: Of `Problem.prepare`: device, micro-batch and memory.

    Raises:
        SpecError, NumericalError: If the copy in float32 that half precision needs cannot be had.
    """
    if objective.dtype not in HALF:
        yield Measurable(objective)
        return
    with problem.prepare(dtype="float32", trains=True, **options) as twin:
        twin.warnings[:] = [notice for notice in twin.warnings if notice.code != "upcast"]
        name = str(objective.dtype).removeprefix("torch.")
        objective.notify(
            "half-precision",
            f"Training steps are in {name}. What is measured on the way is measured in float32, on a copy: second "
            f"derivatives in {name} carry about 1 % of noise each.",
        )
        yield Measurable(objective, twin)


@torch.no_grad()
def _follow(training: Objective, twin: Objective) -> None:
    torch._foreach_copy_(list(twin.params), list(training.params))
    for own, other in zip(twin.model.buffers(), training.model.buffers(), strict=True):
        own.copy_(other)


@contextmanager
def _others(objective: Objective) -> Iterator[None]:
    """The other ranks do without autocast too."""
    crew = objective.crew
    if not isinstance(crew, Crew):
        yield
        return
    crew.work("zoscope.problem.precision:begin")
    try:
        yield
    finally:
        if crew.ranks.in_step:
            crew.work("zoscope.problem.precision:end")


def begin(post: Post) -> None:
    """Do without autocast, on another rank."""
    context = post.kept["autocast"] = without_autocast()
    context.__enter__()


def end(post: Post) -> None:
    """Let autocast be again."""
    post.kept.pop("autocast").__exit__(None, None, None)
