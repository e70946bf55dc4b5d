"""Measurements kept on disk: one JSON file per fingerprint of problem and options."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscope.errors import UsageError

FORMAT = 1


@dataclass(frozen=True)
class Cache:
    """A folder of measurements. Files that are damaged or of another format are as good as absent.

    Args:
        folder: Made when it is not there.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Cache:
        """A cache in a folder that can be written.

        Raises:
            UsageError: If it cannot.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UsageError(f"--cache: cannot write in {folder} ({error.strerror}). Choose another folder.") from None
        return cls(folder)

    def key(self, fingerprint: str, options: Mapping[str, Any]) -> str:
        """The name of the file for a problem and the options of its measurement."""
        text = json.dumps([FORMAT, fingerprint, options], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept, if it is there."""
        try:
            document = json.loads(self._file(key).read_text(encoding="utf-8"))
            entry = document["entry"] if document["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return entry if isinstance(entry, dict) else None

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep a JSON object; a full disk costs the entry, not the run."""
        document = {"format": FORMAT, "entry": entry}
        name = None
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".writing-")
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(document, file, allow_nan=False)
            os.replace(name, self._file(key))
        except OSError:
            if name is not None:
                Path(name).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"
