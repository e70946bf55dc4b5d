"""A prepared problem on several ranks: each holds the same parameters and evaluates its own examples."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoscope import runtime
from zoscope.errors import SpecError
from zoscope.problem import pytree as nest
from zoscope.problem.model import ShardedGroup, is_sharded
from zoscope.problem.objective import Examples, Indices
from zoscope.problem.session import prepared_here

if TYPE_CHECKING:
    from zoscope.problem.core import Problem
    from zoscope.problem.objective import Objective, Shard

CUT_WORK = 10_000_000
"""Parameters times examples from which batches fewer than ranks are cut, for derivatives; below it does not pay."""

_numbers = itertools.count()


@contextmanager
def prepared(problem: Problem, **options: Any) -> Iterator[Objective]:
    """Implements :meth:`zoscope.Problem.prepare`: here, and on the other ranks of a job that know the problem."""
    ranks = runtime.current_ranks()
    if ranks is None or problem.shared is None:
        with prepared_here(problem, **options) as objective:
            yield objective
        return
    number = next(_numbers)
    ranks.broadcast("zoscope.problem.distributed:_open", number, problem.shared, problem.params, options)
    with ExitStack() as stack:
        objective = ranks.attempt(lambda: stack.enter_context(prepared_here(problem, spread=True, **options)))
        try:
            if isinstance(objective.process_group, ShardedGroup):
                objective.process_group.number = number
            else:
                objective.process_group = process_group = ProcessGroup(ranks, number, objective)
                process_group.begin()
            yield objective
        finally:
            if ranks.in_step:
                ranks.broadcast("zoscope.problem.distributed:_close", number)


@dataclass
class WorkerSession:
    """A prepared problem on a rank other than 0.

    Args:
        ranks: The job.
        objective: The problem; its shards are all of rank 0's.
        stack: Ends the session.
        own: Shards that this rank evaluates.
        pieces: What it differentiates: the same, or parts of all where there are fewer shards than ranks.
        kept: What pieces of work keep for the next one.
    """

    ranks: runtime.Ranks
    objective: Objective
    stack: ExitStack
    own: tuple[Shard, ...] = ()
    pieces: tuple[Shard, ...] = ()
    kept: dict[str, Any] = field(default_factory=dict)


def _open(
    worker_state: runtime.WorkerState, number: int, problem: int, params: str | None, options: dict[str, Any]
) -> None:
    subject = worker_state.problems[problem]
    if subject.params != params:
        subject = subject.with_params(params)
    with ExitStack() as stack:
        # Checks are rank 0's, unless a forward pass takes all ranks.
        check = options["check"] and not options["differentiable"] and is_sharded(subject.model)
        # A memory limit is rank 0's too, which cuts the batches for all.
        here = {**options, "check": check, "max_memory": None, "limited": options["max_memory"] is not None}
        session = prepared_here(subject, spread=True, **here)
        objective = worker_state.ranks.attempt(lambda: stack.enter_context(session))
        worker_state.sessions[number] = WorkerSession(worker_state.ranks, objective, stack.pop_all())


def _close(worker_state: runtime.WorkerState, number: int) -> None:
    worker = worker_state.sessions.pop(number, None)
    if worker is not None:
        worker.stack.close()


def _work(worker_state: runtime.WorkerState, number: int, fresh: bool, name: str, *args: Any) -> None:
    """Take rank 0's parameters if they are new, then do the piece of work."""
    worker: WorkerSession = worker_state.sessions[number]
    if fresh:
        _receive(worker.ranks, worker.objective)
    runtime.named(name)(worker, *args)


