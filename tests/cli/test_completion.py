"""Completion in the shell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ZOSCOPE = f"{sys.executable} -m zoscope"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")


def in_bash(command: str, **environment: str) -> str:
    """What a command writes that bash runs as a process of its own, so that it is the shell that is found."""
    finished = subprocess.run(
        ["bash", "-c", f"{command}; exit $?"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return finished.stdout


def test_the_script_is_shown_and_installed(tmp_path: Path) -> None:
    script = in_bash(f"{ZOSCOPE} --show-completion")
    assert "_ZOSCOPE_COMPLETE=complete_bash" in script
    in_bash(f"{ZOSCOPE} --install-completion", HOME=str(tmp_path))
    (installed,) = tmp_path.rglob("zoscope.sh")
    assert installed.read_text().strip() == script.strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [("zoscope bo", {"bounds"}), ("zoscope bounds --optim", {"--optimizer"}), ("zoscope sp", {"spectrum"})],
)
def test_commands_and_options_are_completed(words: str, expected: set[str]) -> None:
    environment = {"_ZOSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert set(in_bash(ZOSCOPE, **environment).split()) == expected
