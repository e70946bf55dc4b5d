"""From a file and overrides to validated checks: built-in defaults < ``defaults`` < check < command line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoscope.config.build import Layers, absolute_spec, build_check
from zoscope.config.keys import DEFAULTS, OPTIONS, ROOT
from zoscope.config.located import ConfigError, InvalidError, Issue, Located, shorten, suggest
from zoscope.config.model import CheckConfig
from zoscope.config.toml_reader import read_pyproject
from zoscope.config.yaml_reader import read_yaml
from zoscope.errors import UsageError

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
    tree: Located
    values: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return Path.cwd() if self.file is None else self.file.resolve().parent

    @property
    def problem(self) -> str | None:
        """The spec used where a check names none."""
        problem: str | None = self.values.get("problem")
        return problem

    @property
    def has_checks(self) -> bool:
        """Whether the file lists checks."""
        return "checks" in self.values


EMPTY = Document(None, Located({}, None), {})


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


def _parse(file: Path, text: str) -> Located:
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
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"CONFIG: there is no file {file}. Expected a {YAML_NAME} or a {PYPROJECT_NAME}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown_path(file)} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"CONFIG: cannot read {file} ({error.strerror}).") from None


def shown_path(path: Path) -> str:
    """A path as the user knows it: relative to the working folder where it lies below."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def override_tree(options: Mapping[str, Any]) -> Located:
    """Options of the command line as a piece of configuration; ``None`` means "not given".

    Raises:
        UsageError: On an option that does not exist.
    """
    tree: dict[str, Any] = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise UsageError(f"check has no option {shorten(name)}. {suggest(name, OPTIONS)}")
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


def _located(value: object) -> Located:
    if isinstance(value, Mapping):
        return Located({str(key): _located(item) for key, item in value.items()}, None)
    if isinstance(value, list | tuple):
        return Located(tuple(_located(item) for item in value), None)
    return Located(os.fspath(value) if isinstance(value, os.PathLike) else value, None)


def build_checks(
    document: Document,
    *,
    overrides: Sequence[tuple[str, Located]] = (),
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


def _validated(source: str, tree: Located) -> Mapping[str, Any]:
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


def _items(tree: Located) -> Sequence[Located]:
    checks = tree.value["checks"] if isinstance(tree.value, Mapping) else None
    return checks.value if isinstance(checks, Located) and isinstance(checks.value, tuple) else ()


def _lr_line(check: Located) -> int | None:
    """The line of ``optimizer.lr``, where a reader of an annotation wants to be."""
    node: object = check
    for name in ("optimizer", "lr"):
        entries = node.value if isinstance(node, Located) else None
        node = entries.get(name) if isinstance(entries, Mapping) else None
    return node.line if isinstance(node, Located) else None
