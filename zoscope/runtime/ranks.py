"""Processes that work on one measurement together: rank 0 decides, the others compute what it tells them.

Only rank 0 runs the program. It announces each piece of common work by the name of a function, and all ranks then meet
in the collective operations of ``torch.distributed`` that the function contains. Whatever rank 0 decides by a clock, by
free memory, or by the last bit of a float is therefore decided once.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zoscope.errors import UsageError
from zoscope.runtime.failures import DroppedError, Failure, LostRankError
from zoscope.runtime.memory import is_out_of_memory
from zoscope.runtime.watch import Watch

JOIN = timedelta(minutes=10)
"""How long ranks wait for each other to start."""

ENDLESS = timedelta(days=30)
"""Timeout of an operation: rank 0 may be busy for hours. That a process is gone is seen by the watch, at once."""

GRACE = 10.0
"""Seconds that the watch is given to report a process whose connection broke."""

_HEAD = 4096  # bytes of a message that travel in one operation; its length comes first
_STOP = ""
T = TypeVar("T")


class Ranks:
    """The processes of a job, joined by ``torch.distributed``; all of them make the same calls in the same order.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        control: Process group for messages between CPUs.
        shard_basis: Whether each rank holds a slice of Lanczos vectors, instead of rank 0 all of them.
        in_step: Whether all of them are known to be at the same place. False for good once one left an operation early.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.in_step = True
        self.shard_basis = False
        self.watch: Watch | None = None
        self.control = dist.new_group(backend="gloo", timeout=ENDLESS)
        self._tensors = dist.new_group(backend="nccl", timeout=ENDLESS) if self._a_gpu_each() else None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of them are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def _a_gpu_each(self) -> bool:
        enough = torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= self.local_size
        return bool(self.smallest(float(enough)))

    # --- messages -------------------------------------------------------------------------------------------------

    def tell(self, name: str, *args: Any) -> None:
        """Announce a piece of work to the other ranks: ``module:function`` and its arguments."""
        body = pickle.dumps((name, args))
        head = torch.zeros(_HEAD, dtype=torch.uint8)
        head[:8] = torch.frombuffer(bytearray(len(body).to_bytes(8, "little")), dtype=torch.uint8)
        short = body[: _HEAD - 8]
        head[8 : 8 + len(short)] = torch.frombuffer(bytearray(short), dtype=torch.uint8)
        self._meet(lambda: dist.broadcast(head, 0, group=self.control))
        if len(body) > len(short):
            rest = torch.frombuffer(bytearray(body[len(short) :]), dtype=torch.uint8)
            self._meet(lambda: dist.broadcast(rest, 0, group=self.control))

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        """Wait for what rank 0 announces."""
        head = torch.zeros(_HEAD, dtype=torch.uint8)
        self._meet(lambda: dist.broadcast(head, 0, group=self.control))
        raw = head.numpy().tobytes()
        length = int.from_bytes(raw[:8], "little")
        body = raw[8 : 8 + length]
        if length > len(body):
            rest = torch.zeros(length - len(body), dtype=torch.uint8)
            self._meet(lambda: dist.broadcast(rest, 0, group=self.control))
            body += rest.numpy().tobytes()
        name, args = pickle.loads(body)
        return name, args

    def attempt(self, work: Callable[[], T]) -> T:
        """Do this rank's part of some common work; where it fails on one rank it fails on all of them.

        Raises:
            DroppedError: On the other ranks, if it failed anywhere.
            Exception: On rank 0, what failed there or elsewhere.
        """
        failure, result = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        except BaseException:  # an interruption: the others are in the middle of this work and wait for this rank
            self.in_step = False
            raise
        if not self.total(torch.tensor([float(failure is not None)], dtype=torch.float64))[0]:
            return result  # type: ignore[return-value]
        said = self.gather(None if failure is None else Failure.of(self.rank, failure))
        if not self.leads:
            raise DroppedError
        if failure is not None and not is_out_of_memory(failure):
            raise failure
        found = sorted((one for one in said if one is not None), key=lambda one: one.kind == "memory")
        raise found[0].error() if found[0].rank else failure or found[0].error()

    # --- numbers and tensors --------------------------------------------------------------------------------------

    def gather(self, item: Any) -> list[Any]:
        """Small objects of all ranks, in their order; empty on the others."""
        found: list[Any] | None = [None] * self.size if self.leads else None
        self._meet(lambda: dist.gather_object(item, found, 0, group=self.control))
        return found or []

    def total(self, numbers: Tensor) -> Tensor:
        """Sum of a small float64 tensor on the CPU over all ranks, in place."""
        self._meet(lambda: dist.all_reduce(numbers, group=self.control))
        return numbers

    def smallest(self, number: float) -> float:
        """Least of the numbers of all ranks."""
        found = torch.tensor(number, dtype=torch.float64)
        self._meet(lambda: dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.control))
        return float(found)

    def share(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with that of rank 0."""
        self._move(tensor, lambda t, group: dist.broadcast(t, 0, group=group), back=True)
        return tensor

    def collect(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place on rank 0; worthless on the others."""
        self._move(tensor, lambda t, group: dist.reduce(t, 0, group=group), back=self.leads)
        return tensor

    def join(self, piece: Tensor) -> Tensor | None:
        """The equally long pieces ``(n, w)`` of all ranks side by side on rank 0, ``(n, size w)``; None elsewhere."""
        group, mine = self._route(piece)
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        self._meet(lambda: dist.gather(mine, parts, 0, group=group))
        return None if parts is None else torch.cat(parts, dim=1).to(piece.device)

    def deal(self, whole: Tensor | None, piece: Tensor) -> Tensor:
        """Fill ``piece`` ``(n, w)`` with this rank's part of ``whole`` ``(n, size w)``, which rank 0 has."""
        group, mine = self._route(piece)
        parts = None
        if whole is not None:
            parts = [part.to(mine.device).contiguous() for part in torch.split(whole, piece.shape[1], dim=1)]
        self._meet(lambda: dist.scatter(mine, parts, 0, group=group))
        if mine is not piece:
            piece.copy_(mine)
        return piece

    def _route(self, tensor: Tensor) -> tuple[Any, Tensor]:
        """The group that carries a tensor, and the tensor where that group takes it."""
        if tensor.is_cuda and self._tensors is None:
            return self.control, tensor.cpu()
        return (self._tensors if tensor.is_cuda else self.control), tensor.contiguous()

    def _move(self, tensor: Tensor, operation: Callable[[Tensor, Any], Any], *, back: bool) -> None:
        group, moved = self._route(tensor)
        self._meet(lambda: operation(moved, group))
        if moved is not tensor and back:
            tensor.copy_(moved)

    def _meet(self, operation: Callable[[], Any]) -> None:
        """Run a collective operation; whoever leaves it early leaves the ranks out of step."""
        if not self.in_step:
            raise LostRankError("The processes of this job are out of step after an interruption: start it again.")
        self.in_step = False
        try:
            operation()
        except RuntimeError as error:
            if self.watch is not None:
                time.sleep(GRACE)  # the watch knows which rank it is, says so and ends this process
            raise LostRankError(
                f"Another process of this job of {self.size} has gone ({str(error).strip().splitlines()[0]}). Look at "
                "what it printed (torchrun --redirects and --tee show it), and start again."
            ) from error
        self.in_step = True

    def stop(self, code: int) -> None:
        """End the other ranks with an exit code."""
        if self.watch is not None:
            self.watch.ending = True
        if self.in_step:
            self.tell(_STOP, code)
        elif self.watch is not None:
            self.watch.send(code)


@dataclass
class Desk:
    """What a rank other than 0 keeps from one piece of work to the next.

    Args:
        ranks: The job.
        problems: Those that were loaded, by number.
        sessions: Those that are prepared, by number.
    """

    ranks: Ranks
    problems: dict[int, Any] = field(default_factory=dict)
    sessions: dict[int, Any] = field(default_factory=dict)


def serve(ranks: Ranks) -> int:
    """Do what rank 0 announces, until it says stop; the exit code that goes with it."""
    desk = Desk(ranks)
    while True:
        name, args = ranks.hear()
        if name == _STOP:
            if ranks.watch is not None:
                ranks.watch.ending = True
            return int(args[0])
        try:
            named(name)(desk, *args)
        except DroppedError:
            continue


def named(name: str) -> Any:
    """What ``module:attribute`` of this package stands for."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


_current: list[Ranks] = []


def current_ranks() -> Ranks | None:
    """The job that rank 0 shares work with; None in a process of its own."""
    return _current[-1] if _current and _current[-1].leads else None


def joined_ranks() -> Ranks | None:
    """The job that this process belongs to, whatever its rank; None for a process of its own."""
    return _current[-1] if _current else None


@contextmanager
def joined(
    *, on_lost: Callable[[int], None] | None = None, on_stop: Callable[[int], None] | None = None
) -> Iterator[Ranks]:
    """Join the processes that the environment names: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    Each rank takes the CUDA device of its ``LOCAL_RANK``, where there is one.

    Args:
        on_lost: Called on another thread with the rank of a process that has gone; it should not return.
        on_stop: Called on another thread of the others with an exit code when rank 0 was interrupted; likewise.

    Raises:
        UsageError: If not all of them come.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    own = not dist.is_initialized()
    if own:
        _initialise("cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo")
    ranks = Ranks()
    if on_lost is not None and on_stop is not None:
        ranks.watch = Watch.over(ranks.rank, ranks.size, ranks.control, on_lost=on_lost, on_stop=on_stop)
    _current.append(ranks)
    try:
        yield ranks
    finally:
        _current.remove(ranks)
        if ranks.watch is not None:
            ranks.watch.close()
        if own and ranks.in_step:
            dist.destroy_process_group()


def _initialise(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=JOIN)
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
        raise UsageError(
            f"The processes of this job did not find each other ({str(error).strip().splitlines()[0]}). Expected all "
            f"of them within {JOIN.seconds // 60} minutes; the environment says {found}. Start zoscope with "
            "torchrun, or unset RANK if it was meant to run by itself."
        ) from error
