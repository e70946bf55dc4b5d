# ruff: noqa: D102 - every kind has the two methods that the protocol documents
"""Kinds of values: each reads a located value or says what is wrong with it, and describes itself in JSON Schema."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from zoscope.config.located import InvalidError, Issue, Located, nearest, shorten

Schema = dict[str, Any]


class Kind(Protocol):
    """What a key accepts."""

    def read(self, node: Located, name: str) -> Any:
        """The value as Python sees it; ``InvalidError`` names ``name``, what was found and what is expected."""

    def schema(self) -> Schema:
        """The same rule in JSON Schema."""


@dataclass(frozen=True)
class Text:
    """Text of one line, not empty; all of it matches ``pattern`` where one is given."""

    max_length: int = 1000
    pattern: str | None = None

    def read(self, node: Located, name: str) -> str:
        if not isinstance(node.value, str):
            hint = " Put it in quotes." if isinstance(node.value, bool | int | float) else ""
            raise InvalidError.at(node, f"{name} must be text, got {node.described}.{hint}")
        if not node.value.strip():
            raise InvalidError.at(node, f"{name} is empty; give a text or leave the key out.")
        if len(node.value) > self.max_length:
            raise InvalidError.at(
                node, f"{name} has {len(node.value)} characters, at most {self.max_length} are allowed."
            )
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in node.value):
            raise InvalidError.at(node, f"{name} has a line break or control character: {shorten(node.value)}.")
        if self.pattern and not re.fullmatch(self.pattern, node.value):
            raise InvalidError.at(node, f"{name} must match {self.pattern}, got {node.described}.")
        return node.value

    def schema(self) -> Schema:
        document: Schema = {"type": "string", "minLength": 1, "maxLength": self.max_length}
        return {**document, "pattern": f"^({self.pattern})$"} if self.pattern else document


@dataclass(frozen=True)
class Regex:
    """A regular expression that compiles."""

    def read(self, node: Located, name: str) -> str:
        text = Text().read(node, name)
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidError.at(node, f"{name} {shorten(text)} is not a regular expression ({error}).") from None
        return text

    def schema(self) -> Schema:
        return {**Text().schema(), "format": "regex"}


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]

    def read(self, node: Located, name: str) -> str:
        if isinstance(node.value, str) and node.value in self.options:
            return node.value
        found = node.value if isinstance(node.value, str) else ""
        match = nearest(found, self.options)
        hint = f" Did you mean {match!r}?" if match else ""
        raise InvalidError.at(node, f"{name} must be one of {', '.join(self.options)}; got {node.described}.{hint}")

    def schema(self) -> Schema:
        return {"enum": list(self.options)}


@dataclass(frozen=True)
class Flag:
    """``true`` or ``false``."""

    def read(self, node: Located, name: str) -> bool:
        if isinstance(node.value, bool):
            return node.value
        raise InvalidError.at(node, f"{name} must be true or false, got {node.described}.")

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Integer:
    """A whole number within bounds, both included."""

    low: int
    high: int

    def read(self, node: Located, name: str) -> int:
        value = node.value
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # 1e3 steps
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidError.at(node, f"{name} must be a whole number, got {node.described}.{_quoted(value)}")
        if not self.low <= value <= self.high:
            raise InvalidError.at(node, f"{name} must be from {self.low} to {self.high}, got {shorten(value)}.")
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


def bytes_of(text: str) -> int | None:
    """Bytes, from a number with a unit or without: 500MB, 2 GiB, 1.5g, 4096; ``None`` for what is no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([kmgt])?(i)?b?)", text.replace(" ", "").lower())
    if found is None or (found[3] and not found[2]) or not float(found[1]) > 0:
        return None
    power = " kmgt".index(found[2] or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


@dataclass(frozen=True)
class Size:
    """A number of bytes, or text such as ``2GB``."""

    def read(self, node: Located, name: str) -> int:
        found = node.value if isinstance(node.value, int) and not isinstance(node.value, bool) else None
        if isinstance(node.value, str):
            found = bytes_of(node.value)
        if found is None or found < 1:
            raise InvalidError.at(
                node, f"{name} must be a size in bytes, or with a unit, such as 500MB or 2GB; got {node.described}."
            )
        return found

    def schema(self) -> Schema:
        return {
            "oneOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^ *[0-9.]+ *[kKmMgGtTiIbB]*$"}]
        }


@dataclass(frozen=True)
class Number:
    """A finite number; ``low`` and ``high`` are included unless ``open_low`` / ``open_high``."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def read(self, node: Located, name: str) -> float:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidError.at(node, f"{name} must be a number, got {node.described}.{_quoted(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        if not (math.isfinite(number) and above and below):
            raise InvalidError.at(node, f"{name} must be {self.range}, got {shorten(value)}.")
        return number

    @property
    def range(self) -> str:
        """The interval in words."""
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.open_high else f"at most {self.high:g}"
        return f"{low} and {high}"

    def schema(self) -> Schema:
        return {
            "type": "number",
            "exclusiveMinimum" if self.open_low else "minimum": self.low,
            "exclusiveMaximum" if self.open_high else "maximum": self.high,
        }


def _quoted(value: object) -> str:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return " Remove the quotes."
    return ""


@dataclass(frozen=True)
class Pair:
    """Two values of one kind."""

    item: Kind

    def read(self, node: Located, name: str) -> tuple[Any, Any]:
        if not isinstance(node.value, tuple) or len(node.value) != 2:
            found = f"{len(node.value)} of them" if isinstance(node.value, tuple) else node.described
            raise InvalidError.at(node, f"{name} must be a list of two values, got {found}.")
        first, second = node.value
        return self.item.read(first, f"{name}[0]"), self.item.read(second, f"{name}[1]")

    def schema(self) -> Schema:
        return {"type": "array", "items": self.item.schema(), "minItems": 2, "maxItems": 2}


@dataclass(frozen=True)
class Arguments:
    """Keyword arguments for the user's own callable: names to scalars or lists of scalars."""

    def read(self, node: Located, name: str) -> dict[str, Any]:
        if not isinstance(node.value, Mapping):
            raise InvalidError.at(node, f"{name} must be a mapping of argument names to values, got {node.described}.")
        issues = [
            Issue(entry.line, f"{name} has {shorten(key)}, which is not a Python argument name.")
            for key, entry in node.value.items()
            if not key.isidentifier()
        ]
        if issues:
            raise InvalidError(issues)
        return {key: plain(entry) for key, entry in node.value.items()}

    def schema(self) -> Schema:
        return {"type": "object", "propertyNames": {"pattern": "^[^\\W\\d]\\w*$"}}


def plain(node: Located) -> Any:
    """The value without its lines."""
    if isinstance(node.value, Mapping):
        return {key: plain(entry) for key, entry in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(item) for item in node.value]
    return node.value
