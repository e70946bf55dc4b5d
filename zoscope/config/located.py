"""Configuration values that remember their line, and the errors that name it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zoscope.errors import UsageError

MAX_SHOWN = 60
"""Characters of a user's value that an error message repeats."""


@dataclass(frozen=True)
class Located:
    """A scalar, a tuple of ``Located`` or a mapping of names to ``Located``.

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
    def at(cls, node: Located, message: str) -> InvalidError:
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
        listed = [f"{_line(issue)}{issue.message}" for issue in self.issues[: self.MAX_LISTED]]
        if len(self.issues) > self.MAX_LISTED:
            listed.append(f"And {len(self.issues) - self.MAX_LISTED} more.")
        return f"{self.file} has {len(self.issues)} errors. " + " ".join(listed)


def _line(issue: Issue) -> str:
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