class ProcessGroup:
    """The ranks at work on one prepared problem, as rank 0 sees them.

    Args:
        ranks: The job.
        number: Of the session.
        objective: The problem on rank 0.
    """

    mirrored = False
    _holder: ProcessGroup | None = None  # whose parameters the other ranks have: sessions may share a model

    def __init__(self, ranks: runtime.Ranks, number: int, objective: Objective) -> None:
        self.ranks = ranks
        self.own: tuple[Shard, ...] = ()
        self.pieces: tuple[Shard, ...] = ()
        self._number = number
        self._objective = objective
        self._shards: tuple[Shard, ...] = ()
        self._sent: tuple[int, ...] = ()

    def begin(self) -> None:
        """Bring the other ranks to where this one is: the shards, every parameter and buffer."""
        objective = self._objective
        self._tell("_layout", list(objective.splits), _signature(objective))
        self.ranks.attempt(lambda: None)
        for tensor in _state(objective):
            self.ranks.share(tensor)
        self._shards = objective.shards
        self.deal_out()

    @property
    def follows(self) -> bool:
        """Whether the other ranks have the same shards: a caller may have put others in their place for a while."""
        return self._objective.shards is self._shards

    def split(self, micro_batch: int) -> None:
        """Let the other ranks cut their shards as this one has."""
        self._tell("_split", micro_batch)
        self._shards = self._objective.shards
        self.deal_out()

    def deal_out(self) -> None:
        """Choose which rank evaluates which shard, and which pieces each differentiates.

        Losses stay those of whole shards: second differences of them would show how the batches were cut.
        """
        objective, size = self._objective, self.ranks.size
        rows, count = max((shard.rows or 1) for shard in objective.shards), len(objective.shards)
        cut = None
        if count < size and rows > 1 and objective.indivisible is None:
            cut = -(-rows // -(-size // count))
        if objective.num_params * objective.num_examples < CUT_WORK:
            cut = None
        self._tell("_take", cut)
        self.own, self.pieces = _dealt(objective, self.ranks, cut)

    def work(self, name: str, *args: Any) -> None:
        """Announce a piece of work, ``module:function``; the parameters go along where they have changed."""
        params = self._objective.params
        versions = tuple(p._version for p in params)
        fresh = versions != self._sent or ProcessGroup._holder is not self
        self.ranks.broadcast("zoscope.problem.distributed:_work", self._number, fresh, name, *args)
        if fresh:
            self.ranks.share(self._objective.read())
            self._sent, ProcessGroup._holder = versions, self

    def value(self) -> float:
        """Loss over all shards."""
        self.work("zoscope.problem.distributed:value")
        return _value(self.ranks, self._objective, self.own)

    def gradient(self) -> tuple[float, Tensor]:
        """Loss and gradient over all shards."""
        self.work("zoscope.problem.distributed:gradient")
        return _gradient(self.ranks, self._objective, self.pieces)

    def memory_for_vectors(self) -> int:
        """Bytes for vectors that are kept: of rank 0, or of all ranks, each as much as the one with the least has."""
        if not self.ranks.shard_basis:
            return runtime.available_memory(self._objective.device)
        self.work("zoscope.problem.distributed:memory")
        return int(self.ranks.size * _memory(self.ranks, self._objective))

    def _tell(self, name: str, *args: Any) -> None:
        self.ranks.broadcast(f"zoscope.problem.distributed:{name}", self._number, *args)


# --- pieces of work, the same on every rank -------------------------------------------------------------------------


def value(worker: WorkerSession) -> None:
    """This rank's part of a loss."""
    _value(worker.ranks, worker.objective, worker.own)


def gradient(worker: WorkerSession) -> None:
    """This rank's part of a gradient."""
    _gradient(worker.ranks, worker.objective, worker.pieces)


def memory(worker: WorkerSession) -> None:
    """This rank's free memory."""
    _memory(worker.ranks, worker.objective)


def _memory(ranks: runtime.Ranks, objective: Objective) -> float:
    free = runtime.available_memory(objective.device)
    return ranks.smallest(free / (ranks.local_size if objective.device.type == "cpu" else 1))


def _value(ranks: runtime.Ranks, objective: Objective, own: tuple[Shard, ...]) -> float:
    part = ranks.attempt(lambda: objective.value_of(own))
    return float(ranks.total(torch.tensor([part], dtype=torch.float64))[0])


def _gradient(ranks: runtime.Ranks, objective: Objective, own: tuple[Shard, ...]) -> tuple[float, Tensor]:
    loss, flat = ranks.attempt(lambda: objective.gradient_of(own))
    total = ranks.total(torch.tensor([loss], dtype=torch.float64))
    return float(total[0]), ranks.collect(flat)


def _receive(ranks: runtime.Ranks, objective: Objective) -> None:
    flat = torch.empty(objective.num_params, dtype=objective.read().dtype, device=objective.device)
    objective.write(ranks.share(flat))


def _layout(worker_state: runtime.WorkerState, number: int, splits: list[int], signature: tuple[Any, ...]) -> None:
    worker: WorkerSession = worker_state.sessions[number]
    worker_state.ranks.attempt(lambda: _follow(worker.objective, splits, signature, rank=worker_state.ranks.rank))
    for tensor in _state(worker.objective):
        worker_state.ranks.share(tensor)


def _follow(objective: Objective, splits: list[int], signature: tuple[Any, ...], *, rank: int) -> None:
    for micro_batch in splits[len(objective.splits) :]:
        objective.split(micro_batch)
    found = _signature(objective)
    if found == signature:
        return
    names = ("parameters", "batches", "data")
    what = next(name for name, a, b in zip(names, found, signature, strict=True) if a != b)
    raise SpecError(
        f"The spec gives other {what} on rank {rank} than on rank 0: expected the same problem on every rank. Fix the "
        "seeds of what it draws, and shard nothing by rank itself: zoscope distributes the batches."
    )


def _signature(objective: Objective) -> tuple[Any, ...]:
    """What tells two problems apart at little cost: names and shapes, examples, and a few numbers of every batch."""
    shapes = [(name, tuple(p.shape)) for name, p in zip(objective.names, objective.params, strict=True)]
    counts = [(shard.examples, shard.rows) for shard in objective.shards]
    return shapes, counts, [_checksum(shard.batch) for shard in objective.shards]


def _checksum(batch: Any) -> int:
    found = 0
    for item in nest.leaves(batch):
        values = item.detach().cpu() if isinstance(item, Tensor) and item.layout == torch.strided else item
        if isinstance(values, (Tensor, np.ndarray)) and not getattr(values, "is_nested", False):
            flat = torch.as_tensor(values).reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)].to(torch.float64)
            found = zlib.crc32(sample.numpy().tobytes(), found)
    return found


