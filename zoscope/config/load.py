"""Checks and schedules as a configuration file says them."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from zoscope.config.keys import CHECK, DEFAULTS, OPTIONS, ROOT, OneOf, Section
from zoscope.config.sources import ConfigError, InvalidError, Issue, Node, read_pyproject, read_yaml, shorten, suggest
from zoscope.errors import UsageError
from zoscope.files import read_text, reason, resolved
from zoscope.registry import family_of, is_zeroth_order


class StepSizes(Protocol):
    """A step size for every step of a run."""

    @property
    def peak(self) -> float:
        """The largest one."""

    def lr_at(self, step: int, *, steps: int) -> float:
        """Step size of the step that starts at ``step`` (from 0) in a run of ``steps`` steps; above 0."""

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """Steps at which it jumps."""

    def to_config(self) -> Any:
        """The same as a value of a configuration file."""


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule.

    Args:
        kind: ``constant``, ``linear`` or ``cosine``.
        peak: Highest learning rate, param²/loss; the one that is checked.
        warmup: Warm-up in steps, or as a fraction of the steps when below 1.
    """

    kind: str
    peak: float
    warmup: float = 0.0

    def warmup_steps(self, steps: int) -> int:
        """Length of the warm-up of a run of ``steps`` steps."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    def describe(self) -> str | None:
        """What to say beside the peak; ``None`` for a plain number."""
        if self.kind == "constant" and not self.warmup:
            return None
        warmup = f", warm-up {self.warmup:g}" if self.warmup else ""
        return f"peak of a {self.kind} schedule{warmup}"

    def lr_at(self, step: int, *, steps: int) -> float:
        """See `StepSizes.lr_at`: rises linearly to the peak in the warm-up, then falls towards 0 after the last step.

        No step has size 0: the first of w warm-up steps takes ``peak/w``, the last of n falling ones ``peak/n``
        (linear).
        """
        warmup = self.warmup_steps(steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.kind == "constant":
            return self.peak
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return self.peak * (1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """See `StepSizes.changes`; none."""
        return ()

    def to_config(self) -> Any:
        """See `StepSizes.to_config`."""
        if self.kind == "constant" and not self.warmup:
            return self.peak
        return {"schedule": self.kind, "peak": self.peak, "warmup": self.warmup}


@dataclass(frozen=True)
class Piecewise:
    """A step size that jumps: ``values[i]`` from step ``starts[i]`` on.

    Args:
        starts: Steps, rising, 0 first.
        values: Step sizes, param²/loss.

    Raises:
        ValueError: If they do not fit together.
    """

    starts: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.starts or self.starts[0] != 0 or len(self.starts) != len(self.values):
            raise ValueError("a piecewise step size needs one value per start, the first at step 0")
        if any(later <= earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError(f"the steps at which it changes must rise, got {', '.join(map(str, self.starts))}")
        for value in self.values:
            _require_lr(value)

    @property
    def peak(self) -> float:
        """The largest one."""
        return max(self.values)

    def lr_at(self, step: int, *, steps: int) -> float:
        """See `StepSizes.lr_at`."""
        return self.values[bisect_right(self.starts, step) - 1]

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """See `StepSizes.changes`."""
        return tuple(start for start in self.starts[1:] if start < steps)

    def to_config(self) -> Any:
        """See `StepSizes.to_config`."""
        later = [f"{start}:{value!r}" for start, value in zip(self.starts[1:], self.values[1:], strict=True)]
        return ",".join([repr(self.values[0]), *later])


AUTOMATIC = ("auto", "auto:linear", "auto:cosine")
"""Step sizes that set themselves: constant, or falling to 0 on top."""


@dataclass(frozen=True)
class AutomaticStepSize:
    """A step size that sets itself while it trains (`zoscope.AutoLR`).

    Args:
        kind: Schedule on top: ``constant``, ``linear`` or ``cosine``.
    """

    kind: str = "constant"
    peak: float = math.nan

    def lr_at(self, step: int, *, steps: int) -> float:
        """See `StepSizes.lr_at`; not known beforehand."""
        return math.nan

    def changes(self, *, steps: int) -> tuple[int, ...]:
        """See `StepSizes.changes`; none that is known."""
        return ()

    def to_config(self) -> Any:
        """See `StepSizes.to_config`."""
        return "auto" if self.kind == "constant" else f"auto:{self.kind}"


def training_step_sizes(text: str) -> StepSizes:
    """Read what `parse_step_sizes` reads, or ``auto``, ``auto:linear``, ``auto:cosine``.

    Raises:
        ValueError: If it is none of them.
    """
    if text in AUTOMATIC:
        return AutomaticStepSize(text.partition(":")[2] or "constant")
    if text.startswith("auto"):
        raise ValueError(f"got {text!r}, expected one of {', '.join(AUTOMATIC)}, or a number")
    return parse_step_sizes(text)


def parse_step_sizes(text: str) -> StepSizes:
    """Read ``0.001``, or ``0.001,20000:0.007,30000:0.008``: 0.007 from step 20,000 on.

    Raises:
        ValueError: If it is neither.
    """
    starts: list[int] = []
    values: list[float] = []
    for part in text.split(","):
        start, colon, value = part.strip().rpartition(":")
        if bool(colon) != bool(starts):
            raise ValueError(_expected(text))
        try:
            starts.append(_whole(start) if colon else 0)
            values.append(float(value))
        except ValueError:
            raise ValueError(_expected(text)) from None
    return step_sizes(starts, values)


def step_sizes(starts: Sequence[int], values: Sequence[float]) -> StepSizes:
    """A constant for one value, else one that jumps.

    Raises:
        ValueError: If they do not fit together.
    """
    if len(values) == 1 and list(starts) == [0]:
        _require_lr(values[0])
        return Schedule("constant", float(values[0]))
    return Piecewise(tuple(starts), tuple(float(value) for value in values))


def _whole(text: str) -> int:
    number = float(text)  # 2e4 is a step, too
    if not number.is_integer():
        raise ValueError
    return int(number)


def _require_lr(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a step size must be a finite number above 0, got {value!r}")


def _expected(text: str) -> str:
    return f"got {text!r}, expected a number, or numbers from a step on such as 0.001,20000:0.007,30000:0.008"


@dataclass(frozen=True)
class Where:
    """A place in a configuration file; lines are ``None`` where they are not known.

    Args:
        file: The file.
        line: The line of ``lr``, else that of the check.
        start: The line where the check begins.
    """

    file: Path
    line: int | None
    start: int | None


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer that training will use."""

    name: str
    schedule: Schedule
    beta: float
    betas: tuple[float, float]
    eps: float
    dampening: float
    weight_decay: float

    @property
    def lr(self) -> float:
        """The learning rate that is checked: the peak of the schedule."""
        return self.schedule.peak

    @property
    def zeroth_order(self) -> bool:
        """Whether gradients are estimated from loss values."""
        return is_zeroth_order(self.name)

    @property
    def rule(self) -> str:
        """Family of the optimizer, such as ``adam``."""
        return family_of(self.name)


