"""Processes that work on one measurement together: rank 0 decides, the others compute what it asks of them."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


_TOKEN = 16  # bytes
_SECONDS = 20.0  # to connect
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_READY = b"."


class Watch:
    """Connections between rank 0 and the others, each read by a thread.

    Args:
        peers: Connections by rank.
        on_lost: Receives the rank behind a connection that closed.
        on_stop: Receives the exit code that rank 0 sent.

    Attributes:
        ending: Set before a process ends in good order: what closes then is expected.
    """

    def __init__(
        self, peers: dict[int, socket.socket], *, on_lost: Callable[[int], None], on_stop: Callable[[int], None]
    ) -> None:
        self.ending = False
        self._peers = peers
        self._on_lost, self._on_stop = on_lost, on_stop
        for rank, peer in peers.items():
            threading.Thread(target=self._listen, args=(rank, peer), daemon=True).start()

    @classmethod
    def over(
        cls, rank: int, size: int, group: Any, *, on_lost: Callable[[int], None], on_stop: Callable[[int], None]
    ) -> Watch:
        """Connect all ranks; all of them call this together. A rank that cannot connect goes unwatched."""
        peers = _accepted(size, group) if rank == 0 else _connected(rank, group)
        return cls(peers, on_lost=on_lost, on_stop=on_stop)

    def send(self, code: int) -> None:
        """Tell the other ranks to end with an exit code, whatever they are at."""
        self.ending = True
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(bytes([code]))

    def close(self) -> None:
        """Close the connections."""
        self.ending = True
        for peer in self._peers.values():
            with suppress(OSError):
                peer.close()

    def _listen(self, rank: int, peer: socket.socket) -> None:
        try:
            said = peer.recv(1)
        except OSError:
            said = b""
        if self.ending:
            return
        if said:
            self._on_stop(said[0])
        else:
            self._on_lost(rank)


def _accepted(size: int, group: Any) -> dict[int, socket.socket]:
    token = secrets.token_bytes(_TOKEN)
    peers: dict[int, socket.socket] = {}
    with _server() as server:
        server.settimeout(_SECONDS)
        hosts = [os.environ.get("MASTER_ADDR", "localhost"), socket.gethostname()]
        accepting = threading.Thread(target=_accept, args=(server, token, size, peers), daemon=True)
        accepting.start()
        dist.broadcast_object_list([(hosts, server.getsockname()[1], token)], 0, group=group)
        dist.barrier(group=group)
        if len(peers) == size - 1:
            accepting.join()
    return dict(peers)


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(server: socket.socket, token: bytes, size: int, peers: dict[int, socket.socket]) -> None:
    with suppress(OSError):
        while len(peers) < size - 1:
            peer, _ = server.accept()
            peer.settimeout(_SECONDS)
            said = b""
            with suppress(OSError):
                while len(said) < _TOKEN + 4 and (more := peer.recv(_TOKEN + 4 - len(said))):
                    said += more
            if not secrets.compare_digest(said[:_TOKEN], token):
                peer.close()
                continue
            _keep_alive(peer)
            peers[int.from_bytes(said[_TOKEN:], "little")] = peer
            peer.sendall(_READY)


def _connected(rank: int, group: Any) -> dict[int, socket.socket]:
    found: list[tuple[list[str], int, bytes]] = [([], 0, b"")]
    dist.broadcast_object_list(found, 0, group=group)
    hosts, port, token = found[0]
    peers = {}
    for host in hosts:
        with suppress(OSError):
            peer = socket.create_connection((host, port), timeout=_SECONDS)
            peer.sendall(token + rank.to_bytes(4, "little"))
            if peer.recv(1) == _READY:
                _keep_alive(peer)
                peers[0] = peer
                break
    dist.barrier(group=group)
    return peers


def _keep_alive(peer: socket.socket) -> None:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            with suppress(OSError):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


JOIN, JOIN_BY_HAND = timedelta(minutes=10), timedelta(minutes=1)
"""How long ranks wait for each other to start: under torchrun, which starts all of them, and without it."""

PATIENCE = 10.0
"""Seconds after which a rank says that it is waiting."""

ENDLESS = timedelta(days=30)
"""Timeout of an operation: rank 0 may be busy for hours. That a process is gone is seen by the watch, at once."""

GRACE = 10.0
"""Seconds that the watch is given to report a process whose connection broke."""


class Registry:
    """Numbers of objects on rank 0, and the objects of these numbers on another rank.

    Attributes:
        numbers: On rank 0, by the identity of the object.
        items: On another rank, by number.
        next: Number of the next object.
        gone: Numbers of objects that rank 0 has no more.
    """

    def __init__(self) -> None:
        self.next = 0
        self.gone: list[int] = []
        self.numbers: dict[int, int] = {}
        self.items: dict[int, Any] = {}

    def count(self, item: Any) -> int:
        """Give an object of rank 0 the next number, for as long as something else holds it."""
        number, self.next = self.next, self.next + 1
        self.numbers[id(item)] = number
        weakref.finalize(item, self._lost, id(item), number).atexit = False
        return number

    def _lost(self, key: int, number: int) -> None:
        del self.numbers[key]
        self.gone.append(number)


_HEAD = 4096  # bytes of a message that travel in one operation; its length comes first
T = TypeVar("T")


class Ranks:
    """The processes of a job, joined by ``torch.distributed``; all of them make the same calls in the same order.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        control: Process group for messages between CPUs.
        shard_basis: Whether each rank holds a slice of Lanczos vectors, instead of rank 0 all of them.
        in_step: Whether all of them are known to be at the same place. False for good once one left an operation early.
        together: Whether all of them are running a collective function, so that rank 0 need not announce another one.
        registry: Objects of which each rank has its own.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.in_step = True
        self.together = False
        self.registry = Registry()
        self.shard_basis = False
        self.watch: Watch | None = None
        self.control = dist.new_group(backend="gloo", timeout=ENDLESS)
        self._tensors = dist.new_group(backend="nccl", timeout=ENDLESS) if self._a_gpu_each() else None

    @property
    def ranks(self) -> Ranks:
        """Themselves: a collective function asks its first argument which ranks run it."""
        return self

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

    def send(self, body: bytes) -> None:
        """Send a message to the other ranks."""
        head = torch.zeros(_HEAD, dtype=torch.uint8)
        head[:8] = torch.frombuffer(bytearray(len(body).to_bytes(8, "little")), dtype=torch.uint8)
        short = body[: _HEAD - 8]
        head[8 : 8 + len(short)] = torch.frombuffer(bytearray(short), dtype=torch.uint8)
        self._meet(lambda: dist.broadcast(head, 0, group=self.control))
        if len(body) > len(short):
            rest = torch.frombuffer(bytearray(body[len(short) :]), dtype=torch.uint8)
            self._meet(lambda: dist.broadcast(rest, 0, group=self.control))

    def receive(self) -> bytes:
        """Wait for a message of rank 0."""
        head = torch.zeros(_HEAD, dtype=torch.uint8)
        self._meet(lambda: dist.broadcast(head, 0, group=self.control))
        raw = head.numpy().tobytes()
        length = int.from_bytes(raw[:8], "little")
        body = raw[8 : 8 + length]
        if length > len(body):
            rest = torch.zeros(length - len(body), dtype=torch.uint8)
            self._meet(lambda: dist.broadcast(rest, 0, group=self.control))
            body += rest.numpy().tobytes()
        return body

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

    def keep(self, item: T) -> T:
        """Let what every rank has just made stand for that of the others, as long as rank 0's lives."""
        if self.leads:
            self.registry.count(item)
        else:
            self.registry.items[self.registry.next] = item
            self.registry.next += 1
        return item

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

    def scatter(self, whole: Tensor | None, piece: Tensor) -> Tensor:
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
            self.send(bytes([code]))
        elif self.watch is not None:
            self.watch.send(code)


