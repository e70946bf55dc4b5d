"""The loss as one function of a flat parameter vector, on all examples or on some of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from zoscope.errors import SpecError
from zoscope.problem import pytree as nest
from zoscope.problem.data import LossFunction, LossModule, Metric, examples_in, number_of_examples, pair, user_code
from zoscope.problem.model import ShardedGroup, ShardedLoss, frozen, local
from zoscope.runtime import ALONE, Ranks, Twin, collective, is_out_of_memory

Indices = NDArray[np.int64]
T = TypeVar("T")


class Examples(Twin):
    """The rows of all batches, which a mini-batch draws from; whole batches where those cannot be cut.

    Their order is the same on every rank, however its batches were cut.

    Args:
        objective: The prepared problem.

    Attributes:
        count: Number of rows, or of batches.
        whole: Whether batches cannot be cut, so that a mini-batch is one of them.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._shards = objective.shards
        self.whole = objective.indivisible is not None or not all(map(_can_be_cut, self._shards))
        rows = [1 if self.whole else (shard.rows or 0) for shard in self._shards]
        self._units = np.concatenate(
            [np.stack([np.full(k, i), np.arange(k)], axis=1) for i, k in enumerate(rows)]
        ).astype(np.int64)
        self.count = len(self._units)

    def recipe(self) -> tuple[Objective]:
        """The problem."""
        return (self._objective,)

    def partition(self, count: int, generator: torch.Generator) -> list[Indices]:
        """A random partition into ``count`` groups of nearly equal size, at most one per example."""
        order = torch.randperm(self.count, generator=generator, device=generator.device).cpu().numpy()
        return np.array_split(order, min(count, self.count))

    def groups(self, count: int, generator: torch.Generator) -> list[tuple[Shard, ...]]:
        """The examples of a random partition; see `partition`."""
        return [self.gather(part) for part in self.partition(count, generator)]

    def draw(self, size: int, generator: torch.Generator) -> tuple[Shard, ...]:
        """A random mini-batch of ``size`` examples without replacement, one whole batch where they cannot be cut."""
        order = torch.randperm(self.count, generator=generator, device=generator.device).cpu().numpy()
        return self.gather(order[: 1 if self.whole else size])

    def gather(self, indices: Indices) -> tuple[Shard, ...]:
        """Some examples as shards whose weights add up to 1: one shard where the pieces fit together."""
        which, rows = self._units[indices].T
        if self.whole:
            pieces = [self._shards[index] for index in which]
        else:
            pieces = [self._piece(self._shards[index], rows[which == index]) for index in np.unique(which)]
        total = max(sum(piece.examples for piece in pieces), 1)
        largest = max(shard.rows or 1 for shard in self._shards)
        joined = None if self.whole or len(indices) > largest or len(pieces) == 1 else _joined(pieces)
        if joined is not None:
            return (Shard(joined, 1.0, total, len(indices)),)
        return tuple(Shard(p.batch, p.examples / total, p.examples, p.rows) for p in pieces if p.examples)

    def _piece(self, shard: Shard, rows: Indices) -> Shard:
        batch = nest.rows(shard.batch, torch.from_numpy(rows), of=shard.rows or 0)
        size_of = self._objective.batch_size_of
        count = len(rows) if size_of is None else examples_in(batch, size_of)
        return Shard(batch, 1.0, count, len(rows))


def _can_be_cut(shard: Shard) -> bool:
    return shard.rows is not None and nest.split(shard.batch, [shard.rows]) is not None


