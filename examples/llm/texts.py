"""Real short texts to classify: what the standard library says about its functions, one sentence each."""

import inspect
import math
import os
import re
import shutil
import socket
import ssl
import statistics
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SOURCES: dict[str, tuple[object, ...]] = {
    "math": (math, statistics),
    "text": (str, textwrap, re),
    "files": (os.path, shutil, Path),
    "network": (socket.socket, ssl.SSLSocket, urllib.request),
}
"""The classes, named by the word that answers a prompt, and where their texts come from."""

FEWEST_WORDS, MOST_WORDS = 4, 8


def few_shot(shots: int) -> tuple[list[str], list[str]]:
    """``shots`` texts of each class, spread evenly over what there is.

    Returns:
        Texts, and the class of each.
    """
    texts, classes = [], []
    for name, places in SOURCES.items():
        found = list(dict.fromkeys(text for place in places for text in _sentences(place)))
        if len(found) < shots:
            raise ValueError(f"shots must be at most {len(found)}, the number of texts about {name}, got {shots}")
        texts += found[:: len(found) // shots][:shots]
        classes += [name] * shots
    return texts, classes


def _sentences(place: object) -> Iterator[str]:
    for name in sorted(vars(place)):
        documentation = inspect.getdoc(getattr(place, name)) if callable(getattr(place, name)) else None
        if name.startswith("_") or not documentation:
            continue
        sentence = re.split(r"(?<=[.])\s|\n\n", documentation)[0].replace("\n", " ")
        words = sentence.split()
        if FEWEST_WORDS <= len(words) <= MOST_WORDS and words[0].isalpha():
            yield " ".join(words)
