"""Configuration files, YAML and TOML, as values that remember their line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from zoscope.errors import UsageError

MAX_SHOWN = 60
"""Characters of a user's value that an error message repeats."""


@dataclass(frozen=True)
class Node:
    """A scalar, a tuple of ``Node`` or a mapping of names to ``Node``.

    Args:
        value: ``str | int | float | bool | None``, a tuple, a dict, or an object of the file format (a TOML date).
        line: Line of its key, or its own where it has none; counted from 1, ``None`` where the source has no lines.
    """

    value: object
    line: int | None

    @property
    def described(self) -> str:
        """What the value is, in the words of a configuration file."""
        value = self.value
        if value is None:
            return "nothing"
        if isinstance(value, bool):
            return f"the boolean {str(value).lower()}"
        if isinstance(value, Mapping):
            return "a mapping"
        if isinstance(value, tuple):
            return "a list"
        if isinstance(value, str):
            return f"the text {shorten(value)}"
        if isinstance(value, int | float):
            return f"the number {shorten(value)}"
        return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Issue:
    """One mistake: its line and a paragraph on what was found and what was expected."""

    line: int | None
    message: str


class InvalidError(Exception):
    """Raised while a value is read; carries every mistake below it."""

    def __init__(self, issues: Iterable[Issue]) -> None:
        self.issues = tuple(issues)
        super().__init__("; ".join(issue.message for issue in self.issues))

    @classmethod
    def at(cls, node: Node, message: str) -> InvalidError:
        """A single mistake at the line of ``node``."""
        return cls([Issue(node.line, message)])


class ConfigError(UsageError):
    """A configuration file that cannot be used: exit code 2.

    Args:
        file: The file, as the user knows it.
        issues: Every mistake found, in the order of the file.
    """

    MAX_LISTED = 12

    def __init__(self, file: str, issues: Sequence[Issue]) -> None:
        self.file = file
        self.issues = tuple(sorted(issues, key=lambda issue: issue.line or 0))
        super().__init__(self._paragraph())

    def _paragraph(self) -> str:
        if len(self.issues) == 1:
            (issue,) = self.issues
            place = self.file if issue.line is None else f"{self.file}, line {issue.line}"
            return f"{place}: {issue.message}"
        listed = [f"{_issue_line(issue)}{issue.message}" for issue in self.issues[: self.MAX_LISTED]]
        if len(self.issues) > self.MAX_LISTED:
            listed.append(f"And {len(self.issues) - self.MAX_LISTED} more.")
        return f"{self.file} has {len(self.issues)} errors. " + " ".join(listed)


def _issue_line(issue: Issue) -> str:
    return "" if issue.line is None else f"Line {issue.line}: "


def shorten(value: object) -> str:
    """A value as one short line, for an error message: control characters escaped, length bounded."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that a misspelt name most likely means; ``None`` when nothing is near."""
    names = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name[:MAX_SHOWN].lower().replace("-", "_"), names, n=1, cutoff=0.6)
    if not found:
        found = difflib.get_close_matches(name[:MAX_SHOWN].lower(), names, n=1, cutoff=0.6)
    return names[found[0]] if found else None


def suggest(name: str, candidates: Iterable[str]) -> str:
    """``Did you mean …?``, or the list of what is valid when nothing is near."""
    options = list(candidates)
    match = nearest(name, options)
    return f"Did you mean {match!r}?" if match else f"Valid: {', '.join(options)}."


MAX_BYTES = 256 * 1024
MAX_DEPTH = 24
MAX_NODES = 10_000
"""Nodes after aliases are expanded: nested aliases can otherwise turn a kilobyte into gigabytes."""

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null"))


class _Loader(yaml.SafeLoader):
    """The safe loader, with two traps of YAML 1.1 removed.

    There ``1e-4`` is text (a float needs a dot and a signed exponent), and ``1:30`` is the integer 90.
    """


_Loader.yaml_implicit_resolvers = {
    first: [row for row in rows if row[0] in (_TAG + "bool", _TAG + "null")]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(
    _TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)$"), list("-+0123456789")
)


def read_yaml(text: str) -> Node:
    """Parse one YAML document.

    Raises:
        InvalidError: On a syntax error, a duplicate key, a tag that is not a plain scalar's, or a limit.
    """
    if len(text.encode("utf-8", errors="replace")) > MAX_BYTES:
        raise InvalidError(
            [Issue(None, f"the file is larger than {MAX_BYTES // 1024} KiB; a configuration is far smaller.")]
        )
    try:
        _check_depth(text)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        reason = " ".join(str(error).split())
        raise InvalidError([Issue(None, f"not valid YAML: {reason}.")]) from None
    if root is None:
        return Node({}, 1)
    return _YamlConverter().convert(root, line=_line(root), depth=0)


def _syntax_error(error: yaml.MarkedYAMLError) -> InvalidError:
    mark = error.problem_mark or error.context_mark
    reason = " ".join(part for part in (error.context, error.problem) if part)
    if error.context_mark is not None and mark is not None and error.context_mark.line != mark.line:
        reason += f" (begun in line {error.context_mark.line + 1})"
    return InvalidError([Issue(None if mark is None else mark.line + 1, f"not valid YAML: {reason}.")])


