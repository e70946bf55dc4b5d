"""What every sampled measurement begins with: a chain that finds the outliers, and probe vectors that say when to stop.

Further steps of the chain are worth their products while they save more of them later: what is deflated does not
scatter. How much is left beyond a Krylov space is known from a few probe vectors, whose products are taken once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from zoscope.curvature.basis import vectors_that_fit
from zoscope.curvature.beyond import Beyond, exact_part
from zoscope.curvature.lanczos import Chain
from zoscope.curvature.operators import LinearOperator
from zoscope.curvature.results import ritz_values
from zoscope.runtime import available_memory, spawn_generators

OnProgress = Callable[[str, int, float | None], None]
"""Called with the stage, the products spent in it and the relative half-width reached, if there is one."""

FEWEST_HVPS = 20
"""Products below which neither the outliers nor the error of the rest can be told."""

FIRST_STEPS, MORE_STEPS, MANY_STEPS = 12, 6, 80
"""Length of a chain: at first, by how much it grows, and at most where outliers are looked for."""

FAR = 3.0
"""Products of sampling, in units of the chain, up to which a chain stops that no longer saves more than it takes."""

FEWEST_VECTORS = 3
"""Probe vectors drawn before it is known how many will be needed."""

BLOCK = 4
"""Probe vectors that advance together."""

MEMORY_SHARE = 0.4
"""Part of the free memory that a Lanczos basis may take."""


class Sampling(ABC):
    """The chain, the first probe vectors and the account of products that measurements share.

    Args:
        operator: Symmetric operator of dimension d.
        ends: How many of the smallest and of the largest eigenvalues should converge, where the budget allows.
        max_hvps: Products allowed.
        seed: Of all random vectors.
        kept: Vectors that the measurement keeps beside the chain.
        on_progress: Called after every stage.
    """

    def __init__(
        self,
        operator: LinearOperator,
        *,
        ends: tuple[int, int],
        max_hvps: int,
        seed: int,
        kept: int = 0,
        on_progress: OnProgress | None,
    ) -> None:
        self._operator = operator
        self._ends = ends
        self._max_hvps = max_hvps
        self._kept = kept
        self._on_progress = on_progress
        self._first = operator.num_hvps
        self._chain_generator, self._probe_generator, self._pilot_generator = spawn_generators(seed, 3, operator.device)
        self._early: list[Tensor] = []  # vectors and their products
        self._notes: list[str] = []

    @abstractmethod
    def _ahead(self, chain: Chain, beyond: Beyond) -> float:
        """Products that sampling takes after a chain."""

    def _saved(self, gained: float, ahead: float, beyond: Beyond) -> float:
        """Products of sampling that a part ``gained`` of ``‖M‖_F²`` in the chain saves of those ahead."""
        left = float(np.mean(beyond.squares))
        return ahead * gained / left if left > 0 else 0.0

    def _outliers(self) -> Chain:
        """Extend a chain until the ends wanted are known and more steps take more products than they save."""
        op = self._operator
        most = self._chain_steps(MANY_STEPS)
        chain = Chain(op, self._normal(1, self._chain_generator)[0], capacity=most)
        chain.extend(min(FIRST_STEPS, most))
        self._report("outliers", None)
        while not chain.exhausted and chain.jacobi.size < most and not self._suffices(chain):
            chain.extend(min(MORE_STEPS, most - chain.jacobi.size))
            self._report("outliers", None)
        return chain

    def _suffices(self, chain: Chain) -> bool:
        found, (bottom, top) = ritz_values(chain.jacobi, dtype=self._operator.dtype), self._ends
        if not all(eigenvalue.converged for eigenvalue in (*found[:bottom], *found[len(found) - top :])):
            return False
        return self._enough(chain, self._beyond(chain))

    def _enough(self, chain: Chain, beyond: Beyond) -> bool:
        """Whether more steps take more products than they save, once the ends have converged."""
        steps, ahead = chain.jacobi.size, self._ahead(chain, beyond)
        if ahead <= MORE_STEPS or ahead > FAR * steps:
            return ahead <= MORE_STEPS
        gained = beyond.exact[1] - exact_part(chain.jacobi.head(steps - MORE_STEPS))[1]
        return self._saved(gained, ahead, beyond) < MORE_STEPS

    def _beyond(self, chain: Chain) -> Beyond:
        """What the first probe vectors tell of the complement of a Krylov space."""
        if not self._early:
            vectors = self._normal(FEWEST_VECTORS, self._probe_generator)
            self._early = [vectors, self._operator.matmat(vectors)]
        beyond = Beyond(exact_part(chain.jacobi), self._operator.dim - chain.jacobi.size)
        beyond.add(*chain.beyond(self._early[0], self._early[1]))
        return beyond

    def _chain_steps(self, most: int) -> int:
        """Steps of a chain: ``most``, a third of the products, or what memory holds; notes the last case."""
        op = self._operator
        row = op.dim * torch.empty((), dtype=op.dtype).element_size()
        free = available_memory(op.device) if op.crew is None else op.crew.memory_for_vectors()
        fits = vectors_that_fit(MEMORY_SHARE, row, free=free) - 4 * BLOCK - 1 - self._kept
        most = min(most, max(min(self._max_hvps, 2), self._max_hvps // 3), op.dim)
        if fits >= most:
            return most
        most = max(2, fits)
        self._notes.append(
            f"Memory for {most} Lanczos vectors of {row / 2**20:.0f} MiB only: fewer outliers are deflated, so the "
            "same precision takes more probe vectors."
        )
        return most

    @property
    def _spent(self) -> int:
        return self._operator.num_hvps - self._first

    @property
    def _left(self) -> int:
        return self._max_hvps - self._spent

    def _normal(self, count: int, generator: torch.Generator) -> Tensor:
        op = self._operator
        return torch.randn(count, op.dim, generator=generator, dtype=op.dtype, device=op.device)

    def _report(self, stage: str, reached: float | None) -> None:
        if self._on_progress is not None:
            self._on_progress(stage, self._spent, reached)
