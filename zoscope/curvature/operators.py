"""Symmetric linear operators known by their products: the Hessian, preconditioned forms, a dense one."""

from __future__ import annotations

import functools
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, jvp, linearize
from torch.nn import _reduction, functional
from torch.overrides import TorchFunctionMode

from zoscope.errors import NumericalError, SpecError, UsageError
from zoscope.problem import Objective, SecondDerivativesByHand, Shard
from zoscope.problem.objective import Examples, Indices
from zoscope.runtime import (
    ALONE,
    Ranks,
    Twin,
    available_memory,
    collective,
    held_memory,
    is_limited,
    is_out_of_memory,
    release_memory,
)
from zoscope.runtime.autograd_errors import (
    NEARLY,
    NOT_DETERMINISTIC,
    NOT_SYMMETRIC,
    WRONG_METHOD,
    cannot_differentiate,
    has_custom_functions,
    same,
    symmetric,
)

Array = NDArray[np.float64]
T = TypeVar("T")

DENSE_BLOCK = 64
"""Unit vectors multiplied at once when a whole matrix is formed."""


class LinearOperator(ABC):
    """A symmetric matrix known by its products.

    Attributes:
        dim: Dimension d.
        device: Where vectors live.
        dtype: Their type.
    """

    dim: int
    device: torch.device
    dtype: torch.dtype
    _matrix: Tensor | None = None
    _count: int = 0

    @property
    def ranks(self) -> Ranks:
        """Those that compute products together."""
        return ALONE

    @property
    def hvp(self) -> str | None:
        """How products with a Hessian are computed; None before the first, and where there is but one way."""
        return None

    @property
    def num_hvps(self) -> int:
        """Products computed so far."""
        return self._count

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with several vectors.

        Args:
            vectors: ``(k, d)`` rows.

        Returns:
            ``(k, d)`` rows ``M v``.
        """

    def dense(self) -> Tensor:
        """The whole matrix, ``(d, d)``, from d products; computed once."""
        if self._matrix is None:
            matrix = torch.empty(self.dim, self.dim, dtype=self.dtype, device=self.device)
            for begin in range(0, self.dim, DENSE_BLOCK):
                count = min(DENSE_BLOCK, self.dim - begin)
                units = torch.zeros(count, self.dim, dtype=self.dtype, device=self.device)
                units.diagonal(begin).fill_(1)
                matrix[begin : begin + count] = self.matmat(units)
            self._matrix = matrix
        return self._matrix

    def known(self) -> LinearOperator:
        """The matrix itself once it has been formed, whose products cost nothing; this operator before."""
        return self if self._matrix is None else DenseOperator(self._matrix)


class DenseOperator(LinearOperator):
    """A matrix held in memory.

    Args:
        matrix: ``(d, d)``, symmetric.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.dim = len(matrix)
        self.device, self.dtype = matrix.device, matrix.dtype

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``."""
        assert self._matrix is not None
        self._count += len(vectors)
        return vectors @ self._matrix


class Preconditioned(LinearOperator, Twin):
    """``P^-½ M P^-½`` for a positive diagonal P: similar to ``P⁻¹M``, and symmetric.

    Args:
        operator: M.
        diagonal: ``(d,)`` diagonal of P, positive.
    """

    def __init__(self, operator: LinearOperator, diagonal: Tensor) -> None:
        self._operator, self._diagonal = operator, diagonal
        self._scale = diagonal.double().rsqrt().to(operator.dtype)
        self.dim, self.device, self.dtype = operator.dim, operator.device, operator.dtype

    @property
    def ranks(self) -> Ranks:
        """Those of M."""
        return self._operator.ranks

    @property
    def hvp(self) -> str | None:
        """That of M."""
        return self._operator.hvp

    @property
    def num_hvps(self) -> int:
        """Products with M computed so far."""
        return self._operator.num_hvps

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``."""
        return self._operator.matmat(vectors * self._scale) * self._scale

    def partial(self, vectors: Tensor, shards: Sequence[Shard]) -> Tensor:
        """What some shards of M contribute to the products, computed here."""
        assert isinstance(self._operator, ShardOperator)
        return self._operator.partial(vectors * self._scale, shards) * self._scale

    def recipe(self) -> tuple[LinearOperator, Tensor]:
        """What it was made of."""
        return self._operator, self._diagonal

    def news(self) -> LinearOperator:
        """Those of M."""
        return self._operator

    def dense(self) -> Tensor:
        """The whole matrix; reuses that of M."""
        return self._scale[:, None] * self._operator.dense() * self._scale


