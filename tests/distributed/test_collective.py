"""Collective functions between two ranks of one process: what travels, what stays, what the second rank does."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from zoscope.runtime.collective import Twin, collective, serve
from zoscope.runtime.process_group import DroppedError, Ranks, Registry


class Line(Ranks):
    """A rank whose messages and tensors go through queues of this process."""

    def __init__(self, rank: int, messages: deque[bytes], tensors: deque[torch.Tensor]) -> None:
        self.rank, self.size, self.together, self.watch = rank, 2, False, None
        self.registry = Registry()
        self._messages, self._tensors_sent = messages, tensors

    def send(self, body: bytes) -> None:
        self._messages.append(body)

    def receive(self) -> bytes:
        return self._messages.popleft()

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.leads:
            self._tensors_sent.append(tensor.clone())
            return tensor
        sent = self._tensors_sent.popleft()
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        return sent


class Counter(Twin):
    """A twin that tells what was added since the last time."""

    def __init__(self, ranks: Ranks, total: int = 0) -> None:
        self.ranks, self.total, self._fresh = ranks, total, 0

    def recipe(self) -> tuple[Any, ...]:
        return self.ranks, self.total

    def add(self, count: int) -> None:
        self.total, self._fresh = self.total + count, self._fresh + count

    def news(self) -> int:
        fresh, self._fresh = self._fresh, 0
        return fresh if self.ranks.registry.numbers.get(id(self)) is not None and fresh else 0

    def learn(self, news: int) -> None:
        self.total += news


calls: list[tuple[Any, ...]] = []


@collective
def noted(subject: Any, *args: Any, quiet: bool = False) -> str:
    calls.append((subject.ranks.rank, subject, args, quiet))
    if args and args[0] == "inner":
        noted(subject, "called by the first")
    if args and args[0] == "drop":
        raise DroppedError
    return "done"


@pytest.fixture
def pair():
    calls.clear()
    messages: deque[bytes] = deque()
    tensors: deque[torch.Tensor] = deque()
    return Line(0, messages, tensors), Line(1, messages, tensors)


def end(leader: Line, follower: Line) -> list[tuple[Any, ...]]:
    """Let the second rank do what it was told, up to the end; its calls."""
    before = len(calls)
    leader.send(bytes([7]))
    assert serve(follower) == 7
    return calls[before:]


def test_arguments_travel_and_keywords_stay(pair) -> None:
    leader, follower = pair
    matrix = torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T  # not contiguous
    assert noted(leader, matrix, {"steps": (1, 2)}, quiet=True) == "done"
    assert calls[0][3] is True
    ((rank, subject, (tensor, settings), quiet),) = end(leader, follower)
    assert (rank, subject, quiet) == (1, follower, False)
    assert torch.equal(tensor, matrix)
    assert settings == {"steps": (1, 2)}


def test_what_a_collective_function_calls_is_not_announced_again(pair) -> None:
    leader, follower = pair
    noted(leader, "inner")
    assert [args for _, _, args, _ in calls] == [("inner",), ("called by the first",)]
    assert not leader.together
    assert [args for _, _, args, _ in end(leader, follower)] == [("inner",), ("called by the first",)]


def test_a_twin_is_made_once_and_then_told_the_news(pair) -> None:
    leader, follower = pair
    counter = Counter(leader, 3)
    noted(counter)
    counter.add(4)
    noted(counter)
    first, second = (entry[1] for entry in end(leader, follower))
    assert first is second
    assert first is not counter
    assert first.ranks is follower
    assert first.total == counter.total == 7
    del counter, calls[:]
    noted(leader)
    end(leader, follower)
    assert not follower.registry.items  # what the first rank has no more is let go


def test_a_rank_whose_work_was_dropped_waits_for_what_comes_next(pair) -> None:
    leader, follower = pair
    with pytest.raises(DroppedError):
        noted(leader, "drop")
    assert not leader.together
    noted(leader, "next")
    assert [args for _, _, args, _ in end(leader, follower)] == [("drop",), ("next",)]
