"""The command line in this process, as ``zoscope`` would run it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from zoscope.cli.app import run


@dataclass(frozen=True)
class Finished:
    """Exit code and what was written."""

    code: int
    out: str
    err: str

    @property
    def paragraph(self) -> str:
        """The error, which must be one line without a traceback."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: "), self.err
        return lines[0]


Zoscope = Callable[..., Finished]


@pytest.fixture
def zoscope_cli(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Zoscope:
    """Run ``zoscope *args`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    def call(*args: str | Path) -> Finished:
        words: Sequence[str] = [str(arg) for arg in args]
        code = run(words)
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    return call
