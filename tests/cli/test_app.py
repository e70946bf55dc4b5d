"""One way out: exit codes and what is written on each of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import zoscope
from zoscope import NumericalError, SpecError, UsageError
from zoscope.cli import app
from zoscope.cli.options import Given


def run_zoscope(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoscope", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def raising(error: BaseException) -> Callable[[Any], NoReturn]:
    def load(self: Any) -> NoReturn:
        raise error

    return load


def test_version_is_one_line(zoscope_cli) -> None:
    finished = zoscope_cli("--version")
    assert (finished.code, finished.out) == (0, f"zoscope {zoscope.__version__}\n")


def test_help_lists_every_command_and_says_what_it_does(zoscope_cli) -> None:
    finished = zoscope_cli("--help")
    assert finished.code == 0
    for name in app.COMMANDS:
        assert f" {name} " in finished.out


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_a_help_page(zoscope_cli, name: str) -> None:
    finished = zoscope_cli(name, "--help")
    assert finished.code == 0
    assert f"zoscope {name}" in finished.out


def test_no_command_at_all_shows_the_help_and_is_a_usage_error(zoscope_cli) -> None:
    finished = zoscope_cli()
    assert finished.code == 2
    assert "Usage: zoscope" in finished.out


def test_an_unknown_command_names_the_nearest(zoscope_cli) -> None:
    finished = zoscope_cli("bund")
    assert finished.code == 2
    assert "bund" in finished.paragraph


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("no such thing"), 2), (SpecError("no such thing"), 2), (NumericalError("no such thing"), 3)],
)
def test_an_error_is_one_paragraph_with_its_exit_code(zoscope_cli, monkeypatch, error: Exception, code: int) -> None:
    monkeypatch.setattr(Given, "load", raising(error))
    finished = zoscope_cli("bounds", "x.py")
    assert finished.code == code
    assert finished.paragraph == "Error: no such thing"
    assert finished.out == ""


def test_brackets_in_a_message_are_not_markup(zoscope_cli, monkeypatch) -> None:
    monkeypatch.setattr(Given, "load", raising(UsageError("no [red]key[/red] in [tool.zoscope]")))
    assert zoscope_cli("bounds").paragraph == "Error: no [red]key[/red] in [tool.zoscope]"


def test_the_users_own_frame_follows_the_paragraph(zoscope_cli, monkeypatch) -> None:
    frame = '  File "/home/me/model.py", line 3, in problem\n    return 1 / 0'
    monkeypatch.setattr(Given, "load", raising(SpecError("it raised", frame=frame)))
    finished = zoscope_cli("bounds", "model.py")
    assert finished.code == 2
    assert finished.err == f"Error: it raised\n{frame}\n"


def test_an_interrupt_is_130_without_a_traceback(zoscope_cli, monkeypatch) -> None:
    monkeypatch.setattr(Given, "load", raising(KeyboardInterrupt()))
    finished = zoscope_cli("bounds", "model.py")
    assert finished.code == 130
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("message", ["", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"])
def test_running_out_of_memory_is_3_and_says_what_to_do(zoscope_cli, monkeypatch, message: str) -> None:
    monkeypatch.setattr(Given, "load", raising(MemoryError(message)))
    finished = zoscope_cli("bounds", "model.py")
    assert finished.code == 3
    assert "--micro-batch" in finished.paragraph


def test_a_bug_shows_its_traceback_and_is_not_mistaken_for_an_answer(zoscope_cli, monkeypatch) -> None:
    monkeypatch.setattr(Given, "load", raising(ZeroDivisionError("inside")))
    finished = zoscope_cli("bounds", "model.py")
    assert finished.code == 3
    assert "Traceback" in finished.err
    assert "bug in zoscope" in finished.err


def test_a_closed_pipe_ends_quietly(zoscope_cli, monkeypatch) -> None:
    monkeypatch.setattr(Given, "load", raising(BrokenPipeError()))
    monkeypatch.setattr(app, "_broken_pipe", lambda: app.EXIT_BROKEN_PIPE)
    finished = zoscope_cli("bounds", "model.py")
    assert (finished.code, finished.out, finished.err) == (141, "", "")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_help_into_a_closed_pipe_has_no_traceback() -> None:
    # The reader is gone before the writer starts.
    script = f"{{ sleep 1; {sys.executable} -m zoscope --help; echo code $? >&2; }} | true"
    finished = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert finished.stderr == "code 141\n"


def test_an_interrupt_while_modules_load_is_130_without_a_traceback() -> None:
    code = "import sys, builtins; import zoscope.cli; sys.modules['typer'] = None; kept = builtins.__import__\n"
    code += "def stopped(name, *args, **kwargs):\n    if name == 'typer':\n        raise KeyboardInterrupt\n"
    code += "    return kept(name, *args, **kwargs)\nbuiltins.__import__ = stopped; zoscope.cli.main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_python_dash_m_is_the_same_program() -> None:
    finished = run_zoscope("--version")
    assert (finished.returncode, finished.stdout) == (0, f"zoscope {zoscope.__version__}\n")


def test_output_survives_a_terminal_without_greek() -> None:
    finished = run_zoscope("bounds", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert finished.returncode == 0
    assert "of Adam" in finished.stdout


@pytest.mark.parametrize("command", ["bounds", "probe", "check", "track", "spectrum"])
def test_choices_are_not_cut_within_a_word_and_defaults_have_no_parentheses(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert app.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "forward-over-reverse" in shown
    assert "default: (" not in shown
