"""``[tool.zoscope]`` of a pyproject.toml, with the lines of its keys found in the text."""

from __future__ import annotations

import re
import tomllib

from zoscope.config.located import InvalidError, Issue, Located
from zoscope.config.yaml_reader import MAX_DEPTH, MAX_NODES

MAX_BYTES = 1024 * 1024
TABLE = ("tool", "zoscope")

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")

Path = tuple[str | int, ...]


def read_pyproject(text: str) -> Located | None:
    """The table ``[tool.zoscope]``; ``None`` when the file has none.

    Raises:
        InvalidError: On a syntax error or a file over a limit.
    """
    if len(text) > MAX_BYTES:
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
    return _Converter(lines).convert(data, TABLE, lines.get(TABLE))


class _Converter:
    def __init__(self, lines: dict[Path, int]) -> None:
        self._lines = lines
        self._count = 0

    def convert(self, value: object, path: Path, line: int | None) -> Located:
        """``line`` is that of the nearest table or key above; inline tables have no lines of their own."""
        self._count += 1
        if self._count > MAX_NODES or len(path) > MAX_DEPTH:
            raise InvalidError([Issue(line, f"more than {MAX_NODES} values or {MAX_DEPTH} levels in [tool.zoscope].")])
        line = self._lines.get(path, line)
        if isinstance(value, dict):
            return Located({name: self.convert(item, (*path, name), line) for name, item in value.items()}, line)
        if isinstance(value, list):
            return Located(tuple(self.convert(item, (*path, i), line) for i, item in enumerate(value)), line)
        return Located(value, line)


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
