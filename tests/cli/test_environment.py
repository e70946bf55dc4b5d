"""The command line in environments that are not as they should be: the result, or one paragraph."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoscope import UsageError
from zoscope.cli.app import is_ranked
from zoscope.report.console import usable

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX streams")
SPEC = """
import torch, zoscope
problem = lambda: zoscope.Problem.from_function(lambda x: (x ** 4).sum(), torch.ones(3))
"""
ARGS = ["bounds", "model.py", "--quiet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(SPEC)
    return tmp_path


def started(folder: Path, *args: str, python: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, *python, "-m", "zoscope", *(args or ARGS)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=100)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def test_sizes_that_no_terminal_has_are_left_out() -> None:
    for text in ("0", "x", "", "-5", "²", "9" * 40, "1e3"):
        assert usable({"COLUMNS": text, "LINES": text, "TERMINAL_WIDTH": text}) == {}
    assert usable({"COLUMNS": "1"})["COLUMNS"] == "50"  # no number of a table is cut in two
    assert usable({"COLUMNS": "999999"})["COLUMNS"] == "1000"
    assert usable({"COLUMNS": "80", "HOME": "x"}) == {"COLUMNS": "80", "HOME": "x"}


def test_a_terminal_without_columns_shows_the_tables(folder: Path) -> None:
    code, out, err = started(folder, COLUMNS="0", LINES="0", TERMINAL_WIDTH="x")
    assert (code, err) == (0, "")
    assert "use lr" in out


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_locale_without_greek_shows_question_marks(folder: Path, environment: dict[str, str]) -> None:
    code, out, err = started(folder, *ARGS, "--output", "out.txt", **environment)
    assert (code, err) == (0, "")
    assert "use lr" in out
    assert "= falls  o use  | edge" in out
    assert "λ" in (folder / "out.txt").read_text(encoding="utf-8")


def test_python_without_docstrings_runs(folder: Path) -> None:
    code, out, err = started(folder, python=("-OO",))
    assert (code, err) == (0, "")
    assert "use lr" in out


def shell(folder: Path, line: str) -> tuple[int, str]:
    command = f"{sys.executable} -m zoscope {line}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=100)
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
@pytest.mark.parametrize("line", ["bounds model.py -q", "bounds model.py -q --json"])
def test_a_stdout_that_takes_nothing_is_one_paragraph(folder: Path, redirection: str, line: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    code, said = shell(folder, f"{line} {redirection}")
    assert code == 3
    assert said.startswith("Error: Standard output does not take the result (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-"])
def test_a_result_comes_without_the_other_streams(folder: Path, redirection: str) -> None:
    code, said = shell(folder, f"bounds model.py {redirection}")
    assert code == 0
    assert "use lr" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "ranked"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"WORLD_SIZE": "4"}, False),
        ({"RANK": "", "WORLD_SIZE": ""}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, True),
    ],
)
def test_an_environment_names_a_job_or_does_not(environment: dict[str, str], ranked: bool) -> None:
    assert is_ranked(environment) is ranked


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "x"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "²", "WORLD_SIZE": "3"},
        {"RANK": "0", "WORLD_SIZE": "9" * 5000},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1.5"},
    ],
)
def test_a_job_that_cannot_be_is_one_paragraph(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="as torchrun sets it"):
        is_ranked(environment)
