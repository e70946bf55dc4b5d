# ruff: noqa: D102 - every kind has the two methods that the protocol documents
"""The configuration of a tracked run: one table of keys for the file and for the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscope.config.build import absolute_spec
from zoscope.config.keys import CURVATURE, ESTIMATOR, HVPS, OPTIMIZER, SCHEDULE
from zoscope.config.kinds import Arguments, Choice, Integer, Kind, Number, Regex, Schema, Text, plain
from zoscope.config.load import shown_path
from zoscope.config.located import ConfigError, InvalidError, Issue, Located, suggest
from zoscope.config.schedule import Piecewise, Schedule, StepSizes, parse_step_sizes, step_sizes
from zoscope.config.sections import Key, Section
from zoscope.config.yaml_reader import read_yaml
from zoscope.errors import UsageError

_LR = Number(0.0, 1e9, open_low=True)
_MOST = 1_000_000_000


@dataclass(frozen=True)
class LearningRate:
    """A number, ``0.001,20000:0.007``, a mapping of steps to numbers, or a schedule."""

    def read(self, node: Located, name: str) -> StepSizes:
        try:
            if isinstance(node.value, str):
                return parse_step_sizes(node.value)
            if not isinstance(node.value, Mapping):
                return Schedule("constant", _LR.read(node, name))
            if any(key in node.value for key in SCHEDULE.names):
                values = SCHEDULE.read(node, name)
                return Schedule(values["schedule"], values["peak"], values.get("warmup", 0.0))
            starts = [_step(key, entry, name) for key, entry in node.value.items()]
            return step_sizes(starts, [_LR.read(entry, f"{name}.{key}") for key, entry in node.value.items()])
        except ValueError as error:
            raise InvalidError.at(node, f"{name}: {error}.") from None

    def schema(self) -> Schema:
        steps = {"type": "object", "patternProperties": {"^[0-9]+$": _LR.schema()}, "additionalProperties": False}
        return {"oneOf": [_LR.schema(), {"type": "string"}, steps, SCHEDULE.schema()]}


def _step(key: str, entry: Located, name: str) -> int:
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

    def read(self, node: Located, name: str) -> int | str:
        if isinstance(node.value, str):
            if node.value not in ("auto", "adaptive"):
                raise InvalidError.at(
                    node, f"{name} must be a number of steps, auto or adaptive; got {node.described}."
                )
            return node.value
        return Integer(1, _MOST).read(node, name)

    def schema(self) -> Schema:
        return {"oneOf": [Integer(1, _MOST).schema(), {"enum": ["auto", "adaptive"]}]}


def _taken(section: Section, *names: str) -> tuple[Key, ...]:
    return tuple(key for key in section.keys if key.name in names)


@dataclass(frozen=True)
class Grid:
    """Names of options, each with a list of values; ``set.NAME`` is an argument of the spec."""

    def read(self, node: Located, name: str) -> dict[str, list[Any]]:
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


def _check_axis(key: str, entry: Located, name: str) -> None:
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


TRACK = Section(
    (
        Key("spec", Text(), "path/to/model.py[:name] or package.module:name; paths are relative to this file."),
        Key("set", Arguments(), "Keyword arguments for the callable that the spec names."),
        Key("checkpoint", Text(), "State dict to start from: .pt or .safetensors, relative to this file."),
        Key("params", Regex(), "Regular expression that selects parameters by name."),
        Key("optimizer", Choice(("gd", "gdm", "adam", "zo-gd", "zo-gdm", "zo-adam")), "Optimizer.", "zo-gd"),
        Key("lr", LearningRate(), "Step size: a number, steps with numbers, or a schedule."),
        Key("steps", Integer(1, _MOST), "Steps to train.", 1000),
        Key("every", Interval(), "Steps between measurements: a number, auto or adaptive.", "auto"),
        *_taken(OPTIMIZER, "beta", "betas", "eps"),
        *_taken(ESTIMATOR, "directions", "queries", "mu", "batch_size"),
        Key("target_loss", Number(-1e300, 1e300), "Stop at this loss."),
        Key("divergence", Number(1.0, 1e300, open_low=True), "Stop at this multiple of the first loss.", 1e6),
        Key("max_seconds", Number(0.0, 1e12, open_low=True), "Stop after so long; the run can be resumed."),
        Key("checkpoint_every", Integer(1, _MOST), "Steps between checkpoints, besides those at measurements."),
        Key("forward_every", Integer(1, _MOST), "Steps between observations from loss values alone."),
        Key("rtol", Number(0.0, 1.0, open_low=True, open_high=True), "Half-width wanted of every measurement.", 0.05),
        Key("max_hvps", Integer(1, 10_000_000), "Most Hessian-vector products of a measurement.", 150),
        Key("curvature", Choice(("hessian", "ggn")), "Curvature matrix.", "hessian"),
        *_taken(CURVATURE, "method", "device", "dtype", "seed", "micro_batch", "max_memory"),
        Key(
            "hvp",
            Choice(HVPS),
            "How Hessian-vector products are computed.",
            "auto",
        ),
        Key("run", Text(), "Folder of the run, relative to the working folder."),
        Key("sweep", Grid(), "Options with lists of values; one run for each combination."),
    ),
    free_prefix="x-",
)

KINDS: dict[str, Kind] = {key.name: key.kind for key in TRACK.keys}
SETTING = "set."
FIXED = ("spec", "checkpoint", "set", "run", "sweep")
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+\Z")


def read_track_config(file: Path) -> dict[str, Any]:
    """Read the configuration of a run. Paths in it become absolute.

    Raises:
        ConfigError: With every mistake in the file and its line.
        UsageError: If the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"--config: there is no file {file}. Expected a YAML file with options of a run.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown_path(file)} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"--config: cannot read {file} ({error.strerror}).") from None
    try:
        tree = read_yaml(text)
        if not isinstance(tree.value, Mapping):
            raise InvalidError.at(
                tree, f"a configuration is a mapping with {', '.join(TRACK.names)}; got {tree.described}."
            )
        values = TRACK.read(tree, "")
    except InvalidError as error:
        raise ConfigError(shown_path(file), error.issues) from None
    folder = file.resolve().parent
    if "spec" in values:
        values["spec"] = absolute_spec(values["spec"], folder)
    if "checkpoint" in values:
        values["checkpoint"] = os.path.normpath(folder / values["checkpoint"])
    return {key: value for key, value in values.items() if not key.startswith("x-")}


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


def _located(value: object) -> Located:
    if isinstance(value, Mapping):
        return Located({str(key): _located(item) for key, item in value.items()}, None)
    if isinstance(value, list | tuple):
        return Located(tuple(_located(item) for item in value), None)
    return Located(value, None)
