"""The folder of a run: written so that a reader, or a run that goes on, never meets half of anything."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from zoscope.analysis.track_results import Record
from zoscope.errors import UsageError, ZoscopeError

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


class RunFolderError(ZoscopeError):
    """A run folder that can no longer be written: exit code 3. What was written before stays whole."""


class RunFolder:
    """Config, metrics, checkpoint and summary of one run.

    Every line of metrics is on disk before the run goes on; the other files are replaced as a whole. A checkpoint knows
    how many bytes of metrics belong to it: what comes after them is cut off when a run goes on, and written again.

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
                f"--run {self.path}: the folder cannot be made or written ({_reason(error)}). Choose another place."
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
            (self.path / name).unlink(missing_ok=True)

    # --- writing --------------------------------------------------------------------------------------------------

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Set ``config.yaml``."""
        text = "# Written by zoscope track; paths are relative to this file.\n"
        text += yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._replace(CONFIG, text.encode("utf-8"))

    def write_summary(self, document: Mapping[str, Any]) -> None:
        """Set ``summary.json``."""
        self._replace(SUMMARY, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode("utf-8"))

    def append(self, record: Record) -> int:
        """Add a line of metrics and wait until it is on disk.

        Returns:
            Bytes of metrics so far.
        """
        line = (json.dumps(record.to_dict(), allow_nan=False) + "\n").encode("utf-8")
        with self._writing(METRICS), open(self.path / METRICS, "ab", buffering=0) as file:
            _write_all(file, line)
            os.fsync(file.fileno())
            return file.tell()

    def write_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Set ``checkpoint.pt``: plain values and tensors, to be read with ``weights_only=True``."""
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        self._replace(CHECKPOINT, buffer.getbuffer())

    def _replace(self, name: str, data: bytes | memoryview) -> None:
        target, temporary = self.path / name, self.path / f".{name}.{os.getpid()}"
        with self._writing(name):
            try:
                with open(temporary, "wb", buffering=0) as file:
                    _write_all(file, data)
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
            _sync_folder(self.path)

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
                f"{self.path / name} cannot be written ({_reason(error)}). Make room, or the folder writable; {kept}."
            ) from error

    # --- reading --------------------------------------------------------------------------------------------------

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote.

        Raises:
            UsageError: If there is no such file or it is none of ours.
        """
        try:
            found = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"{self.path} is no run of zoscope track: it has no {CONFIG}. Expected the folder given to --run."
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{self.path / CONFIG} cannot be read ({_first_line(error)}).") from None
        if not isinstance(found, dict):
            raise UsageError(f"{self.path / CONFIG} is not a mapping. Expected the file that zoscope track wrote.")
        return found

    def read_summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote; ``None`` before that."""
        try:
            found: dict[str, Any] = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path / SUMMARY} cannot be read ({_first_line(error)}).") from None
        return found

    def read_records(self) -> tuple[Record, ...]:
        """Every whole line of metrics; a torn last one is left out.

        Raises:
            UsageError: If a line is no record.
        """
        try:
            data = (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise UsageError(f"{self.path / METRICS} cannot be read ({_reason(error)}).") from None
        records = []
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                records.append(Record.from_dict(json.loads(line)))
            except (ValueError, TypeError, AttributeError):
                raise UsageError(
                    f"{self.path / METRICS}, line {number} is no measurement. Expected what zoscope track wrote there."
                ) from None
        return tuple(records)

    def read_checkpoint(self) -> dict[str, Any] | None:
        """What `write_checkpoint` wrote; ``None`` before the first.

        Raises:
            UsageError: If the file is damaged.
        """
        try:
            found: dict[str, Any] = torch.load(self.path / CHECKPOINT, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise UsageError(
                f"{self.path / CHECKPOINT} cannot be read ({_first_line(error)}). Runs replace it as a whole, so "
                "something else changed it: put a copy back, or start anew with --overwrite."
            ) from None
        return found

    def truncate_metrics(self, size: int) -> None:
        """Cut off what was written after a checkpoint."""
        if not (self.path / METRICS).exists() and size == 0:
            return
        with self._writing(METRICS), open(self.path / METRICS, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def forget_summary(self) -> None:
        """A run that goes on has no result yet."""
        (self.path / SUMMARY).unlink(missing_ok=True)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:  # a disk that fills up takes a part, and says so on the next call
        view = view[file.write(view) :]


def _sync_folder(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # not possible on this system
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