class Alone(Ranks):
    """A process of its own, which does the work of all ranks."""

    rank, size, in_step, shard_basis, together, watch = 0, 1, True, False, True, None

    def __init__(self) -> None:
        """Nothing to join."""

    def attempt(self, work: Callable[[], T]) -> T:
        """Do the work."""
        return work()

    def keep(self, item: T) -> T:
        """The object itself."""
        return item

    def gather(self, item: Any) -> list[Any]:
        """The one object."""
        return [item]

    def total(self, numbers: Tensor) -> Tensor:
        """The numbers themselves."""
        return numbers

    def collect(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


ALONE = Alone()
"""For what is not shared."""


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
    wait = JOIN if dist.is_torchelastic_launched() else JOIN_BY_HAND
    waiting = threading.Timer(PATIENCE, _say_waiting, [wait])
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group(backend, timeout=wait)
    except (RuntimeError, ValueError, OverflowError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
        raise UsageError(
            f"The processes of this job did not find each other ({str(error).strip().splitlines()[0]}). Expected all "
            f"of them within {wait.seconds} s; the environment says {found}. Start zoscope with "
            "torchrun, or unset RANK if it was meant to run by itself."
        ) from error
    finally:
        waiting.cancel()


def _say_waiting(wait: timedelta) -> None:
    if os.environ.get("RANK") == "0" or not dist.is_torchelastic_launched():
        with suppress(OSError):
            os.write(2, f"Waiting for the other processes of this job, for {wait.seconds} s at most.\n".encode())
