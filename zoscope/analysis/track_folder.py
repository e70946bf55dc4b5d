"""The folder of a run: written so that a reader, or a run that goes on, never meets half of anything."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from zoscope import files
from zoscope.analysis.track_results import Record, Summary, conforms
from zoscope.config.keys import plain
from zoscope.config.training import parse_track_config
from zoscope.errors import UsageError, ZoscopeError
from zoscope.files import reason

try:
    import fcntl
except ImportError:  # no such module on Windows: there two runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, CHECKPOINT, SUMMARY, LOCK = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoint.pt",
    "summary.json",
    ".lock",
)


MOST_METRICS = 4 * 2**30
"""Bytes of metrics that are read: a hundred times those of a long run."""

SEAL = "seal"
"""Key of a checkpoint: the hash of all else in it."""


@dataclass(frozen=True)
class Known:
    """What a checkpoint knows of the metrics written before it.

    Args:
        lines: How many there were.
        checksum: CRC-32 of their bytes; ``None`` in checkpoints of earlier versions.
    """

    lines: int
    checksum: int | None


class RunFolderError(ZoscopeError):
    """A run folder that can no longer be written: exit code 3. What was written before stays whole."""


class RunFolder:
    """Config, metrics, checkpoint and summary of one run.

    Every line of metrics is on disk before the run goes on; the other files are replaced as a whole. A checkpoint knows
    which lines of metrics belong to it: what comes after them is cut off when a run goes on, and written again.

    Args:
        path: The folder; made when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    # --- opening --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it.

        Raises:
            UsageError: If it cannot be made or written, or another run is at work in it.
        """
        fresh = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
        except OSError as error:
            raise UsageError(
                f"--run {self.path}: the folder cannot be made or written ({reason(error)}). Choose another place."
            ) from None
        with lock:
            self._seize(lock)
            self._lock = lock
            try:
                yield
            finally:
                self._lock = None
                if fresh and not self.has_run:  # nothing came of it
                    with contextlib.suppress(OSError):
                        (self.path / LOCK).unlink()
                        self.path.rmdir()

    def _seize(self, lock: IO[str]) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            by = f" (process {owner})" if owner else ""
            raise UsageError(
                f"--run {self.path}: another run is at work in this folder{by}. Wait for it, or name another folder."
            ) from None
        except OSError:
            return  # a file system without locks
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()

    @property
    def has_run(self) -> bool:
        """Whether a run has begun here."""
        return any((self.path / name).exists() for name in (CONFIG, METRICS, CHECKPOINT, SUMMARY))

    def clear(self) -> None:
        """Remove what a run left."""
        for name in (SUMMARY, CHECKPOINT, METRICS, CONFIG):
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise UsageError(
                    f"--overwrite: {self.path / name} cannot be removed ({reason(error)}). Remove it yourself, or name "
                    "another folder with --run."
                ) from None

    # --- writing --------------------------------------------------------------------------------------------------

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Set ``config.yaml``."""
        text = "# Written by zoscope track; paths are relative to this file.\n"
        text += yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._replace(CONFIG, text.encode("utf-8"))

    def write_summary(self, document: Mapping[str, Any]) -> None:
        """Set ``summary.json``."""
        self._replace(SUMMARY, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode("utf-8"))

    @property
    def metrics(self) -> Path:
        """The file of measurements."""
        return self.path / METRICS

    def append(self, record: Record, *, after: int) -> int:
        """Add a line of metrics and wait until it is on disk.

        Args:
            record: The measurement.
            after: Checksum of the metrics so far.

        Returns:
            Checksum with the line.
        """
        line = (json.dumps(record.to_dict(), allow_nan=False) + "\n").encode("utf-8")
        with self._writing(METRICS), open(self.path / METRICS, "ab", buffering=0) as file:
            files.write_all(file, line)
            os.fsync(file.fileno())
        return zlib.crc32(line, after)

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Set ``checkpoint.pt``: plain values and tensors, to be read with ``weights_only=True``."""
        buffer = io.BytesIO()
        torch.save({**content, SEAL: seal_of(content)}, buffer)
        self._replace(CHECKPOINT, buffer.getbuffer())

    def _replace(self, name: str, data: bytes | memoryview) -> None:
        with self._writing(name):
            files.write_whole(self.path / name, data, durable=True)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = (
                f"{self.path / CHECKPOINT} still holds the last complete state. Then go on with: zoscope track "
                f"--resume {self.path}"
                if (self.path / CHECKPOINT).exists()
                else "there is no checkpoint yet: begin again"
            )
            raise RunFolderError(
                f"{self.path / name} cannot be written ({reason(error)}). Make room, or the folder writable; {kept}."
            ) from error

    # --- reading --------------------------------------------------------------------------------------------------

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote, with paths as they stand there.

        Raises:
            UsageError: If there is no such file, or it is none of ours.
        """
        try:
            return dict(plain(parse_track_config(self.path / CONFIG)))
        except FileNotFoundError:
            raise UsageError(
                f"{self.path} is no run of zoscope track: it has no {CONFIG}. Expected the folder given to --run."
            ) from None
        except OSError as error:
            raise UsageError(f"{self.path / CONFIG} cannot be read ({reason(error)}).") from None

    def read_summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote; ``None`` before that.

        Raises:
            UsageError: If it is the summary of neither a run nor of a sweep.
        """
        try:
            found = files.parse_json(files.read_bytes(self.path / SUMMARY))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path / SUMMARY} cannot be read ({reason(error)}).") from None
        if not conforms(found, Summary):
            raise UsageError(
                f"{self.path / SUMMARY} is not what zoscope track writes. Remove it: the measurements are in {METRICS}."
            )
        return dict(found)

    def read_records(self) -> tuple[Record, ...]:
        """Every whole line of metrics; a torn last one is left out.

        Raises:
            UsageError: If a line is no record.
        """
        lines = self._lines()
        records, wrong = _parsed(lines)
        if wrong is not None:
            raise UsageError(
                f"{self.path / METRICS}, line {wrong} is no measurement. Expected what zoscope track wrote there."
            )
        return records

    def _lines(self) -> list[bytes]:
        try:
            return files.read_bytes(self.path / METRICS, most=MOST_METRICS).split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(
                f"{self.path / METRICS} cannot be read ({reason(error)}). Expected the file that the run wrote: put it "
                "back, or make it readable."
            ) from None

    def recover_metrics(self, known: Known) -> tuple[tuple[Record, ...], int]:
        """Cut the metrics back to what a checkpoint knows, or to the last whole line where they have lost their end.

        Args:
            known: What the checkpoint says of them.

        Returns:
            The records that are there, fewer than ``known.lines`` where some are lost, and their checksum.

        Raises:
            UsageError: If a line in the midst of others was changed, so that nobody can say which to trust.
        """
        lines = self._lines()[: known.lines]
        records, wrong = _parsed(lines)
        if wrong is not None and _parsed(lines[wrong:])[0]:
            raise self._changed(f"line {wrong} is no measurement, and others follow it")
        kept = b"".join(line + b"\n" for line in lines[: len(records)])
        checksum = zlib.crc32(kept)
        if len(records) == known.lines and known.checksum not in (None, checksum):
            raise self._changed("a line is not what the checkpoint knows of it")
        self.truncate_metrics(len(kept))
        return records, checksum

    def _changed(self, what: str) -> UsageError:
        return UsageError(
            f"{self.path / METRICS} was changed since zoscope wrote it: {what}. Put a copy back, or start anew with "
            "--overwrite."
        )

    def read_checkpoint(self) -> dict[str, Any] | None:
        """What `write_checkpoint` wrote; ``None`` before the first.

        Raises:
            UsageError: If the file is damaged, or something else wrote it.
        """
        file = self.path / CHECKPOINT
        try:
            files.require_file(file)
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            found = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise self._damaged(reason(error)) from None
        if damaged is not None:
            raise self._damaged(f"{damaged} has another checksum")
        if not isinstance(found, dict) or found.pop(SEAL, None) not in (None, seal_of(found)):
            raise self._damaged("its values were changed")
        return found

    def _damaged(self, how: str) -> UsageError:
        return UsageError(
            f"{self.path / CHECKPOINT} cannot be read ({how}). Runs replace it as a whole, so something else changed "
            "it: put a copy back, or start anew with --overwrite."
        )

    def truncate_metrics(self, size: int) -> None:
        """Cut off what was written after a checkpoint."""
        if not (self.path / METRICS).exists():
            return
        with self._writing(METRICS), open(self.path / METRICS, "r+b") as file:
            file.truncate(min(size, os.fstat(file.fileno()).st_size))  # a longer file would be filled with NULs
            os.fsync(file.fileno())

    def forget_summary(self) -> None:
        """A run that goes on has no result yet."""
        (self.path / SUMMARY).unlink(missing_ok=True)


def _parsed(lines: list[bytes]) -> tuple[tuple[Record, ...], int | None]:
    """The records up to the first line that is none, and its number, from 1."""
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record.from_dict(files.parse_json(line)))
        except ValueError:
            return tuple(records), number
    return tuple(records), None


def seal_of(content: Mapping[str, Any]) -> str:
    """A hash of plain values and tensors: a value that was changed in a file has another one."""
    hasher = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hasher.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(value, Mapping):
            hasher.update(f"mapping {len(value)}".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            hasher.update(f"list {len(value)}".encode())
            for item in value:
                add(item)
        else:
            hasher.update(f"{type(value).__name__} {value!r};".encode(errors="surrogatepass"))

    add(content)
    return hasher.hexdigest()
