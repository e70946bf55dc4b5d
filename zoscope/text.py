"""Text from outside, made fit for a terminal, a log and a document."""

from __future__ import annotations

import re

_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters other than tab and line end: escape sequences begin with them
    "\u2028\u2029"  # line ends of another kind
    "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"  # text that runs the other way, so that it reads otherwise
    "\ud800-\udfff]"  # bytes of a file name that are not UTF-8; no stream takes them
)


def clean(text: str) -> str:
    """``text`` with a visible sign in place of every character that would act on a terminal; as long as before.

    A control character becomes its picture (``␛`` for ESC), anything else ``�``. Every text that leaves zoscope passes
    through here: what a console prints, what is written as a table, Markdown or an annotation, and the messages of
    exceptions. In JSON they are escaped (`clean_json`), as nothing may be lost there.
    """
    return _HARMFUL.sub(_picture, text) if _HARMFUL.search(text) else text


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def clean_json(document: str) -> str:
    """A JSON document with the same characters escaped, which JSON itself only does with those below 32."""
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", document)
