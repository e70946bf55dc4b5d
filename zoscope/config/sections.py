# ruff: noqa: D102 - every kind has the two methods that the protocol documents
"""Kinds of values that hold others: sections with a fixed set of keys, and lists of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoscope.config.kinds import Kind, Schema
from zoscope.config.located import InvalidError, Issue, Located, shorten, suggest


@dataclass(frozen=True)
class OneOf:
    """A scalar of one kind, or a section."""

    scalar: Kind
    section: Section

    def read(self, node: Located, name: str) -> Any:
        kind: Kind = self.section if isinstance(node.value, Mapping) else self.scalar
        return kind.read(node, name)

    def schema(self) -> Schema:
        return {"oneOf": [self.scalar.schema(), self.section.schema()]}


@dataclass(frozen=True)
class Key:
    """A key of a section: its kind, what it is for, and the default that applies where nothing is said."""

    name: str
    kind: Kind
    doc: str
    default: object = None
    required: bool = False


@dataclass(frozen=True)
class Section:
    """A mapping with a fixed set of keys.

    Args:
        keys: What may stand in it.
        free_prefix: Keys that start with this are left alone: a place for anchors.
    """

    keys: tuple[Key, ...]
    free_prefix: str | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(key.name for key in self.keys))

    def read(self, node: Located, name: str) -> dict[str, Any]:
        if not isinstance(node.value, Mapping):
            raise InvalidError.at(node, f"{name} must be a mapping with {', '.join(self.names)}; got {node.described}.")
        issues = self._unknown(node.value, name)
        values: dict[str, Any] = {}
        for key in self.keys:
            if key.name in node.value:
                try:
                    values[key.name] = key.kind.read(node.value[key.name], f"{name}.{key.name}" if name else key.name)
                except InvalidError as error:
                    issues.extend(error.issues)
            elif key.required and not issues:  # a misspelt key would be reported twice
                issues.append(Issue(node.line, f"{name} lacks {key.name!r}: {key.doc}"))
        if issues:
            raise InvalidError(issues)
        return values

    def _unknown(self, entries: Mapping[str, Located], name: str) -> list[Issue]:
        place = f" in {name}" if name else ""
        return [
            Issue(entry.line, f"unknown key {shorten(key)}{place}. {suggest(key, self.names)}")
            for key, entry in entries.items()
            if key not in self.names and not (self.free_prefix and key.startswith(self.free_prefix))
        ]

    def schema(self) -> Schema:
        properties = {}
        for key in self.keys:
            properties[key.name] = {"description": key.doc, **key.kind.schema()}
            if key.default is not None:
                properties[key.name]["default"] = key.default
        document: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        if self.free_prefix:
            document["patternProperties"] = {f"^{self.free_prefix}": {}}
        if required := [key.name for key in self.keys if key.required]:
            document["required"] = required
        return document


@dataclass(frozen=True)
class ListOf:
    """A list of sections; each result is a pair of the line and the values."""

    section: Section
    max_items: int = 200

    def read(self, node: Located, name: str) -> list[tuple[int | None, dict[str, Any]]]:
        if not isinstance(node.value, tuple):
            raise InvalidError.at(
                node, f"{name} must be a list, each entry starting with '- name:'; got {node.described}."
            )
        if not node.value or len(node.value) > self.max_items:
            count = len(node.value)
            raise InvalidError.at(node, f"{name} must have from 1 to {self.max_items} entries, it has {count}.")
        issues: list[Issue] = []
        entries = []
        for index, item in enumerate(node.value):
            try:
                entries.append((item.line, self.section.read(item, f"{name}[{index}]")))
            except InvalidError as error:
                issues.extend(error.issues)
        if issues:
            raise InvalidError(issues)
        return entries

    def schema(self) -> Schema:
        return {"type": "array", "items": self.section.schema(), "minItems": 1, "maxItems": self.max_items}