def _joined(pieces: Sequence[Shard]) -> Any | None:
    """One batch of several pieces; ``None`` where they have other shapes, as batches padded to their longest have."""
    try:
        return nest.joined([piece.batch for piece in pieces])
    except (RuntimeError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Notice:
    """Something that a reader of the result should know.

    Args:
        code: Stable name, for programs.
        message: One sentence or two, for people.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Shard:
    """A micro-batch.

    Args:
        batch: What the loss function receives.
        weight: Its share of the examples; the weights of all shards add up to 1.
        examples: What it counts for.
        rows: Length along which it can be cut further; None where it cannot.
    """

    batch: Any
    weight: float
    examples: int
    rows: int | None


CUT_WORK = 10_000_000
"""Parameters times examples from which batches fewer than ranks are cut, for derivatives; below it does not pay."""


class ProcessGroup:
    """What a rank does of the work on a problem that every rank holds.

    Args:
        ranks: The job.

    Attributes:
        shards: Those that were dealt out.
        own: Those that this rank evaluates.
        pieces: What it differentiates: the same, or parts of all where there are fewer shards than ranks.
    """

    _holder: ProcessGroup | None = None  # whose parameters the other ranks have: sessions may share a model

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.shards: tuple[Shard, ...] = ()
        self.own: tuple[Shard, ...] = ()
        self.pieces: tuple[Shard, ...] = ()
        self._sent: tuple[int, ...] = ()

    def deal_out(self, objective: Objective, indivisible: str | None) -> None:
        """Choose what is for this rank.

        Losses stay those of whole shards: second differences of them would show how the batches were cut.
        """
        self.shards = objective.shards
        size, rows, count = self.ranks.size, max((shard.rows or 1) for shard in self.shards), len(self.shards)
        self.own = self.pieces = self._part(objective, self.shards)
        enough = objective.num_params * objective.num_examples >= CUT_WORK
        if enough and count < size and rows > 1 and indivisible is None:
            with suppress(SpecError):  # batches that cannot be cut leave some ranks idle
                self.pieces = self._part(objective, objective.cut(-(-rows // -(-size // count))))

    def _part(self, objective: Objective, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        """The largest shards first, each to the rank with the fewest examples so far; this rank's on the device."""
        loads, own = [0] * self.ranks.size, []
        for index in sorted(range(len(shards)), key=lambda i: -shards[i].examples):
            rank = loads.index(min(loads))
            loads[rank] += shards[index].examples
            if rank == self.ranks.rank:
                own.append(index)
        return tuple(objective.placed(shards[index]) for index in sorted(own))

    def has_moved(self, params: Sequence[Tensor]) -> bool:
        """Whether parameters are others than those that the other ranks last got."""
        before, self._sent = self._sent, tuple(p._version for p in params)
        holder, ProcessGroup._holder = ProcessGroup._holder, self
        return self._sent != before or holder is not self


_ELSEWHERE = "Parameters are varied, and the loss has to be a number there too: inf or nan where there is none."


class Objective(Twin):
    """Loss over all batches, ``L(θ) = sum_s weight_s loss(shard_s)``, with θ the selected parameters as one vector.

    Made by :meth:`zoscope.Problem.prepare`; it works on the model in place and is valid inside that context only.

    Attributes:
        model: The model without wrappers, on ``device``.
        params: Distinct leaf parameters that require gradients.
        names: Their names.
        num_params: ``d``, the length of the flat vector.
        num_examples: Examples over all shards.
        shards: Micro-batches, their tensors on ``device`` unless :attr:`on_host`.
        criterion: ``criterion(outputs, targets)`` of a problem made by ``from_criterion``, else None.
        on_host: Whether batches stay in host memory and move to the device one at a time.
        warnings: What a reader of the result should know.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossFunction,
        criterion: Callable[[Any, Any], Tensor] | None,
        params: Mapping[str, nn.Parameter],
        batches: Sequence[Any],
        counts: Sequence[int],
        batch_size_of: Callable[[Any], int] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.names = tuple(params)
        self.params = tuple(params.values())
        self.criterion = criterion
        self.device = device
        self.dtype = dtype
        self.num_params = sum(p.numel() for p in self.params)
        self.num_examples = number_of_examples(list(batches), list(counts), batch_size_of)
        self.on_host = False
        self.batch_dtype: torch.dtype | None = dtype  # None leaves the tensors of batches as they are
        self.warnings: list[Notice] = []
        self.indivisible: str | None = None  # why batches must not be cut, once that is known
        self.splits: list[int] = []  # micro-batches that they were cut into so far
        self.process_group: ProcessGroup | ShardedGroup | None = None  # other processes that hold the same problem
        self.session: ExitStack | None = None  # what ends with it, on another rank
        self.metrics: Mapping[str, Metric] = {}
        self.differentiates = False  # whether the loss takes derivatives itself, and needs gradients on
        self.changes_batches: bool | None = None  # whether the loss writes into its batch, once that is known
        self._loss = loss
        self.batch_size_of = batch_size_of
        self._sizes = [p.numel() for p in self.params]
        self.shards: tuple[Shard, ...] = tuple(
            Shard(batch, count / sum(counts), count, _rows(batch)) for batch, count in zip(batches, counts, strict=True)
        )

    # --- the loss -------------------------------------------------------------------------------------------------

    def batch(self, shard: Shard) -> Any:
        """The batch of a shard, on the device; a loss may take things out of it, as those of a training loop do.

        A loss that writes into its batch gets a copy: data are the user's, and graphs that are kept need what they saw.
        """
        batch = self.placed(shard).batch if self.on_host else shard.batch
        if self.changes_batches:
            return nest.cloned(batch)
        return copy.copy(batch) if isinstance(batch, (MutableMapping, list)) else batch

    def placed(self, shard: Shard) -> Shard:
        """A shard with its batch on the device."""
        return replace(shard, batch=nest.moved(shard.batch, device=self.device, dtype=self.batch_dtype))

    @property
    def loss_function(self) -> LossFunction:
        """What the user's loss is, or a wrapper around it."""
        return self._loss

    def loss(self, shard: Shard) -> Tensor:
        """Mean loss of a shard, a scalar that can be differentiated twice by :attr:`params`."""
        return self._as_trained(lambda: self._evaluate(self.batch(shard)))

    def _evaluate(self, batch: Any) -> Tensor:
        """The loss; the first time, with a look at what it writes to."""
        if self.changes_batches is not None:
            return self._loss(self.model, batch)
        batch = nest.cloned(batch)
        before = nest.versions(batch)
        with nullcontext() if self.mirrored else frozen(self.model, self.params):
            loss = self._loss(self.model, batch)
        self.changes_batches = nest.versions(batch) != before
        return loss

    def _as_trained(self, evaluate: Callable[[], T]) -> T:
        """Evaluate with gradients on where a loss needs them inside, as physics-informed ones and force fields do.

        Where they are off around it, the value has no graph in the end.
        """
        if self._has_gradients:
            return evaluate()
        if not self.differentiates:
            try:
                return evaluate()
            except RuntimeError as error:
                if is_out_of_memory(error) or self.mirrored:
                    raise
                with suppress(RuntimeError):
                    found = self._with_gradients(evaluate)
                    self.differentiates = True
                    return found
                raise
        return self._with_gradients(evaluate)

    @property
    def _has_gradients(self) -> bool:
        return torch.is_grad_enabled() and all(p.requires_grad for p in self.params)

    def _with_gradients(self, evaluate: Callable[[], T]) -> T:
        frozen = [p for p in self.params if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_()
        try:
            with torch.enable_grad():
                found = evaluate()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return cast("T", found.detach()) if isinstance(found, Tensor) else found

    def loss_at(self, tensors: Sequence[Tensor], shard: Shard) -> Tensor:
        """Mean loss of a shard with ``tensors`` in place of :attr:`params`: a pure function, for ``torch.func``."""
        named = {name: tensor for names, tensor in zip(self._places, tensors, strict=True) for name in names}
        module = LossModule(self.model, self._loss)
        result: Tensor = functional_call(module, named, (self.batch(shard),), tie_weights=False)
        return result

    @cached_property
    def _places(self) -> list[list[str]]:
        """For every parameter its names, one for each module that holds it, in a :class:`LossModule`.

        A module that is registered twice is named once: ``functional_call``, told both names or left to find them, puts
        the tensor that it had put in first back as the original.
        """
        places: dict[int, list[str]] = {}
        for prefix, module in self.model.named_modules(prefix="model"):
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(parameter), []).append(f"{prefix}.{name}")
        return [places[id(parameter)] for parameter in self.params]

    @property
    def mirrored(self) -> bool:
        """Whether all ranks go through the same program with parts of one model."""
        return isinstance(self.process_group, ShardedGroup)

    @property
    def ranks(self) -> Ranks:
        """Those that share the work; ``ALONE`` also where a caller has put other shards in place for a while."""
        group = self.process_group if self.mirrored else self._dealt
        return ALONE if group is None else group.ranks

    @property
    def _dealt(self) -> ProcessGroup | None:
        """What is for this rank, where these are the shards that were dealt out."""
        group = self.process_group
        return group if isinstance(group, ProcessGroup) and group.shards is self.shards else None

    @property
    def pieces(self) -> tuple[Shard, ...]:
        """What is differentiated here."""
        return self.shards if self._dealt is None else self._dealt.pieces

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have every rank evaluate all of the data by itself, unless it has only a part of the model."""
        group = self.process_group
        self.process_group = group if self.mirrored else None
        try:
            yield
        finally:
            self.process_group = group

    def news(self) -> Tensor | None:
        """The parameters, where the other ranks have others."""
        group = self.process_group
        return self.read() if isinstance(group, ProcessGroup) and group.has_moved(self.params) else None

    def learn(self, news: Tensor) -> None:
        """Take the parameters of rank 0."""
        self.write(news)

    @collective
    def value(self) -> float:
        """Loss over all shards, accumulated in float64; may be infinite or NaN."""
        if isinstance(self.process_group, ShardedGroup):
            return self.process_group.value()
        ranks, own = self.ranks, self.shards if self._dealt is None else self._dealt.own
        part = ranks.attempt(lambda: self.value_of(own))
        return float(ranks.total(torch.tensor([part], dtype=torch.float64)))

    @torch.no_grad()
    def value_of(self, shards: Sequence[Shard]) -> float:
        """What some shards contribute to the loss, computed here."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with user_code("The loss function", remedy=_ELSEWHERE):
            for shard in shards:
                total += shard.weight * self.loss(shard).detach().to(total)
        return float(total)

    @collective
    def gradient(self) -> tuple[float, Tensor]:
        """Loss, accumulated in float64, and gradient ``(d,)`` over all shards, loss/param."""
        ranks = self.ranks
        loss, flat = ranks.attempt(lambda: self.gradient_of(self.pieces))
        return float(ranks.total(torch.tensor([loss], dtype=torch.float64))), ranks.collect(flat)

    @torch.enable_grad()
    def gradient_of(self, shards: Sequence[Shard]) -> tuple[float, Tensor]:
        """What some shards contribute to the loss and to the gradient, computed here."""
        total = torch.zeros(self.num_params, dtype=self.dtype, device=self.device)
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        for shard in shards:
            loss = self.loss(shard)
            grads = torch.autograd.grad(loss, self.params, allow_unused=True)
            total.add_(self.flatten(grads), alpha=shard.weight)
            value += shard.weight * loss.detach().to(value)
        return float(value), total  # a device is waited for once

    @torch.no_grad()
    def metric_values(self) -> dict[str, float]:
        """The problem's own metrics, means over all examples; a value may be infinite or NaN."""
        found = {}
        for name, metric in self.metrics.items():
            with user_code(f"The metric {name!r}", remedy="It is called as metric(model, batch) and returns a number."):
                found[name] = sum(s.weight * self._metric(metric, s) for s in self.shards)
        return found

    def _metric(self, metric: Metric, shard: Shard) -> float:
        return self._as_trained(lambda: float(metric(self.model, self.batch(shard))))

    def outputs(self, shard: Shard) -> tuple[Any, Any]:
        """``(model(x), y)`` of a shard, for problems with a criterion.

        Raises:
            SpecError: If a batch is not a pair.
        """
        inputs, targets = pair(self.batch(shard))
        return self.model(inputs), targets

    def own_parts(self) -> None:
        """Have :attr:`params` be the parts of sharded parameters that are on this rank; ``num_params`` counts all."""
        self._loss = ShardedLoss(self._loss)
        parts = [(name, local(p.detach())) for name, p in zip(self.names, self.params, strict=True)]
        self.names = tuple(name for name, part in parts if part.numel())
        self.params = tuple(cast("nn.Parameter", part) for _, part in parts if part.numel())

    # --- the flat vector ------------------------------------------------------------------------------------------

    def flatten(self, tensors: Sequence[Tensor | None], *, out: Tensor | None = None) -> Tensor:
        """Join tensors shaped like :attr:`params` into ``(d,)``; None counts as zeros.

        Args:
            tensors: One per parameter.
            out: ``(d,)`` tensor that receives the result, outside of any graph.
        """
        parts = [
            torch.zeros(size, dtype=p.dtype, device=p.device) if t is None else t.reshape(-1)
            for t, p, size in zip(tensors, self.params, self._sizes, strict=True)
        ]
        if out is None:
            return torch.cat(parts)
        with torch.no_grad():
            return torch.cat(parts, out=out)

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Views of a ``(d,)`` vector in the shapes of :attr:`params`."""
        parts = torch.split(vector, self._sizes)
        return tuple(part.view(p.shape) for part, p in zip(parts, self.params, strict=True))

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of the parameters, ``(d,)``."""
        return self.flatten(self.params)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the parameters to a ``(d,)`` vector, in place."""
        torch._foreach_copy_(list(self.params), list(self.unflatten(vector)))

    # --- micro-batches --------------------------------------------------------------------------------------------

    def split(self, micro_batch: int) -> None:
        """Cut every shard into pieces of at most ``micro_batch`` rows.

        Raises:
            SpecError: If a batch has no leading dimension to cut along.
        """
        self._split(micro_batch, self.indivisible)

    @collective
    def _split(self, micro_batch: int, indivisible: str | None) -> None:
        group = self._dealt
        self.shards = self.cut(micro_batch) if group is None else group.ranks.attempt(lambda: self.cut(micro_batch))
        self.splits.append(micro_batch)
        if group is not None:
            group.deal_out(self, indivisible)

    def cut(self, micro_batch: int) -> tuple[Shard, ...]:
        """All shards in pieces of at most ``micro_batch`` rows; see `split`, which puts them in their place."""
        return tuple(piece for shard in self.shards for piece in self._pieces(shard, micro_batch))

    def head(self, rows: int) -> Shard:
        """The first ``rows`` rows of the first shard, which has more or as many."""
        shard = self.shards[0]
        parts = None if shard.rows is None else nest.split(shard.batch, [rows, shard.rows - rows])
        return shard if parts is None or shard.rows == rows else Shard(parts[0], 1.0, rows, rows)

    def _pieces(self, shard: Shard, micro_batch: int) -> list[Shard]:
        rows = shard.rows
        if rows is not None and rows <= micro_batch:
            return [shard]
        sizes = _even(rows, micro_batch) if rows is not None else []
        parts = nest.split(shard.batch, sizes) if sizes else None
        if parts is None or rows is None:
            kind = type(shard.batch).__name__
            raise SpecError(
                f"--micro-batch {micro_batch}: a batch of type {kind} cannot be cut, since it holds no tensor with one "
                "row per example. Make smaller batches in the spec instead."
            )
        counts = sizes if self.batch_size_of is None else [examples_in(part, self.batch_size_of) for part in parts]
        total = sum(counts)
        return [
            Shard(part, shard.weight * count / total, count, size)
            for part, count, size in zip(parts, counts, sizes, strict=True)
            if count > 0  # a piece that weighs nothing, such as one of padding alone
        ]

    def refine(self) -> bool:
        """Halve the micro-batch after an out-of-memory error.

        Returns:
            False when nothing can be halved: one example per shard, or batches that must not be cut.
        """
        largest = max((shard.rows or 1) for shard in self.shards)
        if largest < 2 or self.indivisible is not None:
            return False
        micro_batch = (largest + 1) // 2
        try:
            self.split(micro_batch)
        except SpecError:
            return False
        self.notify("out-of-memory", f"Memory ran out: the micro-batch was reduced to {micro_batch} examples.")
        return True

    def notify(self, code: str, message: str) -> None:
        """Add a warning, in place of an earlier one of the same code."""
        self.warnings[:] = [*(notice for notice in self.warnings if notice.code != code), Notice(code, message)]


def _rows(batch: Any) -> int | None:
    return nest.leading_dimension(batch)


def _even(rows: int, micro_batch: int) -> list[int]:
    """Sizes that differ by one at most, so that no piece is needlessly small."""
    pieces = -(-rows // micro_batch)
    return [rows // pieces + (index < rows % pieces) for index in range(pieces)]
