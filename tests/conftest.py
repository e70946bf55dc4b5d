"""One thread for every test and for the programs that tests start: the kernels are small. And no wishes of the user."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in (
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),  # of terminals
    *("GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY"),  # where a workflow that runs the tests has its own files
):
    os.environ.pop(name, None)


LONG = Path(__file__).with_name("long.txt")
"""Tests that take most of the time of all, one node a line, from the folder of this file on."""


@pytest.hookimpl(tryfirst=True)  # before those that are not wanted are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long."""
    long = set(LONG.read_text(encoding="utf-8").splitlines())
    for item in items:
        name = item.path.relative_to(LONG.parent).as_posix() + item.nodeid[item.nodeid.index("::") :]
        if name in long or name.partition("[")[0] in long:
            item.add_marker("long")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last result of a test is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed: the picture of a tracked run takes ten times as long as a short run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
