"""Training as a configuration says it: schedules, tracked runs, ``TrainingArguments`` files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscope.config.keys import LR, SCHEDULE, Arguments, Integer, Key, Kind, Schema, Section, Text, key_of, plain
from zoscope.config.load import (
    Piecewise,
    Schedule,
    StepSizes,
    absolute_spec,
    shown_path,
    step_sizes,
    training_step_sizes,
)
from zoscope.config.sources import ConfigError, InvalidError, Issue, Node, nearest, read_yaml, suggest
from zoscope.errors import UsageError
from zoscope.files import read_text, reason, resolved
from zoscope.options import MOST, Whole, argument, keywords, left_open
from zoscope.registry import OPTIMIZERS

# ruff: noqa: D102 - every kind has the two methods that the protocol documents


@dataclass(frozen=True)
class LearningRate:
    """A number, ``0.001,20000:0.007``, ``auto``, a mapping of steps to numbers, or a schedule."""

    def read(self, node: Node, name: str) -> StepSizes:
        try:
            if isinstance(node.value, str):
                return training_step_sizes(node.value)
            if not isinstance(node.value, Mapping):
                return Schedule("constant", LR.read(node, name))
            if any(key in node.value for key in SCHEDULE.names):
                values = SCHEDULE.read(node, name)
                return Schedule(values["schedule"], values["peak"], values.get("warmup", 0.0))
            starts = [_step(key, entry, name) for key, entry in node.value.items()]
            return step_sizes(starts, [LR.read(entry, f"{name}.{key}") for key, entry in node.value.items()])
        except ValueError as error:
            raise InvalidError.at(node, f"{name}: {error}.") from None

    def schema(self) -> Schema:
        steps = {"type": "object", "patternProperties": {"^[0-9]+$": LR.schema()}, "additionalProperties": False}
        return {"oneOf": [LR.schema(), {"type": "string"}, steps, SCHEDULE.schema()]}


def _step(key: str, entry: Node, name: str) -> int:
    if not key.isdecimal():
        raise InvalidError.at(
            entry,
            f"{name} has the key {key!r}; a mapping is a schedule ({', '.join(SCHEDULE.names)}) or goes from "
            "steps to learning rates, 0 first.",
        )
    return int(key)


@dataclass(frozen=True)
class Interval:
    """``auto``, ``adaptive``, or a number of steps."""

    def read(self, node: Node, name: str) -> int | str:
        if isinstance(node.value, str):
            if node.value not in ("auto", "adaptive"):
                raise InvalidError.at(
                    node, f"{name} must be a number of steps, auto or adaptive; got {node.described}."
                )
            return node.value
        return Integer(1, MOST).read(node, name)

    def schema(self) -> Schema:
        return {"oneOf": [Integer(1, MOST).schema(), {"enum": ["auto", "adaptive"]}]}


@dataclass(frozen=True)
class Grid:
    """Names of options, each with a list of values; ``set.NAME`` is an argument of the spec."""

    def read(self, node: Node, name: str) -> dict[str, list[Any]]:
        if not isinstance(node.value, Mapping) or not node.value:
            raise InvalidError.at(
                node, f"{name} must be a mapping of options to lists of values, got {node.described}."
            )
        issues: list[Issue] = []
        for key, entry in node.value.items():
            try:
                _check_axis(key, entry, name)
            except InvalidError as error:
                issues.extend(error.issues)
        if issues:
            raise InvalidError(issues)
        return {key: plain(entry) for key, entry in node.value.items()}

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}, "minProperties": 1}


def _check_axis(key: str, entry: Node, name: str) -> None:
    if not isinstance(entry.value, tuple) or not entry.value:
        raise InvalidError.at(entry, f"{name}.{key} must be a list of values, got {entry.described}.")
    if key.startswith(SETTING) and key.removeprefix(SETTING).isidentifier():
        return
    if key not in KINDS or key in FIXED:
        raise InvalidError.at(entry, f"{name} has {key!r}, which cannot be varied. {suggest(key, _varied())}")
    for item in entry.value:
        KINDS[key].read(item, f"{name}.{key}")


def _varied() -> list[str]:
    return [key for key in KINDS if key not in FIXED]


SPECIAL: dict[str, Kind] = {"lr": LearningRate(), "every": Interval()}
"""What a file may say in more ways than the command line."""

TRACK = Section(
    (
        key_of("spec", kind=Text(), use="track"),
        Key("problem", Text(), "The same as spec, as zoscope.yaml calls it."),
        key_of("settings", kind=Arguments(), key="set", use="track"),
        *(key_of(name, kind=SPECIAL.get(name), use="track") for name in left_open("track") if name != "settings"),
        Key("sweep", Grid(), "Options with lists of values; one run for each combination."),
    ),
    free_prefix="x-",
)

KINDS: dict[str, Kind] = {key.name: key.kind for key in TRACK.keys}
SETTING = "set."
FIXED = ("spec", "problem", "checkpoint", "set", "run", "sweep")
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+\Z")


def read_track_config(file: Path) -> dict[str, Any]:
    """Read the configuration of a run. Paths in it become absolute.

    Raises:
        ConfigError: With every mistake in the file and its line.
        UsageError: If the file cannot be read.
    """
    try:
        values = TRACK.read(parse_track_config(file), "")
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {file}. Expected a YAML file with options of a run.") from None
    except OSError as error:
        raise UsageError(f"--config: cannot read {file} ({reason(error)}).") from None
    folder = resolved(file).parent
    if "problem" in values:
        if "spec" in values:
            raise UsageError(
                f"{shown_path(file)} has both spec and problem, which mean the same. Leave out one of them."
            )
        values["spec"] = values.pop("problem")
    if "spec" in values:
        values["spec"] = absolute_spec(values["spec"], folder)
    if "checkpoint" in values:
        values["checkpoint"] = os.path.normpath(folder / values["checkpoint"])
    return {key: value for key, value in values.items() if not key.startswith("x-")}


def parse_track_config(file: Path) -> Node:
    """The options in a configuration of a run as they stand there, each of them known to be valid.

    Raises:
        ConfigError: With every mistake in the file and its line.
        UsageError: If it is not text.
        OSError: If the file cannot be read.
    """
    try:
        tree = read_yaml(read_text(file))
        if not isinstance(tree.value, Mapping):
            raise InvalidError.at(
                tree, f"a configuration is a mapping with {', '.join(TRACK.names)}; got {tree.described}."
            )
        TRACK.read(tree, "")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown_path(file)} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except InvalidError as error:
        raise ConfigError(shown_path(file), error.issues) from None
    return tree


def read_track_option(name: str, value: object) -> Any:
    """Check an option of the command line by the same table.

    Args:
        name: Name of the key, such as ``max_hvps``.
        value: Its value, as plain scalars, lists and mappings.

    Raises:
        UsageError: If there is no such key, or the value is wrong.
    """
    if name not in KINDS:
        raise UsageError(f"{name!r} is no option of track. {suggest(name, KINDS)}")
    try:
        return KINDS[name].read(_located(value), f"--{name.replace('_', '-')}")
    except InvalidError as error:
        raise UsageError(error.issues[0].message) from None


def read_sweep(items: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``KEY=V1,V2`` options; values that hold commas are separated by ``;``.

    Raises:
        UsageError: If one has no ``=``, its key cannot be varied, or a value is wrong.
    """
    grid: dict[str, list[Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not text:
            raise UsageError(f"--sweep {item!r}: expected an option and its values, such as beta=0,0.5,0.9.")
        key = key.strip().replace("-", "_")
        if key in grid:
            raise UsageError(f"--sweep: {key} is given twice. Put all of its values into one.")
        parts = text.split(";") if ";" in text else text.split(",")
        grid[key] = [_scalar(key, part.strip()) for part in parts]
    try:
        Grid().read(_located(grid), "--sweep")
    except InvalidError as error:
        raise UsageError(error.issues[0].message.replace("--sweep.", "--sweep ", 1)) from None
    return grid


def _scalar(key: str, text: str) -> Any:
    """A value of the command line as a configuration file would hold it."""
    if key == "lr":
        return text
    if key == "betas":
        return [_scalar("", part) for part in text.split(",")]
    return float(text) if _EXPONENT.match(text) else plain(read_yaml(text)) if text else text


def read_axis(key: str, values: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The values of an option that is varied, checked, and as text."""
    labels = [_label(value) for value in values]
    if key.startswith(SETTING):
        return list(values), labels
    checked = [read_track_option(key, value) for value in values]
    return checked, labels


def _label(value: Any) -> str:
    return (
        ",".join(map(_label, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def plain_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as a configuration file holds them."""

    def written(value: Any) -> Any:
        if isinstance(value, Schedule | Piecewise):
            return value.to_config()
        return list(value) if isinstance(value, tuple) else value

    return {key: written(value) for key, value in values.items() if value is not None}


def _located(value: object) -> Node:
    if isinstance(value, Mapping):
        return Node({str(key): _located(item) for key, item in value.items()}, None)
    if isinstance(value, list | tuple):
        return Node(tuple(_located(item) for item in value), None)
    return Node(value, None)


SCHEDULERS = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "reduce_lr_on_plateau": "constant",
    "inverse_sqrt": "linear",
    "linear": "linear",
    "polynomial": "linear",
    "warmup_stable_decay": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
}
"""``lr_scheduler_type`` and the shape that stands for it: all of them peak at ``learning_rate``."""

TRAINERS = {alias: f"zo-{name}" for name, record in OPTIMIZERS.items() for alias in record.aliases}
FO_OPTIMIZERS = {alias: name for name, record in OPTIMIZERS.items() for alias in record.gradient_aliases}
DEFAULT_BATCH = 8.0
"""``per_device_train_batch_size`` of ``TrainingArguments``."""

MODES = ("two_side", "one_side")


@dataclass(frozen=True)
class HfArguments:
    """What an arguments file says, as a piece of configuration.

    Args:
        tree: Overrides for a check.
        notices: What the file asks for and the theory has to say something about.
    """

    tree: Node
    notices: tuple[str, ...] = ()


def load_hf_args(file: Path) -> HfArguments:
    """Read ``learning_rate``, ``zo_eps``, ``lr_scheduler_type``, ``perturbation_mode``, ``q`` and their kin.

    A batch is what one step of the optimizer sees on one device: ``gradient_accumulation_steps`` of them make one.

    Raises:
        ConfigError: With every value that cannot be used and its line.
        UsageError: If the file cannot be read.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--hf-args: cannot read {file} ({why}). Expected a JSON or YAML file.") from None
    try:
        tree = _read_json(text) if file.suffix == ".json" else read_yaml(text)
        if not isinstance(tree.value, Mapping):
            raise InvalidError.at(tree, f"expected a mapping of training arguments, got {tree.described}.")
        return _Translator(tree.value).translate()
    except InvalidError as error:
        raise ConfigError(str(file), error.issues) from None


def plan_arguments(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What an arguments file says of a run, as keyword arguments of ``zoscope.plan``, and its notices.

    Raises:
        ConfigError: With every value that cannot be used and its line.
        UsageError: If the file cannot be read, or training there follows gradients.
    """
    arguments = load_hf_args(file)
    tree = plain(arguments.tree)
    found = {**tree.get("optimizer", {}), **tree.get("estimator", {})}
    if "steps" in tree:
        found["steps"] = tree["steps"]
    rate = found.pop("lr", None)
    if isinstance(rate, Mapping):
        found |= {name: rate[name] for name in ("schedule", "warmup") if name in rate}
    if "name" in found:
        found["optimizer"] = found.pop("name")
    checked: dict[str, Any] = {}
    for name, value in found.items():
        option = argument("plan", name)
        whole = isinstance(option.domain, Whole) and isinstance(value, float) and value.is_integer()
        checked[name] = int(value) if whole else tuple(value) if isinstance(value, list) else value
    try:
        keywords("plan", checked)
    except ValueError as error:
        raise UsageError(f"--hf-args: {file}: {error}.") from None
    return checked, arguments.notices


def _read_json(text: str) -> Node:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
        raise InvalidError([Issue(line, f"not valid JSON: {reason}.")]) from None
    if not isinstance(data, dict):
        return Node(data if not isinstance(data, list) else tuple(data), 1)
    return Node({key: Node(value, _json_line(text, key)) for key, value in data.items()}, 1)


def _json_line(text: str, key: str) -> int | None:
    found = re.search(re.escape(json.dumps(key)) + r"\s*:", text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


class _Translator:
    def __init__(self, entries: Mapping[str, Node]) -> None:
        self._entries = entries
        self._issues: list[Issue] = []
        self._notices: list[str] = []

    def translate(self) -> HfArguments:
        optimizer = self._optimizer()
        tree: dict[str, Any] = {
            "optimizer": {
                "name": optimizer,
                "lr": self._lr(),
                "beta": self._momentum(),
                "betas": self._betas(),
                "eps": self._number("adam_epsilon"),
                "weight_decay": self._weight_decay(optimizer),
            },
            "estimator": {
                "queries": self._number("q", "zo_sample"),
                "mu": self._number("zo_eps"),
                "batch_size": self._batch_size(),
            },
            "steps": self._steps(),
        }
        self._mode()
        self._beside_the_rule(optimizer)
        if self._issues:
            raise InvalidError(self._issues)
        pruned = _prune(tree)
        return HfArguments(pruned if isinstance(pruned, Node) else Node({}, None), tuple(self._notices))

    def _text(self, name: str) -> tuple[str, Node] | None:
        node = self._entries.get(name)
        return None if node is None or not isinstance(node.value, str) else (node.value, node)

    def _number(self, *names: str) -> Node | None:
        """The first of ``names`` that is there; numbers in quotes count, as command-line dumps have them."""
        for name in names:
            node = self._entries.get(name)
            if node is None or node.value is None:
                continue
            value = node.value
            if isinstance(value, str):
                with contextlib.suppress(ValueError):
                    value = float(value)
            if isinstance(value, bool) or not isinstance(value, int | float):
                self._issues.append(Issue(node.line, f"{name} must be a number, got {node.described}."))
                return None
            return Node(value, node.line)
        return None

    def _batch_size(self) -> Node | None:
        """Examples of one step of the optimizer on one device; how many devices there are no such file says."""
        size, pieces = self._number("per_device_train_batch_size"), self._number("gradient_accumulation_steps")
        if pieces is None or _as_float(pieces) == 1:
            return size
        if not (_as_float(pieces) >= 1 and _as_float(pieces).is_integer()):
            self._issues.append(
                Issue(pieces.line, f"gradient_accumulation_steps must be a whole number ≥ 1, got {pieces.described}.")
            )
            return None
        each = DEFAULT_BATCH if size is None else _as_float(size)
        if not each.is_integer():
            return size  # what a batch size must be is said where it is checked
        both = f"{each:,.0f} examples{' (the default)' if size is None else ''}"
        self._notices.append(
            f"A step sees gradient_accumulation_steps × {both} = {_as_float(pieces) * each:,.0f} on each device."
        )
        return Node(int(_as_float(pieces) * each), pieces.line)

    def _steps(self) -> Node | None:
        node = self._number("max_steps")
        return node if node is not None and _as_float(node) > 0 else None  # -1: by epochs

    def _momentum(self) -> Node | None:
        node = self._number("momentum")
        return node if node is not None and _as_float(node) != 0 else None

    def _betas(self) -> Node | None:
        first, second = self._number("adam_beta1"), self._number("adam_beta2")
        return None if first is None or second is None else Node((first, second), first.line)

    def _weight_decay(self, optimizer: Node | None) -> Node | None:
        """That of the rules whose thresholds have it; of others it is said."""
        node = self._number("weight_decay")
        if node is None or not _as_float(node) > 0:
            return None
        record = OPTIMIZERS.get("" if optimizer is None else str(optimizer.value).removeprefix("zo-"))
        if record is not None and "weight_decay" in record.options:
            return node
        self._notices.append(
            f"weight_decay {_as_float(node):g} is not in the thresholds: it adds to them where it is not small beside "
            "the curvature."
        )
        return None

    def _beside_the_rule(self, optimizer: Node | None) -> None:
        """Say what else of training the thresholds do not know."""
        clip, smoothing = self._number("max_grad_norm"), self._number("label_smoothing_factor")
        if clip is not None and _as_float(clip) > 0 and not (optimizer and str(optimizer.value).startswith("zo-")):
            self._notices.append(
                f"max_grad_norm is {_as_float(clip):g}: longer gradients are clipped, and thresholds are for steps "
                "that are not."
            )
        if smoothing is not None and _as_float(smoothing) > 0:
            self._notices.append(
                f"label_smoothing_factor is {_as_float(smoothing):g}: the loss of the spec must smooth its labels too."
            )
        for name in ("bf16", "fp16"):
            node = self._entries.get(name)
            if node is not None and node.value is True:
                self._notices.append(f"{name} is on: training rounds where the thresholds, of float32, do not.")

    def _lr(self) -> Node | None:
        rate = self._number("learning_rate")
        found = self._text("lr_scheduler_type")
        if rate is None:
            return None
        warmup = self._warmup()
        if found is None and warmup is None:
            return rate
        kind = "linear" if found is None else SCHEDULERS.get(found[0])
        if kind is None and found is not None:
            self._unknown("lr_scheduler_type", found, tuple(SCHEDULERS))
            return None
        line = rate.line if found is None else found[1].line
        schedule = {"schedule": Node(kind, line), "peak": rate}
        return Node(schedule | ({"warmup": warmup} if warmup is not None else {}), rate.line)

    def _warmup(self) -> Node | None:
        for name in ("warmup_steps", "warmup_ratio"):
            node = self._number(name)
            if node is not None and _as_float(node) > 0:
                return node
        return None

    def _optimizer(self) -> Node | None:
        found = self._text("trainer")
        if found is None or found[0] == "none":
            return None
        trainer, node = found
        if trainer == "regular":
            return self._first_order(node)
        if trainer not in TRAINERS:
            self._unknown("trainer", found, (*TRAINERS, "regular"))
            return None
        name = TRAINERS[trainer]
        return Node("zo-gdm" if name == "zo-gd" and self._momentum() is not None else name, node.line)

    def _first_order(self, trainer: Node) -> Node | None:
        found = self._text("optimizer") or self._text("optim") or ("adamw", trainer)
        if found[0] not in FO_OPTIMIZERS:
            self._unknown("optim", found, tuple(FO_OPTIMIZERS))
            return None
        name = FO_OPTIMIZERS[found[0]]
        return Node("gdm" if name == "gd" and self._momentum() is not None else name, found[1].line)

    def _mode(self) -> None:
        found = self._text("perturbation_mode")
        if found is None:
            return
        if found[0] not in MODES:
            self._unknown("perturbation_mode", found, MODES)
        elif found[0] == "one_side":
            self._notices.append(
                "perturbation_mode is one_side: the estimate f(x+μu) − f(x) adds a noise of order μ that the two-sided "
                "theory leaves out; the threshold holds for small zo_eps."
            )

    def _unknown(self, name: str, found: tuple[str, Node], options: tuple[str, ...]) -> None:
        match = nearest(found[0], options)
        hint = f"Did you mean {match!r}?" if match else f"Known: {', '.join(options)}."
        self._issues.append(Issue(found[1].line, f"{name} {found[1].described} has no stability theory here. {hint}"))


def _as_float(node: Node) -> float:
    return float(node.value) if isinstance(node.value, int | float) else math.nan


def _prune(tree: object) -> Node | None:
    """Nested plain mappings to ``Node`` ones, without what is ``None``."""
    if isinstance(tree, Node) or tree is None:
        return tree
    if not isinstance(tree, Mapping):
        return Node(tree, None)
    kept = {name: node for name, item in tree.items() if (node := _prune(item)) is not None}
    return Node(kept, None) if kept else None