def _split(worker_state: runtime.WorkerState, number: int, micro_batch: int) -> None:
    worker_state.sessions[number].objective.split(micro_batch)


def _take(worker_state: runtime.WorkerState, number: int, cut: int | None) -> None:
    worker: WorkerSession = worker_state.sessions[number]
    worker.own, worker.pieces = _dealt(worker.objective, worker.ranks, cut)


def _dealt(objective: Objective, ranks: runtime.Ranks, cut: int | None) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    own = pieces = _share(objective, objective.shards, ranks)
    if cut is not None:
        with suppress(SpecError):  # batches that cannot be cut leave some ranks idle
            pieces = _share(objective, objective.cut(cut), ranks)
    return own, pieces


def _share(objective: Objective, shards: tuple[Shard, ...], ranks: runtime.Ranks) -> tuple[Shard, ...]:
    """The shards of this rank, on the device: the largest first, each to the rank with the fewest examples so far."""
    loads, own = [0] * ranks.size, []
    for index in sorted(range(len(shards)), key=lambda i: -shards[i].examples):
        rank = loads.index(min(loads))
        loads[rank] += shards[index].examples
        if rank == ranks.rank:
            own.append(index)
    return tuple(objective.placed(shards[index]) for index in sorted(own))


def _state(objective: Objective) -> list[Tensor]:
    """Everything that a loss may depend on, in one order."""
    found: dict[int, Tensor] = {}
    for tensor in (*objective.model.parameters(), *objective.model.buffers()):
        found.setdefault(id(tensor), tensor.detach())
    return [tensor for tensor in found.values() if tensor.layout == torch.strided]


