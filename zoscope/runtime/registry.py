"""Objects of which every rank has its own, by numbers that are the same everywhere."""

from __future__ import annotations

import weakref
from typing import Any


class Registry:
    """Numbers of objects on rank 0, and the objects of these numbers on another rank.

    Attributes:
        next: Number of the next object.
        gone: Numbers of objects that rank 0 has no more.
    """

    def __init__(self) -> None:
        self.next = 0
        self.gone: list[int] = []
        self._numbers: dict[int, int] = {}
        self._items: dict[int, Any] = {}

    def count(self, item: Any) -> int:
        """Give an object of rank 0 the next number, for as long as something else holds it."""
        number, self.next = self.next, self.next + 1
        self._numbers[id(item)] = number
        weakref.finalize(item, self._lost, id(item), number).atexit = False
        return number

    def put(self, number: int, item: Any) -> None:
        """Hold an object on another rank."""
        self._items[number] = item

    def _lost(self, key: int, number: int) -> None:
        del self._numbers[key]
        self.gone.append(number)

    def number(self, item: Any) -> int | None:
        """Number of an object on rank 0."""
        return self._numbers.get(id(item))

    def __getitem__(self, number: int) -> Any:
        return self._items[number]

    def drop(self, numbers: list[int]) -> None:
        """Let objects go."""
        for number in numbers:
            self._items.pop(number, None)
