"""One thread for every test and for the programs that tests start: the kernels are small. And no wishes of the user."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in (
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),  # of terminals
    *("GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY"),  # where a workflow that runs the tests has its own files
):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last result of a test is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed: the picture of a tracked run takes ten times as long as a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