@dataclass(frozen=True)
class EstimatorConfig:
    """The zeroth-order gradient estimate."""

    directions: str
    differences: str
    queries: int
    mu: float
    batch_size: int | None


@dataclass(frozen=True)
class CurvatureConfig:
    """How the curvature is measured."""

    rtol: float
    max_hvps: int
    kind: str
    method: str
    hvp: str
    device: str
    dtype: str
    seed: int
    preconditioner: str
    micro_batch: int | None
    max_memory: int | None
    shard_basis: bool
    strict: bool

    def options(self) -> dict[str, Any]:
        """The same as options of a measurement, by their names in Python; the preconditioner is the optimizer's."""
        found = {**vars(self), "curvature": self.kind}
        return {name: value for name, value in found.items() if name not in ("kind", "preconditioner")}


@dataclass(frozen=True)
class PolicyConfig:
    """When a check passes."""

    threshold: str
    margin: float
    on_warn: str
    probe: bool


@dataclass(frozen=True)
class CheckConfig:
    """One named check.

    Args:
        name: Unique in its file.
        spec: Spec with its path made absolute; ``None`` when a problem is passed in.
        shown_spec: The spec as the user wrote it.
        settings: Keyword arguments for the callable that the spec names.
        checkpoint: State dict to load.
        params: Regular expression that selects parameters.
        optimizer: The optimizer that training will use.
        steps: Training steps planned.
        estimator: The gradient estimate.
        curvature: How the curvature is measured.
        policy: When the check passes.
        where: What an annotation points at.
        notices: What the reading of the configuration has to say.
    """

    name: str
    spec: str | None
    shown_spec: str
    settings: Mapping[str, Any]
    checkpoint: Path | None
    params: str | None
    optimizer: OptimizerConfig
    steps: int
    estimator: EstimatorConfig
    curvature: CurvatureConfig
    policy: PolicyConfig
    where: Where | None = None
    notices: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Layers:
    """What one check is made of.

    Args:
        own: The check's own entry; empty for one that comes from options alone.
        values: Layers of values, later ones win.
        problem: Spec of a check that names none.
        folder: What relative paths are relative to.
        file: The file of the check.
        line: The line of its ``lr``, else its own.
        start: Its own line.
    """

    own: Mapping[str, Any]
    values: tuple[Mapping[str, Any], ...]
    problem: str | None
    folder: Path
    file: Path | None
    line: int | None
    start: int | None