def dense_eigenvalues(operator: LinearOperator) -> tuple[Array, float]:
    """All eigenvalues of a symmetric operator, computed in float64.

    Args:
        operator: Symmetric operator of dimension d; its matrix takes ``8 d²`` bytes.

    Returns:
        ``(d,)`` eigenvalues, ascending, and the spectral norm of the antisymmetric part (an upper estimate): how far
        rounding of the products can have moved them.

    Raises:
        UsageError: If the matrix does not fit in memory.
        NumericalError: If a product is not finite.
        SpecError: If the matrix is not symmetric.
    """
    needed, free = 32 * operator.dim**2, available_memory(operator.device)
    if needed > free:
        raise UsageError(
            f"--method dense: all eigenvalues of {operator.dim:,} parameters need about {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free. Expected a smaller problem; use --method deflated-slq, or fewer "
            "parameters (--params)."
        )
    matrix = operator.dense()
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(
            "The Hessian has entries that are not finite although the loss is finite. Expected finite second "
            "derivatives at the point where curvature is measured. Look for sqrt or a norm at 0, or overflow in half "
            "precision (try --dtype float32 or float64)."
        )
    double = matrix.double()
    asymmetry = float(torch.linalg.matrix_norm(double - double.T)) / 2
    if asymmetry > NEARLY * float(torch.linalg.matrix_norm(double)):
        raise SpecError(NOT_SYMMETRIC)
    return torch.linalg.eigvalsh((double + double.T) / 2).cpu().numpy(), asymmetry


def dense_eigenpairs(operator: LinearOperator) -> tuple[Array, Tensor]:
    """All eigenvalues ``(d,)``, ascending, and the eigenvectors as rows ``(d, d)``, in the operator's type."""
    double = operator.dense().double()
    values, vectors = torch.linalg.eigh((double + double.T) / 2)
    return values.cpu().numpy(), vectors.T.to(operator.dtype)


KEPT_SHARE = 0.25
"""Part of the free memory that the graphs of several micro-batches may take; a product then costs no forward pass."""


def room_for_graphs(device: torch.device) -> float:
    """Bytes that the graphs of several micro-batches may take; none within a memory limit, which is for vectors."""
    return 0.0 if is_limited() else KEPT_SHARE * available_memory(device)


class Graphs:
    """The graphs of the shards that products are being computed with.

    Args:
        objective: The prepared problem.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._kept: dict[int, Products] = {}
        self._shards: Sequence[Shard] = ()
        self._versions: tuple[int, ...] = ()  # of the parameters for which they were built
        self._before = 0
        self._room = 0.0

    def are_for(self, shards: Sequence[Shard]) -> None:
        """Drop them if they are not for these shards, the same object from product to product, or parameters moved."""
        versions = tuple(p._version for p in self._objective.params)
        if shards is not self._shards or versions != self._versions:
            self.clear()
            self._shards, self._versions = shards, versions
            self._room = math.inf if len(shards) == 1 else room_for_graphs(self._objective.device)

    def of(self, index: int, make: Callable[[], Products]) -> Products:
        """The graph of a shard: an old one, or a new one that is kept if it fits."""
        kept = self._kept.get(index)
        if kept is None:
            kept = make()
            if held_memory(self._objective.device) - self._before <= self._room:
                self._kept[index] = kept
        return kept

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()
        self._shards, self._versions = (), ()
        self._before = held_memory(self._objective.device)


HvpMethod = Literal["double-backward", "batched", "forward-over-reverse", "linearize", "gradient-differences"]
METHODS: tuple[HvpMethod, ...] = ("double-backward", "batched", "forward-over-reverse", "linearize")

DIFFERENCES: HvpMethod = "gradient-differences"
"""Products of a loss whose second derivatives an operation hides from torch: not for a user to choose."""

DIFFERENCE_STEP = 1e-5
"""Step of those differences, in units of the parameters' size: in float64 they keep eight digits, and few kinks."""

