"""Kinds of values: each reads a located value or says what is wrong with it, and describes itself in JSON Schema."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from zoscope import options
from zoscope.config.sources import InvalidError, Issue, Node, nearest, shorten, suggest

# ruff: noqa: D102 - every kind has the two methods that the protocol documents


Schema = dict[str, Any]


class Kind(Protocol):
    """What a key accepts."""

    def read(self, node: Node, name: str) -> Any:
        """The value as Python sees it; ``InvalidError`` names ``name``, what was found and what is expected."""

    def schema(self) -> Schema:
        """The same rule in JSON Schema."""


@dataclass(frozen=True)
class Text:
    """Text of one line, not empty; all of it matches ``pattern`` where one is given."""

    max_length: int = 1000
    pattern: str | None = None

    def read(self, node: Node, name: str) -> str:
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

    def read(self, node: Node, name: str) -> str:
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

    def read(self, node: Node, name: str) -> str:
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

    def read(self, node: Node, name: str) -> bool:
        if isinstance(node.value, bool):
            return node.value
        raise InvalidError.at(node, f"{name} must be true or false, got {node.described}.")

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Integer(options.Whole):
    """A whole number within bounds, both included."""

    def read(self, node: Node, name: str) -> int:
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


@dataclass(frozen=True)
class Size:
    """A number of bytes, or text such as ``2GB``."""

    def read(self, node: Node, name: str) -> int:
        found = node.value if isinstance(node.value, int) and not isinstance(node.value, bool) else None
        if isinstance(node.value, str):
            found = options.bytes_of(node.value)
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
class Number(options.Real):
    """A finite number in a range."""

    def read(self, node: Node, name: str) -> float:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidError.at(node, f"{name} must be a number, got {node.described}.{_quoted(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not self.contains(number):
            raise InvalidError.at(node, f"{name} must be {self.range}, got {shorten(value)}.")
        return number

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

    def read(self, node: Node, name: str) -> tuple[Any, Any]:
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

    def read(self, node: Node, name: str) -> dict[str, Any]:
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


def plain(node: Node) -> Any:
    """The value without its lines."""
    if isinstance(node.value, Mapping):
        return {key: plain(entry) for key, entry in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(item) for item in node.value]
    return node.value


# ruff: noqa: D102 - every kind has the two methods that the protocol documents


@dataclass(frozen=True)
class OneOf:
    """A scalar of one kind, or a section."""

    scalar: Kind
    section: Section

    def read(self, node: Node, name: str) -> Any:
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

    def read(self, node: Node, name: str) -> dict[str, Any]:
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

    def _unknown(self, entries: Mapping[str, Node], name: str) -> list[Issue]:
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

    def read(self, node: Node, name: str) -> list[tuple[int | None, dict[str, Any]]]:
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


def kind_of(domain: options.Domain) -> Kind:
    """What reads the values that an option takes."""
    if isinstance(domain, options.Words):
        return Choice(domain.names)
    if isinstance(domain, options.Whole):
        return Integer(domain.low, domain.high)
    if isinstance(domain, options.Real):
        return Number(domain.low, domain.high, domain.open_low, domain.open_high)
    if isinstance(domain, options.Flag):
        return Flag()
    form = getattr(domain, "form", "")
    if isinstance(domain, options.Text) and form not in FORMS:
        return Text(domain.max_length, domain.pattern)
    return FORMS[form]


def key_of(name: str, *, kind: Kind | None = None, key: str = "", use: str = "file") -> Key:
    """The key of a file for an option of the table.

    Args:
        name: Name of the option.
        kind: What reads it, where a file may say more than the command line.
        key: Its name in a file, where it has another one there.
        use: The command whose options these are.
    """
    option = options.OPTIONS[name].of(use)
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    return Key(key or name, kind or kind_of(option.domain), option.help, default)


def _keys(names: str) -> tuple[Key, ...]:
    return tuple(map(key_of, names.split()))


LR, BETA = kind_of(options.LR), kind_of(options.MOMENTUM)
FORMS: dict[str, Kind] = {"regex": Regex(), "size": Size(), "pair": Pair(BETA)}

SCHEDULE = Section(
    (
        Key("schedule", Choice(options.SCHEDULES), "Shape of the learning-rate schedule.", required=True),
        Key("peak", LR, "Highest learning rate of the schedule; the one that is checked.", required=True),
        Key("warmup", Number(0.0, 1e9, open_low=False), "Warm-up: steps, or a fraction of the steps when below 1.", 0),
    )
)
OPTIMIZER = Section(
    (
        key_of("optimizer", key="name"),
        key_of("lr", kind=OneOf(LR, SCHEDULE)),
        *_keys("beta dampening weight_decay betas eps"),
    )
)
ESTIMATOR = Section(_keys("directions differences queries mu batch_size"))
CURVATURE = Section(
    (
        *_keys("rtol max_hvps"),
        key_of("curvature", key="kind"),
        *_keys("method hvp device dtype seed preconditioner micro_batch max_memory shard_basis strict"),
    )
)
POLICY = Section(_keys("threshold margin on_warn probe"))

_SHARED = (
    key_of("spec"),
    key_of("settings", kind=Arguments(), key="set"),
    *_keys("checkpoint params"),
    Key("optimizer", OPTIMIZER, "The optimizer that training will use."),
    key_of("steps"),
    Key("estimator", ESTIMATOR, "The zeroth-order gradient estimate."),
    Key("curvature", CURVATURE, "How the curvature is measured."),
    Key("policy", POLICY, "When the check passes."),
)

DEFAULTS = Section(_SHARED)
CHECK = Section((Key("name", Text(200), "Name of the check, unique in the file.", required=True), *_SHARED))

ROOT = Section(
    (
        Key("problem", Text(), f"Spec used where none is given: {key_of('spec').doc}"),
        Key("spec", Text(), "The same as problem, as the file of zoscope track calls it."),
        Key("defaults", DEFAULTS, "Values that every check starts from."),
        Key("checks", ListOf(CHECK), "The checks; every one runs."),
    ),
    free_prefix="x-",
)

OPTIONS = MappingProxyType(
    {
        "spec": ("spec",),
        "settings": ("set",),
        "checkpoint": ("checkpoint",),
        "params": ("params",),
        "optimizer": ("optimizer", "name"),
        "steps": ("steps",),
        **{name: ("optimizer", name) for name in OPTIMIZER.names if name != "name"},
        **{name: ("estimator", name) for name in ESTIMATOR.names},
        **{name: ("curvature", name) for name in CURVATURE.names if name != "kind"},
        "curvature": ("curvature", "kind"),
        **{name: ("policy", name) for name in POLICY.names},
    }
)
"""Options of the command line and of ``zoscope.check``, and the key that each one overrides."""


def config_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``zoscope.yaml`` and of ``[tool.zoscope]``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "zoscope configuration",
        "description": "Step-size checks for zeroth-order and first-order training.",
        **ROOT.schema(),
    }


def schema_text() -> str:
    """The schema for editors: ``zoscope check --schema > zoscope.schema.json``."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
