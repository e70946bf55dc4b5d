"""Objects of which every rank has its own, by numbers that are the same everywhere."""

from __future__ import annotations

import weakref
from typing import Any


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