Products = Callable[[Tensor], Tensor]
"""From vectors ``(k, d)`` to products ``(k, d)``."""


def shard_products(objective: Objective, shard: Shard, *, method: HvpMethod) -> Products:
    """Prepare products with the Hessian of one shard's mean loss.

    Args:
        objective: The prepared problem.
        shard: One of its shards.
        method: One of ``METHODS``.

    Returns:
        A function from vectors to products; it keeps the shard's graph alive.
    """
    if method == "forward-over-reverse":
        return lambda vectors: _forward_over_reverse(objective, shard, vectors)
    if method == "linearize":
        return _linearized(objective, shard)
    if method == DIFFERENCES:
        return lambda vectors: _by_differences(objective, shard, vectors)
    params = objective.params
    # What runs under vmap has to be PyTorch's own.
    with nullcontext() if method == "batched" else SecondDerivativesByHand():
        loss = objective.loss(shard)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    curved = [i for i, g in enumerate(grads) if g.requires_grad]
    _require_constant(objective, shard, {i: g for i, g in enumerate(grads) if not g.requires_grad})
    if not curved:
        return torch.zeros_like
    multiply = _batched if method == "batched" else _looped
    return lambda vectors: multiply(objective, [grads[i] for i in curved], curved, vectors)


def _require_constant(objective: Objective, shard: Shard, claimed: dict[int, Tensor]) -> None:
    """See that derivatives which torch calls constant are: a custom function without second derivative looks alike.

    Raises:
        RuntimeError: In torch's words, if one changes when the parameters move.
    """
    if not claimed:
        return
    point = [p.detach() for p in objective.params]
    moved = [(p + 1e-2 * (p.abs() + p.abs().mean())).requires_grad_() for p in point]
    elsewhere = torch.autograd.grad(
        objective.loss_at(moved, shard), [moved[i] for i in claimed], allow_unused=True, materialize_grads=True
    )
    for here, there in zip(claimed.values(), elsewhere, strict=True):
        if not torch.allclose(here, there, rtol=1e-3, atol=1e-5 * float(here.abs().max()) + 1e-12):
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def _looped(objective: Objective, grads: Sequence[Tensor], curved: Sequence[int], vectors: Tensor) -> Tensor:
    def product(parts: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        # The gradient of gᵀv rather than grad_outputs=v, for which torch imports its symbolic algebra: half a second.
        along = [g.flatten().dot(parts[i].flatten()) for g, i in zip(grads, curved, strict=True)]
        return torch.autograd.grad(torch.stack(along).sum(), objective.params, retain_graph=True, allow_unused=True)

    return one_by_one(objective, vectors, product)


def _batched(objective: Objective, grads: Sequence[Tensor], curved: Sequence[int], vectors: Tensor) -> Tensor:
    sizes = [p.numel() for p in objective.params]
    parts = [
        part.view(len(vectors), *p.shape)
        for part, p in zip(torch.split(vectors, sizes, dim=1), objective.params, strict=True)
    ]
    columns = torch.autograd.grad(
        grads,
        objective.params,
        [parts[i] for i in curved],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    return torch.cat(
        [
            torch.zeros(len(vectors), size, dtype=vectors.dtype, device=vectors.device)
            if column is None
            else column.reshape(len(vectors), size)
            for column, size in zip(columns, sizes, strict=True)
        ],
        dim=1,
    )


def one_by_one(objective: Objective, vectors: Tensor, product: Callable[[tuple[Tensor, ...]], Any]) -> Tensor:
    """Products ``(k, d)`` by a function from one vector to one product, each in the shapes of the parameters."""
    result = torch.empty_like(vectors)
    for vector, row in zip(vectors, result, strict=True):
        objective.flatten(product(objective.unflatten(vector)), out=row)
    return result


def _forward_over_reverse(objective: Objective, shard: Shard, vectors: Tensor) -> Tensor:
    point = tuple(p.detach() for p in objective.params)
    gradient = grad(lambda tensors: objective.loss_at(tensors, shard))
    with _SquaredErrorByHand():
        return one_by_one(objective, vectors, lambda parts: jvp(gradient, (point,), (parts,))[1])


def _by_differences(objective: Objective, shard: Shard, vectors: Tensor, *, step: float = DIFFERENCE_STEP) -> Tensor:
    """``(g(θ+hv) - g(θ-hv)) / 2h``."""
    point = [p.detach() for p in objective.params]
    size = math.sqrt(sum(float(p.square().sum()) for p in point)) or math.sqrt(objective.num_params)

    def gradient(parts: tuple[Tensor, ...], h: float) -> tuple[Tensor, ...]:
        moved = [torch.add(p, v, alpha=h).requires_grad_() for p, v in zip(point, parts, strict=True)]
        loss = objective.loss_at(moved, shard)
        return torch.autograd.grad(loss, moved, allow_unused=True, materialize_grads=True)

    def product(parts: tuple[Tensor, ...]) -> list[Tensor]:
        h = step * size / (math.sqrt(sum(float(v.square().sum()) for v in parts)) or 1.0)
        pairs = zip(gradient(parts, h), gradient(parts, -h), strict=True)
        return [(above - below) / (2 * h) for above, below in pairs]

    return one_by_one(objective, vectors, product)


def _linearized(objective: Objective, shard: Shard) -> Products:
    point = tuple(p.detach() for p in objective.params)
    gradient = grad(lambda tensors: objective.loss_at(tensors, shard))
    with warnings.catch_warnings(), _SquaredErrorByHand():
        warnings.simplefilter("ignore")  # about the tracing; the loss itself has warned before
        _, derivative = linearize(gradient, point)
    return torch.no_grad()(lambda vectors: one_by_one(objective, vectors, derivative))


class _SquaredErrorByHand(TorchFunctionMode):
    """``mse_loss`` as a difference that is squared.

    Torch 2.13 crashes, without an exception, when it linearizes it, and has no derivative of it forward over reverse.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.mse_loss:
            return _squared_error(*args, **kwargs)
        if func is torch._C._nn.mse_loss:
            return _reduced(args[0], args[1], *args[2:], **kwargs)
        return func(*args, **kwargs)


def _squared_error(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:  # an older way to say it
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if weight is None:
        return _reduced(input, target, {"none": 0, "mean": 1, "sum": 2}[reduction])
    each = weight * (input - target).square()
    return (
        each if reduction == "none" else each.sum() if reduction == "sum" else each.sum() / weight.expand_as(each).sum()
    )


def _reduced(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    each = (input - target).square()
    return (each, each.mean(), each.sum())[reduction] if reduction else each


@collective
def coupling_and_spread(
    operator: ShardOperator | Preconditioned,
    examples: Examples,
    groups: Sequence[Indices],
    values: Array,
    vectors: Tensor,
) -> list[tuple[Array, Array]]:
    """``(v_iᵀ(H_g - H)v_j)²``, ``(q, q)``, and ``‖(H_g - H)v_i‖²``, ``(q,)``, for every group g.

    Args:
        operator: H, or ``P^-½ H P^-½``.
        examples: What the groups are of.
        groups: A partition.
        values: ``(q,)`` eigenvalues of H.
        vectors: ``(q, d)`` their eigenvectors.
    """
    mean = torch.as_tensor(values, dtype=operator.dtype, device=operator.device)[:, None] * vectors

    def measured(group: Indices) -> tuple[Array, Array]:
        away = operator.partial(vectors, examples.gather(group)) - mean
        spread = away.double().square().sum(dim=1).cpu().numpy()
        return (away @ vectors.T).double().square().cpu().numpy(), spread

    ranks = operator.ranks
    parts = ranks.gather(ranks.attempt(lambda: [measured(group) for group in groups[ranks.rank :: ranks.size]]))
    return [parts[number % ranks.size][number // ranks.size] for number in range(len(groups))] if parts else []


@collective
def signed_sum(
    operator: ShardOperator | Preconditioned,
    examples: Examples,
    groups: Sequence[Indices],
    signs: Sequence[float],
    vector: Tensor,
) -> Tensor:
    """``Σ_g ξ_g H_g z`` for the groups g, their signs ξ and a vector z, ``(1, d)``."""
    ranks, total = operator.ranks, torch.zeros_like(vector)

    def add_up() -> None:
        for sign, group in list(zip(signs, groups, strict=True))[ranks.rank :: ranks.size]:
            total.add_(operator.partial(vector, examples.gather(group)), alpha=sign)

    ranks.attempt(add_up)
    return ranks.collect(total)


@collective
def gradient_sums(
    objective: Objective, examples: Examples, groups: Sequence[Indices], signs: Sequence[float], mean: Tensor
) -> tuple[Tensor, Tensor]:
    """``Σ_g ξ_g (g_g - g)`` and ``Σ_g (g_g - g)²`` for the groups' gradients, each ``(d,)``, the latter in float64."""
    ranks, total, squares = objective.ranks, torch.zeros_like(mean), torch.zeros_like(mean, dtype=torch.float64)

    def add_up() -> None:
        for sign, group in list(zip(signs, groups, strict=True))[ranks.rank :: ranks.size]:
            away = objective.gradient_of(examples.gather(group))[1] - mean
            total.add_(away, alpha=sign)
            squares.add_(away.double().square())

    ranks.attempt(add_up)
    return ranks.collect(total), ranks.collect(squares)


class ShardOperator(LinearOperator, Twin):
    """``sum_s weight_s M_s``: micro-batches outside, vectors inside, so that a block takes one sweep of the data."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.dim, self.device, self.dtype = objective.num_params, objective.device, objective.dtype
        self._graphs = Graphs(objective)
        self._generation = 0
        self._known: tuple[object, ...] = ()

    @property
    def ranks(self) -> Ranks:
        """Those that hold the objective."""
        return self.objective.ranks

    @abstractmethod
    def _products(self, shard: Shard) -> Products: ...

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the rows of ``vectors``; halves the micro-batch when memory runs out.

        Raises:
            SpecError: If the loss cannot be differentiated twice.
            NumericalError: If memory runs out with one example left.
        """
        vectors = vectors.detach()
        stuck = (
            f"Memory ran out during a Hessian-vector product on {self.device} with micro-batches that cannot be made "
            "smaller. Expected room for one example's graph and two copies of the parameters. Use a device with more "
            "memory, fewer parameters (--params), or --curvature forward."
        )
        result = within_memory(self.objective, lambda: self._sum(vectors), stuck=stuck, release=self.release)
        self._count += len(vectors)
        return result

    @collective
    def _sum(self, vectors: Tensor) -> Tensor:
        part = self.ranks.attempt(lambda: self.partial(vectors, self.objective.pieces))
        return self.ranks.collect(part)

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
        self._generation += 1

    def recipe(self) -> tuple[Objective]:
        """The problem."""
        return (self.objective,)

    def news(self) -> tuple[object, ...]:
        """What another rank needs to compute the same products; a new value makes it build graphs anew."""
        return self.objective, self._generation

    def learn(self, news: tuple[object, ...]) -> None:
        """Take over what rank 0 has settled."""
        if news != self._known:
            self._graphs.clear()
        self._known = news


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
        if hvp not in ("auto", *METHODS, DIFFERENCES):
            raise UsageError(f"--hvp {hvp}: expected auto or one of {', '.join(METHODS)}.")
        super().__init__(objective)
        self.method: HvpMethod | None = _method(hvp)
        self._chosen_by_user = self.method is not None
        self._checked = False

    @property
    def hvp(self) -> str | None:
        """The method in use."""
        return self.method

    def news(self) -> tuple[object, ...]:
        """The method too."""
        return (*super().news(), self.method)

    def learn(self, news: tuple[object, ...]) -> None:
        """Take over the method."""
        super().learn(news)
        self.method = _method(news[-1])

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
        if self.method == DIFFERENCES:  # settled before
            self._checked = True
            self._say_hidden()
            return
        first = self._attempt(vector)
        self.release()
        again = None if self.method in (None, "double-backward") else self._by_double_backward(vector)
        self._count += 1
        if again is not None:
            if not same(first, again):
                raise SpecError(WRONG_METHOD.format(method=self.method))
        else:
            generator = torch.Generator().manual_seed(0)
            other = torch.randn(vector.shape, generator=generator, dtype=self.dtype).to(self.device)
            of_other = super()._sum(other)
            if not symmetric(vector, first, other, of_other):
                raise SpecError(NOT_SYMMETRIC if same(first, super()._sum(vector)) else NOT_DETERMINISTIC)
            if self.method is None and self.device.type != "cuda":
                self.method = "double-backward"
        self._checked = True
        if self.dtype == torch.float64 and self._has_functions_of_the_users():
            self._look_for_hidden_derivatives()

    def _has_functions_of_the_users(self) -> bool:
        """Whether the loss passes through a ``torch.autograd.Function`` that is neither torch's nor ours."""
        shards = self.objective.pieces[:1]
        return any(has_custom_functions(self.objective.loss(shard)) for shard in shards)

    def _look_for_hidden_derivatives(self) -> None:
        """Take differences of gradients where a function keeps from torch how its derivative depends on its input.

        Differences over two steps tell that from kinks, which other steps cross in other numbers.
        """
        generator = torch.Generator().manual_seed(1)
        probe = torch.randn((1, self.dim), generator=generator, dtype=self.dtype).to(self.device)
        product, norm = super()._sum(probe), torch.linalg.vector_norm
        self.release()
        shards = self.objective.shards
        near, far = (
            sum(s.weight * _by_differences(self.objective, s, probe, step=k * DIFFERENCE_STEP) for s in shards)
            for k in (1, 4)
        )
        self._count += 3
        missed = norm(near - product)
        if missed > NEARLY * norm(near) and norm(near - far) < NEARLY * missed:
            self.method = DIFFERENCES
            self._say_hidden()

    def _say_hidden(self) -> None:
        self.objective.notify(
            "hvp-fallback",
            "A torch.autograd.Function in the loss hides its second derivative from torch (keep its inputs with "
            "save_for_backward, and write its backward with operations of torch on them): Hessian-vector products are "
            "computed as differences of gradients.",
        )

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
        """A product by the method in use; by another one, which is said, where torch fails at it."""
        try:
            first = super()._sum(vector)
            if self.method == "linearize":
                self._count += 1
                first = super()._sum(vector)  # some operations write into what its graph keeps: from the second call on
            return first
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            failure = error
        chosen = self.method
        self.method = "double-backward" if self._chosen_by_user else "forward-over-reverse"
        self.release()
        if chosen != self.method:
            try:
                result = super()._sum(vector)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                failure = error if self._chosen_by_user else failure
            else:
                self._say_fallback(chosen, failure)
                return result
        raise SpecError(cannot_differentiate(failure)) from failure

    def _say_fallback(self, chosen: str | None, failure: RuntimeError) -> None:
        said = "The loss has no double backward: Hessian-vector products are computed forward over reverse."
        if self._chosen_by_user:
            first = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            said = (
                f"--hvp {chosen} fails for this loss (torch says '{first}'): Hessian-vector products are computed by "
                "double-backward."
            )
        self.objective.notify("hvp-fallback", said)

    def _timed(self, vectors: Tensor) -> Tensor:
        """Keep the faster of two methods for blocks of vectors, of those that agree with double backward."""
        best, result = float("inf"), vectors
        for method in METHODS[:2]:
            self.release()
            previous, self.method = self.method, method
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


def _method(name: object) -> HvpMethod | None:
    return next((method for method in (*METHODS, DIFFERENCES) if method == name), None)


def gradient(objective: Objective) -> tuple[float, Tensor]:
    """Loss and gradient over all shards.

    Args:
        objective: The prepared problem.

    Returns:
        The loss, accumulated in float64, and ``(d,)`` the gradient in loss/param.
    """
    return within_memory(objective, objective.gradient)


def within_memory(
    objective: Objective,
    compute: Callable[[], T],
    *,
    stuck: str | None = None,
    release: Callable[[], object] = lambda: None,
) -> T:
    """What ``compute`` returns, with the micro-batch halved until memory suffices.

    Args:
        objective: The prepared problem.
        compute: Evaluates it.
        stuck: What to say where nothing can be halved; the error itself when left out.
        release: Drops what keeps memory between two tries.

    Raises:
        NumericalError: If memory runs out with one example left.
    """
    while True:
        try:
            return compute()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            ran_out = error.with_traceback(None)
        release()
        release_memory(objective.device)
        if not objective.refine():
            raise (ran_out if stuck is None else NumericalError(stuck)) from ran_out


def _now(device: torch.device) -> float:
    """Seconds, once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
