"""Symmetric linear operators: the Hessian, the Gauss-Newton matrix, their preconditioned forms, and a dense one."""

import functools
import itertools
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zoscope.curvature import together
from zoscope.curvature.faults import (
    NOT_DETERMINISTIC,
    NOT_SYMMETRIC,
    WRONG_METHOD,
    cannot_differentiate,
    same,
    symmetric,
)
from zoscope.curvature.graphs import Graphs
from zoscope.curvature.hvp import METHODS, HvpMethod, Products, shard_products
from zoscope.curvature.linear import DENSE_BLOCK, DenseOperator, LinearOperator, Preconditioned
from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.problem import Objective, Shard
from zoscope.problem.together import Crew
from zoscope.runtime import is_out_of_memory, release_memory

_generations = itertools.count()

__all__ = [
    "DENSE_BLOCK",
    "DenseOperator",
    "HessianOperator",
    "LinearOperator",
    "Preconditioned",
    "ShardOperator",
    "gradient",
]


class ShardOperator(LinearOperator):
    """``sum_s weight_s M_s``: micro-batches outside, vectors inside, so that a block takes one sweep of the data."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.dim, self.device, self.dtype = objective.num_params, objective.device, objective.dtype
        self._count = 0
        self._graphs = Graphs(objective)
        self._generation = next(_generations)

    @property
    def crew(self) -> Crew | None:
        """The ranks that hold the objective."""
        crew = self.objective.crew
        return crew if isinstance(crew, Crew) and crew.follows else None

    @property
    def num_hvps(self) -> int:
        """Products computed so far."""
        return self._count

    @abstractmethod
    def _products(self, shard: Shard) -> Products: ...

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``; halves the micro-batch when memory runs out.

        Raises:
            SpecError: If the loss cannot be differentiated twice.
            NumericalError: If memory runs out with one example left.
        """
        vectors = vectors.detach()
        while True:
            try:
                result = self._sum(vectors)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                ran_out = error.with_traceback(None)
            else:
                self._count += len(vectors)
                return result
            self.release()
            release_memory(self.device)
            if not self.objective.refine():
                raise NumericalError(
                    f"Memory ran out during a Hessian-vector product on {self.device} with micro-batches that cannot "
                    "be made smaller. Expected room for one example's graph and two copies of the parameters. Use a "
                    "device with more memory, fewer parameters (--params), or --curvature forward."
                ) from ran_out

    def _sum(self, vectors: Tensor) -> Tensor:
        crew = self.crew
        if crew is not None:
            return together.products(crew, self, vectors)
        return self.partial(vectors, self.objective.shards)

    def partial(self, vectors: Tensor, shards: Sequence[Shard]) -> Tensor:
        """What some shards contribute to the products, computed here."""
        self._graphs.are_for(shards)
        total: Tensor | None = None
        for index, shard in enumerate(shards):
            found = self._graphs.of(index, functools.partial(self._products, shard))(vectors)
            if shard.weight != 1:
                found.mul_(shard.weight)
            total = found if total is None else total.add_(found)
        return torch.zeros_like(vectors) if total is None else total

    def apart(
        self, pieces: Sequence[Sequence[Shard]], draw: Callable[[], Tensor]
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Weight of every piece of the data, its own vectors ``(k, d)`` and their products with its mean matrix alone.

        Computed in this process; all pieces together count as k products. ``draw`` makes vectors for the next piece.
        """
        swept = 0.0
        for piece in pieces:
            weight, vectors = sum(shard.weight for shard in piece), draw()
            products = [self._products(shard)(vectors).mul_(shard.weight / weight) for shard in piece]
            yield weight, vectors, torch.stack(products).sum(dim=0)
            swept += weight * len(vectors)
        self._count += math.ceil(swept - 1e-6)

    def release(self) -> None:
        """Build graphs anew, here and elsewhere."""
        self._graphs.clear()
        self._generation = next(_generations)

    @property
    def settings(self) -> tuple[object, ...]:
        """What another process needs to compute the same products; a new value makes it build graphs anew."""
        return (self._generation,)

    def apply(self, settings: tuple[object, ...]) -> None:
        """Take over the settings of an operator in another process."""


class HessianOperator(ShardOperator):
    """The Hessian of the loss over all shards.

    Args:
        objective: The prepared problem.
        hvp: One of ``METHODS``, or ``"auto"``: double-backward, on CUDA the faster of it and batched;
            forward-over-reverse where an operation has no double backward.

    Attributes:
        method: What is used; ``None`` until the first product.
    """

    def __init__(self, objective: Objective, *, hvp: str = "auto") -> None:
        if hvp != "auto" and hvp not in METHODS:
            raise UsageError(f"--hvp {hvp}: expected auto or one of {', '.join(METHODS)}.")
        super().__init__(objective)
        self.method: HvpMethod | None = next((m for m in METHODS if m == hvp), None)
        self._chosen_by_user = self.method is not None
        self._checked = False

    @property
    def hvp(self) -> str | None:
        """The method in use."""
        return self.method

    @property
    def settings(self) -> tuple[object, ...]:
        """The method too."""
        return (*super().settings, self.method)

    def apply(self, settings: tuple[object, ...]) -> None:
        """Take over the method."""
        self.method = next((m for m in METHODS if m == settings[1]), None)

    def _products(self, shard: Shard) -> Products:
        return shard_products(self.objective, shard, method=self.method or "double-backward")

    def _sum(self, vectors: Tensor) -> Tensor:
        if not self._checked:
            self._settle(vectors[:1])
        if self.method is None and len(vectors) > 1:
            return self._timed(vectors)
        return super()._sum(vectors)

    def _settle(self, vector: Tensor) -> None:
        """On the first product: see that the method works, and that a second graph agrees.

        It gives the same product where double backward is the other way to it, else that of another vector, which tells
        whether ``uᵀHv = vᵀHu`` too.
        """
        first = self._attempt(vector)
        if self.method == "linearize":
            first = super()._sum(vector)  # some operations write into what its graph keeps: from the second call on
            self._count += 1
        self.release()
        again = None if self.method in (None, "double-backward") else self._by_double_backward(vector)
        self._count += 1
        if again is not None:
            if not same(first, again):
                raise SpecError(WRONG_METHOD.format(method=self.method))
        else:
            generator = torch.Generator().manual_seed(0)
            other = torch.randn(vector.shape, generator=generator, dtype=self.dtype).to(self.device)
            if not symmetric(vector, first, other, super()._sum(other)):
                raise SpecError(NOT_SYMMETRIC if same(first, super()._sum(vector)) else NOT_DETERMINISTIC)
            if self.method is None and self.device.type != "cuda":
                self.method = "double-backward"
        self._checked = True

    def _by_double_backward(self, vector: Tensor) -> Tensor | None:
        chosen, self.method = self.method, "double-backward"
        try:
            return super()._sum(vector)
        except RuntimeError:
            return None
        finally:
            self.method = chosen
            self.release()

    def _attempt(self, vector: Tensor) -> Tensor:
        try:
            return super()._sum(vector)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            failure = error
        if not self._chosen_by_user:
            self.method = "forward-over-reverse"
            self.release()
            try:
                result = super()._sum(vector)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
            else:
                self.objective.notify(
                    "hvp-fallback",
                    "The loss has no double backward: Hessian-vector products are computed forward over reverse.",
                )
                return result
        raise SpecError(cannot_differentiate(failure)) from failure

    def _timed(self, vectors: Tensor) -> Tensor:
        """Keep the faster of two methods for blocks of vectors, of those that agree with double backward."""
        best, result = float("inf"), vectors
        for method in ("double-backward", "batched"):
            self.release()
            previous, self.method = self.method, _as_method(method)
            try:
                super()._sum(vectors)  # allocates and builds what later calls reuse
                begin = _now(self.device)
                candidate = super()._sum(vectors)
                seconds = _now(self.device) - begin
            except RuntimeError:
                if method == "double-backward":
                    raise
                seconds = float("inf")
            if seconds < best and (method == "double-backward" or same(result, candidate)):
                best, result, chosen = seconds, candidate, self.method
            else:
                self.method = previous
        self.method = chosen
        self.release()
        return result


def gradient(objective: Objective) -> tuple[float, Tensor]:
    """Loss and gradient over all shards.

    Args:
        objective: The prepared problem.

    Returns:
        The loss, accumulated in float64, and ``(d,)`` the gradient in loss/param.
    """
    while True:
        try:
            return objective.gradient()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not objective.refine():
                raise
        release_memory(objective.device)


def _now(device: torch.device) -> float:
    """Seconds, once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _as_method(name: str) -> HvpMethod:
    return next(method for method in METHODS if method == name)
