"""YAML with line numbers, bounded in size, depth and alias expansion; builds plain scalars, lists and mappings only."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from zoscope.config.located import InvalidError, Issue, Located, shorten

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


def read_yaml(text: str) -> Located:
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
        return Located({}, 1)
    return _Converter().convert(root, line=_line(root), depth=0)


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


class _Converter:
    """Turns composed nodes into ``Located`` values; one instance per document counts its nodes."""

    def __init__(self) -> None:
        self._loader = _Loader("")
        self._count = 0

    def convert(self, node: yaml.Node, *, line: int, depth: int) -> Located:
        self._count += 1
        if self._count > MAX_NODES:
            message = f"more than {MAX_NODES} values once aliases are expanded; repeat fewer anchors."
            raise InvalidError([Issue(line, message)])
        if depth > MAX_DEPTH:  # an alias inside its own anchor
            raise InvalidError([Issue(line, f"an alias nests more than {MAX_DEPTH} levels deep or contains itself.")])
        if isinstance(node, yaml.MappingNode):
            return Located(self._mapping(node, depth=depth), line)
        if isinstance(node, yaml.SequenceNode):
            items = tuple(self.convert(item, line=_line(item), depth=depth + 1) for item in node.value)
            return Located(items, line)
        return Located(self._scalar(node, line), line)

    def _mapping(self, node: yaml.MappingNode, *, depth: int) -> dict[str, Located]:
        explicit: dict[str, Located] = {}
        merged: dict[str, Located] = {}
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

    def _merge(self, node: yaml.Node, *, line: int, depth: int) -> Iterator[tuple[str, Located]]:
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