def build_check(layers: Layers, *, needs_spec: bool = True) -> CheckConfig:
    """The check with every default filled in.

    Raises:
        InvalidError: If a value that has no default is missing, or two values contradict each other.
    """
    merged: dict[str, Any] = _defaults(CHECK)
    for values in layers.values:
        merged = _merge(merged, values)
    spec = merged["spec"] or layers.problem
    issues = _missing(merged, layers, spec=spec if needs_spec else "given")
    if issues:
        raise InvalidError(issues)
    optimizer = _optimizer(merged["optimizer"])
    checkpoint = merged["checkpoint"]
    return CheckConfig(
        name=merged["name"] or optimizer.name,
        spec=None if spec is None else absolute_spec(spec, layers.folder),
        shown_spec="problem" if spec is None else shown_spec(spec, layers.folder),
        settings=merged["set"] or {},
        checkpoint=None if checkpoint is None else Path(os.path.normpath(layers.folder / checkpoint)),
        params=merged["params"],
        optimizer=optimizer,
        steps=merged["steps"],
        estimator=EstimatorConfig(**merged["estimator"]),
        curvature=CurvatureConfig(**_absolute_state(merged["curvature"], layers.folder)),
        policy=PolicyConfig(**merged["policy"]),
        where=None if layers.file is None else Where(layers.file, layers.line, layers.start),
    )


def _defaults(section: Section) -> dict[str, Any]:
    return {
        key.name: _defaults(key.kind) if isinstance(key.kind, Section) else key.default
        for key in section.keys
        if not isinstance(key.kind, OneOf)
    }


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and ``set`` merge key by key; everything else is replaced."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping) and name != "lr"
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _missing(merged: Mapping[str, Any], layers: Layers, *, spec: str | None) -> list[Issue]:
    optimizer = merged["optimizer"]
    name = f"the check {layers.own['name']!r}" if layers.own else "the check"
    wanted = {
        "optimizer.name": (optimizer["name"], "--optimizer"),
        "optimizer.lr": (optimizer.get("lr"), "--lr"),
        "spec": (spec, "--spec"),
    }
    place = "give it here, in defaults, or with" if layers.own else "name a file that lists checks, or give"
    issues = [
        Issue(layers.line, f"{name} has no {key}; {place} {option}.")
        for key, (value, option) in wanted.items()
        if value is None
    ]
    if not issues:
        schedule, steps = _schedule(optimizer["lr"]), merged["steps"]
        if schedule.warmup_steps(steps) >= steps and schedule.warmup:
            message = (
                f"a warm-up of {schedule.warmup:g} never reaches its peak in {steps} steps; shorten it or raise steps."
            )
            issues.append(Issue(layers.line, f"{name}: {message}"))
    return issues


def _optimizer(values: Mapping[str, Any]) -> OptimizerConfig:
    first, second = values["betas"]
    return OptimizerConfig(
        name=values["name"],
        schedule=_schedule(values["lr"]),
        beta=values["beta"],
        betas=(first, second),
        eps=values["eps"],
        dampening=values["dampening"],
        weight_decay=values["weight_decay"],
    )


def _schedule(lr: float | Mapping[str, Any]) -> Schedule:
    if isinstance(lr, Mapping):
        return Schedule(lr["schedule"], lr["peak"], lr.get("warmup", 0.0))
    return Schedule("constant", lr)