class MiniBatch:
    """Some examples of a problem, and their mean loss.

    With several ranks, and enough work to pay for sending the parameters at every evaluation, each takes a part.

    Args:
        objective: The prepared problem.
        examples: All of its examples.
        indices: Those of the mini-batch.
    """

    def __init__(self, objective: Objective, examples: Examples, indices: Indices) -> None:
        self._objective, self._examples, self._indices = objective, examples, indices
        self._sent = False
        self._process_group = _sharing(objective, examples, len(indices))
        self._part: Part | None = (
            None if self._process_group is None else Part(examples, indices, self._process_group.ranks)
        )
        self.shards: tuple[Shard, ...] = examples.gather(indices) if self._part is None else self._part.shards

    def value(self) -> float:
        """Its loss; may be infinite or NaN."""
        if self._process_group is None or self._part is None:
            return self._objective.value_of(self.shards)
        self._announce(self._process_group, "value_of_part")
        return _batch_value(self._process_group.ranks, self._objective, self._part)

    def gradient(self) -> tuple[float, Tensor]:
        """Its loss and its gradient ``(d,)``."""
        if self._process_group is None or self._part is None:
            return self._objective.gradient_of(self.shards)
        self._announce(self._process_group, "gradient_of_part")
        return _batch_gradient(self._process_group.ranks, self._objective, self._part)

    def _announce(self, process_group: ProcessGroup, work: str) -> None:
        process_group.work(f"zoscope.problem.distributed:{work}", None if self._sent else self._indices)
        self._sent = True


def _sharing(objective: Objective, examples: Examples, rows: int) -> ProcessGroup | None:
    """The ranks that share a mini-batch; ``None`` where this one evaluates it alone."""
    process_group = objective.process_group
    if (
        not isinstance(process_group, ProcessGroup)
        or not process_group.follows
        or examples.whole
        or rows < process_group.ranks.size
    ):
        return None
    return process_group if objective.num_params * rows >= CUT_WORK else None


class Part:
    """What one rank evaluates of a mini-batch.

    Args:
        examples: All of the problem's; in the same order on every rank, however their batches were cut.
        indices: Those of the mini-batch.
        ranks: The job.

    Attributes:
        shards: The rows of this rank; their weights add up to 1.
        count: What they count for.
    """

    def __init__(self, examples: Examples, indices: Indices, ranks: runtime.Ranks) -> None:
        self.shards = examples.gather(np.array_split(indices, ranks.size)[ranks.rank])
        self.count = sum(shard.examples for shard in self.shards)


def value_of_part(worker: WorkerSession, indices: Indices | None) -> None:
    """The part of another rank."""
    _batch_value(worker.ranks, worker.objective, _kept(worker, indices))


def gradient_of_part(worker: WorkerSession, indices: Indices | None) -> None:
    """The part of another rank."""
    _batch_gradient(worker.ranks, worker.objective, _kept(worker, indices))


def examples_of(worker: WorkerSession) -> Examples:
    """All examples on another rank; they keep their order when batches are cut."""
    if "examples" not in worker.kept:
        worker.kept["examples"] = Examples(worker.objective)
    found: Examples = worker.kept["examples"]
    return found


def _kept(worker: WorkerSession, indices: Indices | None) -> Part:
    if indices is not None:
        worker.kept["mini-batch"] = Part(examples_of(worker), indices, worker.ranks)
    part: Part = worker.kept["mini-batch"]
    return part


def _batch_value(ranks: runtime.Ranks, objective: Objective, part: Part) -> float:
    loss = ranks.attempt(lambda: objective.value_of(part.shards))
    total, count = ranks.total(torch.tensor([loss * part.count, part.count], dtype=torch.float64)).tolist()
    return float(total / count)


def _batch_gradient(ranks: runtime.Ranks, objective: Objective, part: Part) -> tuple[float, Tensor]:
    loss, flat = ranks.attempt(lambda: objective.gradient_of(part.shards))
    total, count = ranks.total(torch.tensor([loss * part.count, part.count], dtype=torch.float64)).tolist()
    return float(total / count), ranks.collect(flat.mul_(part.count / count))
