"""Kinds of values: each reads a located value or says what is wrong with it, and describes itself in JSON Schema."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Protocol

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
class Integer:
    """A whole number within bounds, both included."""

    low: int
    high: int

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

    def read(self, node: Node, name: str) -> int:
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

    def read(self, node: Node, name: str) -> float:
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


OPTIMIZERS = ("gd", "gdm", "adam", "zo-gd", "zo-gdm", "zo-adam")
THRESHOLDS = ("binding", "exact", "descent", "horizon")
SCHEDULES = ("constant", "linear", "cosine")

_LR = Number(0.0, 1e9, open_low=True)
_UNIT = Number(0.0, 1.0, open_low=True, open_high=True)
_BETA = Number(0.0, 1.0, open_high=True)
_PRECONDITIONER = Text(pattern=r"expected|state:.+")
_SPEC_DOC = "path/to/model.py, path/to/model.py:name or package.module:name; paths are relative to this file."

SCHEDULE = Section(
    (
        Key("schedule", Choice(SCHEDULES), "Shape of the learning-rate schedule.", required=True),
        Key("peak", _LR, "Highest learning rate of the schedule; the one that is checked.", required=True),
        Key("warmup", Number(0.0, 1e9), "Warm-up: steps, or a fraction of the steps when below 1.", 0),
    )
)

OPTIMIZER = Section(
    (
        Key("name", Choice(OPTIMIZERS), "Optimizer; the zo- ones estimate gradients from loss values."),
        Key("lr", OneOf(_LR, SCHEDULE), "Learning rate, or a schedule of which the peak is checked."),
        Key("beta", _BETA, "Momentum of gdm.", 0.9),
        Key("betas", Pair(_BETA), "Decay rates of Adam.", [0.9, 0.999]),
        Key("eps", Number(0.0, 1.0, open_low=True), "Adam's epsilon.", 1e-8),
    )
)

ESTIMATOR = Section(
    (
        Key("directions", Choice(("gaussian", "sphere")), "Law of the perturbation directions.", "gaussian"),
        Key("queries", Integer(1, 1_000_000), "Directions averaged per step.", 1),
        Key("mu", Number(0.0, 1e3, open_low=True), "Perturbation scale of the two-point estimate.", 1e-3),
        Key("batch_size", Integer(1, 2**31), "Examples per step of training, where that is fewer than the data."),
    )
)

HVPS = ("auto", "double-backward", "batched", "forward-over-reverse", "linearize")

CURVATURE = Section(
    (
        Key(
            "rtol",
            Number(0.0, 1.0, open_low=True, open_high=True),
            "Relative 95 % half-width wanted for the threshold.",
            0.02,
        ),
        Key("max_hvps", Integer(1, 10_000_000), "Budget of Hessian-vector products.", 600),
        Key("kind", Choice(("hessian", "ggn", "forward")), "Curvature matrix, or loss values only.", "hessian"),
        Key("method", Choice(("auto", "dense", "deflated-slq")), "How the spectrum is measured.", "auto"),
        Key("hvp", Choice(HVPS), "How Hessian-vector products are computed.", "auto"),
        Key("device", Text(32, pattern=r"auto|cpu|cuda(:[0-9]+)?"), "auto, cpu, cuda or cuda:N.", "auto"),
        Key("dtype", Choice(("auto", "float32", "float64", "bfloat16")), "Floating-point type.", "auto"),
        Key("seed", Integer(0, 2**63 - 1), "Seed of the probe vectors.", 0),
        Key(
            "preconditioner",
            Text(pattern=r"expected|state:.+"),
            "Adam's preconditioner: expected, or state:FILE.",
            "expected",
        ),
        Key("micro_batch", Integer(1, 2**31), "Most examples in memory at once."),
        Key("max_memory", Size(), "Most bytes that the process may hold, or text such as 2GB."),
        Key("shard_basis", Flag(), "With torchrun: spread the Lanczos vectors over the processes.", False),
        Key("strict", Flag(), "Fail when the wanted precision is not reached.", False),
    )
)

POLICY = Section(
    (
        Key("threshold", Choice(THRESHOLDS), "Which threshold a zo- optimizer is held against.", "binding"),
        Key("margin", Number(0.0, 1.0, open_low=True), "Pass when lr <= margin x lower end of the 95 % interval.", 0.8),
        Key("on_warn", Choice(("pass", "fail")), "What an lr between the margin and the upper end does.", "pass"),
        Key("probe", Flag(), "Also run a short training probe at this lr.", False),
    )
)

_SHARED = (
    Key("spec", Text(), _SPEC_DOC),
    Key("set", Arguments(), "Keyword arguments for the callable that the spec names."),
    Key("checkpoint", Text(), "State dict to load: .pt or .safetensors, relative to this file."),
    Key("params", Regex(), "Regular expression that selects parameters by name."),
    Key("optimizer", OPTIMIZER, "The optimizer that training will use."),
    Key("steps", Integer(1, 1_000_000_000), "Training steps planned: the horizon.", 1000),
    Key("estimator", ESTIMATOR, "The zeroth-order gradient estimate."),
    Key("curvature", CURVATURE, "How the curvature is measured."),
    Key("policy", POLICY, "When the check passes."),
)

DEFAULTS = Section(_SHARED)
CHECK = Section((Key("name", Text(200), "Name of the check, unique in the file.", required=True), *_SHARED))

ROOT = Section(
    (
        Key("problem", Text(), f"Spec used where none is given: {_SPEC_DOC}"),
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
        **{name: ("optimizer", name) for name in ("lr", "beta", "betas", "eps")},
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
    """The schema as it ships, for editors: ``zoscope check --schema > zoscope.schema.json``."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema() -> str:
    """The copy inside the package."""
    return files("zoscope.config").joinpath("schema.json").read_text(encoding="utf-8")