def absolute_spec(spec: str, folder: Path) -> str:
    """A spec that names a file, with the path made absolute; one that names a module as it is."""
    found = re.fullmatch(r"(.*\.py)(:[^:/\\]*)?", spec)
    return spec if found is None else os.path.normpath(folder / found[1]) + (found[2] or "")


def shown_spec(spec: str, folder: Path) -> str:
    """A spec as the user knows it: its path relative to the working folder where it lies below."""
    absolute = absolute_spec(spec, folder)
    return Path(absolute).relative_to(Path.cwd()).as_posix() if _below(absolute, Path.cwd()) else absolute


def _below(path: str, folder: Path) -> bool:
    return Path(path).is_absolute() and Path(path).is_relative_to(folder)


def _absolute_state(curvature: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    kind, _, file = curvature["preconditioner"].partition(":")
    return {**curvature, "preconditioner": f"{kind}:{folder / file}" if file else kind}


COMMAND_LINE = "the command line"
YAML_NAME = "zoscope.yaml"
PYPROJECT_NAME = "pyproject.toml"
STARTER_NAME = "model.py"


@dataclass(frozen=True)
class Document:
    """A configuration file that has been read and validated, before overrides.

    Args:
        file: The file; ``None`` for checks that come from options alone.
        tree: The values with their lines.
        values: The same, validated.
    """

    file: Path | None
    tree: Node
    values: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return Path.cwd() if self.file is None else resolved(self.file).parent

    @property
    def problem(self) -> str | None:
        """The spec used where a check names none."""
        problem: str | None = self.values.get("problem") or self.values.get("spec")
        return problem

    @property
    def has_checks(self) -> bool:
        """Whether the file lists checks."""
        return "checks" in self.values


EMPTY = Document(None, Node({}, None), {})


def find_config(cwd: Path) -> Path | None:
    """``zoscope.yaml`` of a folder, else its ``pyproject.toml`` when that has a table ``[tool.zoscope]``."""
    if (cwd / YAML_NAME).is_file():
        return cwd / YAML_NAME
    pyproject = cwd / PYPROJECT_NAME
    if pyproject.is_file() and "tool.zoscope" in _read_text(pyproject):
        return pyproject
    return None


def load_document(file: Path) -> Document:
    """Read and validate a configuration file.

    Raises:
        ConfigError: With every mistake in the file and its line.
        UsageError: If the file cannot be read.
    """
    text = _read_text(file)
    try:
        tree = _parse(file, text)
        return Document(file, tree, ROOT.read(tree, ""))
    except InvalidError as error:
        raise ConfigError(shown_path(file), error.issues) from None


def _parse(file: Path, text: str) -> Node:
    if file.suffix == ".toml":
        tree = read_pyproject(text)
        if tree is None:
            raise InvalidError([Issue(None, "there is no table [tool.zoscope] in this file; add one with its checks.")])
        return tree
    tree = read_yaml(text)
    if not isinstance(tree.value, Mapping):
        raise InvalidError.at(tree, f"a configuration is a mapping with {', '.join(ROOT.names)}; got {tree.described}.")
    return tree


def _read_text(file: Path) -> str:
    try:
        return read_text(file)
    except FileNotFoundError:
        raise UsageError(f"CONFIG: there is no file {file}. Expected a {YAML_NAME} or a {PYPROJECT_NAME}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown_path(file)} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"CONFIG: cannot read {file} ({reason(error)}).") from None


def shown_path(path: Path) -> str:
    """A path as the user knows it: relative to the working folder where it lies below."""
    try:
        return resolved(path).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def override_tree(options: Mapping[str, Any]) -> Node:
    """Options of the command line as a piece of configuration; ``None`` means "not given"."""
    tree: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        *sections, key = OPTIONS[name]
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = _absolute(name, value)
    return _located(tree)


def _absolute(option: str, value: object) -> object:
    """Paths of the command line are relative to the working folder, those of a file to its own."""
    if option == "spec" and isinstance(value, str):
        return absolute_spec(value, Path.cwd())
    if option == "checkpoint":
        return str(Path.cwd() / str(value))
    if option == "preconditioner" and isinstance(value, str) and value.startswith("state:"):
        return f"state:{Path.cwd() / value.removeprefix('state:')}"
    return value


def _located(value: object) -> Node:
    if isinstance(value, Mapping):
        return Node({str(key): _located(item) for key, item in value.items()}, None)
    if isinstance(value, list | tuple):
        return Node(tuple(_located(item) for item in value), None)
    return Node(os.fspath(value) if isinstance(value, os.PathLike) else value, None)


def build_checks(
    document: Document,
    *,
    overrides: Sequence[tuple[str, Node]] = (),
    only: Sequence[str] = (),
    needs_spec: bool = True,
    notices: tuple[str, ...] = (),
) -> tuple[CheckConfig, ...]:
    """The checks of a document with overrides applied, later ones over earlier ones.

    Args:
        document: The file, or ``EMPTY`` for one check made of overrides.
        overrides: ``(source, tree)``; the source names the file or "command line" in errors.
        only: Names of the checks wanted; all when empty.
        needs_spec: Whether a check without a spec is an error; not when a problem is passed in.
        notices: What every check carries along.

    Raises:
        ConfigError: If a value is wrong, or one that is needed is missing.
        UsageError: If ``only`` names a check that is not there.
    """
    validated = [(source, _validated(source, tree)) for source, tree in overrides]
    issues: list[Issue] = []
    checks = []
    for layers in _layers(document, [values for _, values in validated], only):
        try:
            checks.append(replace(build_check(layers, needs_spec=needs_spec), notices=notices))
        except InvalidError as error:
            issues.extend(error.issues)
    if issues:
        raise ConfigError(COMMAND_LINE if document.file is None else shown_path(document.file), issues)
    return tuple(checks)


def _validated(source: str, tree: Node) -> Mapping[str, Any]:
    try:
        return DEFAULTS.read(tree, "")
    except InvalidError as error:
        if source != COMMAND_LINE:
            raise ConfigError(source, error.issues) from None
        raise UsageError(" ".join(_as_option(issue.message) for issue in error.issues)) from None


def _as_option(message: str) -> str:
    """``optimizer.lr must be …`` as ``--lr must be …``."""
    name, _, rest = message.partition(" ")
    options = {".".join(path): option for option, path in OPTIONS.items()} | {"set": "set"}
    return f"--{options[name].replace('_', '-')} {rest}" if name in options else message


def _layers(document: Document, overrides: list[Mapping[str, Any]], only: Sequence[str]) -> Iterator[Layers]:
    defaults = document.values.get("defaults", {})
    if not document.has_checks:
        spec = document.problem or (STARTER_NAME if (document.folder / STARTER_NAME).is_file() else None)
        yield Layers({}, (defaults, *overrides), spec, document.folder, None, None, None)
        return
    _refuse_names(document, only)
    trees = _items(document.tree)
    for tree, (line, values) in zip(trees, document.values["checks"], strict=True):
        if not only or values["name"] in only:
            layers = (defaults, values, *overrides)
            place = (document.file, _lr_line(tree) or line, line)
            yield Layers(values, layers, document.problem, document.folder, *place)


def _refuse_names(document: Document, only: Sequence[str]) -> None:
    entries = document.values["checks"]
    names: dict[str, int | None] = {}
    issues = []
    for line, values in entries:
        name = values["name"]
        if name in names:
            issues.append(Issue(line, f"the name {shorten(name)} is used twice, first in line {names[name]}."))
        names.setdefault(name, line)
    if issues:
        raise ConfigError(shown_path(document.file) if document.file else "the checks", issues)
    for name in only:
        if name not in names:
            raise UsageError(f"--only: there is no check {shorten(name)}. {suggest(name, names)}")


def _items(tree: Node) -> Sequence[Node]:
    checks = tree.value["checks"] if isinstance(tree.value, Mapping) else None
    return checks.value if isinstance(checks, Node) and isinstance(checks.value, tuple) else ()


def _lr_line(check: Node) -> int | None:
    """The line of ``optimizer.lr``, where a reader of an annotation wants to be."""
    node: object = check
    for name in ("optimizer", "lr"):
        entries = node.value if isinstance(node, Node) else None
        node = entries.get(name) if isinstance(entries, Mapping) else None
    return node.line if isinstance(node, Node) else None
