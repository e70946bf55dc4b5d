"""No text from outside acts on a terminal, whatever it comes from and wherever it goes."""

import ast
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import zoscope
from zoscope.cli.app import complain, run
from zoscope.text import clean, clean_json

PACKAGE = Path(zoscope.__file__).parent
EVIL = "w\x1b]0;TITLE\x07\x1b[31m\x1b[2J\x9b31m\x7f\u202egnp\u2028\udc80[red]x[/foo]:bug:"
RAW = [character for character in EVIL if not character.isprintable()]

FUNCTION = """
import torch, zoscope
def problem(evil=""):
    if evil:
        raise ValueError({evil!r})
    return zoscope.Problem.from_function(lambda x: (x ** 4).sum(), torch.ones(3), name={evil!r})
"""


def harmless(text: str) -> bool:
    return not [character for character in RAW if character in text]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(FUNCTION.format(evil=EVIL))
    torch.save({EVIL.replace("\udc80", ""): torch.zeros(3)}, tmp_path / "evil.pt")
    return tmp_path / "model.py"


def test_what_acts_on_a_terminal_is_shown() -> None:
    assert clean("a\tb\nη ✅") == "a\tb\nη ✅"
    assert clean("\x1b[2J\x07\x7f\x9b\u202e\ud800\r") == "␛[2J␇␡���␍"
    assert len(clean(EVIL)) == len(EVIL)
    assert harmless(clean(EVIL))


def test_json_loses_nothing() -> None:
    document = clean_json(json.dumps({EVIL: EVIL}, ensure_ascii=False))
    assert harmless(document)
    assert json.loads(document) == {EVIL: EVIL}


def test_exceptions_and_results_are_clean_wherever_they_are_shown() -> None:
    assert harmless(str(zoscope.ZoscopeError(EVIL)))
    found = zoscope.bounds(zoscope.Problem.from_function(lambda x: (x**4).sum(), torch.ones(3)), spec=EVIL)
    assert harmless(str(found))
    assert harmless(found._repr_mimebundle_()["text/html"].replace("\u2028", ""))
    shown = io.StringIO()
    Console(file=shown, force_terminal=True, width=100, color_system=None).print(found)
    assert harmless(shown.getvalue())
    assert "[red]x[/foo]" in shown.getvalue()


def test_an_error_with_a_frame_is_clean() -> None:
    written = io.StringIO()
    complain(EVIL, frame=f"  File {EVIL}\n    x = 1", file=written)
    assert harmless(written.getvalue())
    assert written.getvalue().count("\n") == 3


@pytest.mark.parametrize(
    "args",
    [
        ["bounds", "model.py", "--checkpoint", "evil.pt"],
        ["bounds", "model.py", "--set", "evil=1"],
        ["bounds", "model.py", "--set", EVIL],
        ["bounds", f"{EVIL}.py"],
        ["bounds", "model.py", "--params", EVIL],
        ["bounds", "model.py", "--optimizer", EVIL],
        ["bounds", "model.py", f"--{EVIL}"],
        ["bounds", "model.py", "--quiet"],
        ["bounds", "model.py", "--json"],
        ["check", f"{EVIL}.yaml"],
        ["check", "evil.yaml"],
        ["check", "good.yaml", "--format", "github"],
        ["check", "good.yaml", "--format", "markdown"],
        ["check", "good.yaml", "--format", "junit"],
        ["check", "good.yaml", "--format", "sarif"],
        ["check", "good.yaml", "--format", "json"],
        ["check", "good.yaml"],
        ["check", "failing.yaml"],
        ["check", "failing.yaml", "--format", "markdown"],
        ["check", "evil.yaml", "--format", "github"],
        ["track", "model.py", "--lr", "0.001", "--steps", "2", "--every", "1", "--run", "\x1b[2J[/foo]"],
        ["track", "--resume", EVIL],
        ["track", "--compare", EVIL],
        ["init", f"{EVIL}.txt"],
    ],
)
def test_no_command_lets_anything_through(
    spec: Path, args: list[str], capsys: pytest.CaptureFixture[str], without_pictures: None
) -> None:
    check = (
        'checks: [{{name: "[/foo]\\u202ex", spec: model.py, optimizer: {{name: gd, lr: 99}}, set: {{evil: "{0}"}}}}]\n'
    )
    (spec.parent / "good.yaml").write_text(check.format(""))
    (spec.parent / "failing.yaml").write_text(check.format("1"))
    (spec.parent / "evil.yaml").write_text(f'{check.format("")}"\\u202e\\u009b31m": 1\n')
    run(args)
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert harmless(captured.out + captured.err)
    assert "Traceback" not in captured.err


def test_nothing_is_printed_but_through_the_one_console() -> None:
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name != "Console", f"{where}:{node.lineno}"
            writes = name in {"sys.stdout.write", "sys.stderr.write"}
            assert not writes or where in {"cli/output.py", "cli/app.py", "cli/__init__.py"}, f"{where}:{node.lineno}"
