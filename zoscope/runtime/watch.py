"""Notices at once that a process of a job has gone.

Each rank holds a connection to rank 0 on which nothing is sent. The kernel closes it with the process, whatever that
was busy with, and asks about the other machine while it is silent: no thread of ours has to say that it is alive.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

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