def _check_depth(text: str) -> None:
    """Count nesting on the event stream: composing the document recurses and would end in a RecursionError."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = None if event.start_mark is None else event.start_mark.line + 1
            raise InvalidError([Issue(line, f"nested more than {MAX_DEPTH} levels deep; flatten this part.")])


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _YamlConverter:
    """Turns composed nodes into ``Node`` values; one instance per document counts its nodes."""

    def __init__(self) -> None:
        self._loader = _Loader("")
        self._count = 0

    def convert(self, node: yaml.Node, *, line: int, depth: int) -> Node:
        self._count += 1
        if self._count > MAX_NODES:
            message = f"more than {MAX_NODES} values once aliases are expanded; repeat fewer anchors."
            raise InvalidError([Issue(line, message)])
        if depth > MAX_DEPTH:  # an alias inside its own anchor
            raise InvalidError([Issue(line, f"an alias nests more than {MAX_DEPTH} levels deep or contains itself.")])
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, depth=depth), line)
        if isinstance(node, yaml.SequenceNode):
            items = tuple(self.convert(item, line=_line(item), depth=depth + 1) for item in node.value)
            return Node(items, line)
        return Node(self._scalar(node, line), line)

    def _mapping(self, node: yaml.MappingNode, *, depth: int) -> dict[str, Node]:
        explicit: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidError([Issue(_line(key), "a list or mapping stands where a key is expected.")])
            if key.tag == _TAG + "merge" or (key.value == "<<" and key.style is None):
                for name, entry in self._merge(value, line=_line(key), depth=depth):
                    merged.setdefault(name, entry)
                continue
            if key.value in explicit:
                first = explicit[key.value].line
                message = f"the key {shorten(key.value)} is given twice, first in line {first}; keep one."
                raise InvalidError([Issue(_line(key), message)])
            # the line of the key; the value of a merged key keeps the line where it was written
            explicit[key.value] = self.convert(value, line=_line(key), depth=depth + 1)
        return merged | explicit

    def _merge(self, node: yaml.Node, *, line: int, depth: int) -> Iterator[tuple[str, Node]]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            converted = self.convert(source, line=line, depth=depth + 1)
            if not isinstance(converted.value, dict):
                raise InvalidError([Issue(line, f"'<<' merges mappings, got {converted.described}.")])
            yield from converted.value.items()

    def _scalar(self, node: yaml.Node, line: int) -> object:
        if node.tag not in _SCALARS:
            raise InvalidError([Issue(line, f"the tag {shorten(node.tag)} is not allowed; plain values only.")])
        try:
            if node.tag == _TAG + "int":
                return _integer(node.value)
            return self._loader.construct_object(node)
        except (ValueError, OverflowError, yaml.YAMLError):
            raise InvalidError([Issue(line, f"{shorten(node.value)} cannot be read as a number.")]) from None


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    prefixed = digits.lstrip("+-").lower().startswith(("0x", "0o"))
    return int(digits, 0 if prefixed else 10)


MAX_TOML_BYTES = 1024 * 1024
TABLE = ("tool", "zoscope")

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")

Path = tuple[str | int, ...]


def read_pyproject(text: str) -> Node | None:
    """The table ``[tool.zoscope]``; ``None`` when the file has none.

    Raises:
        InvalidError: On a syntax error or a file over a limit.
    """
    if len(text) > MAX_TOML_BYTES:
        raise InvalidError([Issue(None, f"the file is larger than {MAX_BYTES // 1024} KiB.")])
    try:
        data: object = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        raise InvalidError([Issue(int(found[1]) if found else None, f"not valid TOML: {error}.")]) from None
    except (RecursionError, ValueError):  # deep nesting; integers of thousands of digits
        raise InvalidError([Issue(None, "not valid TOML: nested too deeply, or a number too long to read.")]) from None
    for name in TABLE:
        data = data.get(name) if isinstance(data, dict) else None
    if data is None:
        return None
    lines = _key_lines(text)
    return _TomlConverter(lines).convert(data, TABLE, lines.get(TABLE))


class _TomlConverter:
    def __init__(self, lines: dict[Path, int]) -> None:
        self._lines = lines
        self._count = 0

    def convert(self, value: object, path: Path, line: int | None) -> Node:
        """``line`` is that of the nearest table or key above; inline tables have no lines of their own."""
        self._count += 1
        if self._count > MAX_NODES or len(path) > MAX_DEPTH:
            raise InvalidError([Issue(line, f"more than {MAX_NODES} values or {MAX_DEPTH} levels in [tool.zoscope].")])
        line = self._lines.get(path, line)
        if isinstance(value, dict):
            return Node({name: self.convert(item, (*path, name), line) for name, item in value.items()}, line)
        if isinstance(value, list):
            return Node(tuple(self.convert(item, (*path, i), line) for i, item in enumerate(value)), line)
        return Node(value, line)


def _key_lines(text: str) -> dict[Path, int]:
    """Line of each table header and each ``key =`` that starts a line."""
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for number, content in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(content):
            table = _resolve(_parts(header[2]), counts)
            if header[1] == "[[":
                index = counts.get(table, -1) + 1
                counts[table] = index
                table = (*table, index)
            lines.setdefault(table, number)
        elif key := _KEY.match(content):
            path = (*table, *_parts(key[1]))
            for end in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:end], number)
    return lines


def _resolve(names: tuple[str, ...], counts: dict[Path, int]) -> Path:
    """Insert the index of the current element wherever a prefix is an array of tables."""
    path: Path = ()
    for position, name in enumerate(names):
        path = (*path, name)
        if position < len(names) - 1 and path in counts:
            path = (*path, counts[path])
    return path


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))
