"""Results go to stdout, files appear whole or not at all."""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from zoscope import UsageError
from zoscope.cli import output
from zoscope.cli.options import OutputOptions


@dataclass(frozen=True)
class Result:
    """A result of one number."""

    value: float = 1.5
    warnings = ()

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "test/1", "value": self.value, "name": "η"}

    def report(self, *, verbose: bool = False, warnings: bool = True) -> Table:
        table = Table("η*")
        table.add_row(f"[bold]{self.value}[/bold]")
        return table


def test_json_is_one_document_and_nothing_else(capsys) -> None:
    output.emit(Result(), OutputOptions(json=True))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == Result().to_dict()
    assert captured.err == ""


NOISY = """
import os, torch, zoscope
os.write(1, b"a library\\n")
os.system("echo a program")
def loss(x):
    os.write(1, b"in the loss\\n")
    print("printed")
    return x.square().sum()
problem = zoscope.Problem.from_function(loss, torch.ones(3))
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell")
def test_what_runs_below_python_stays_out_of_the_json(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(NOISY)
    done = zoscope_cli("bounds", "model.py", "--json", "--quiet")
    assert json.loads(done.out)["schema"] == "zoscope.bounds/1"
    for said in ("a library", "a program", "in the loss", "printed"):
        assert said in done.err


def test_json_never_holds_nan(capsys) -> None:
    with pytest.raises(ValueError, match="JSON"):
        output.emit(Result(float("nan")), OutputOptions(json=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "as_json", "kind"), [("a.json", False, "json"), ("a.txt", True, "json"), ("a.txt", False, "text")]
)
def test_the_file_holds_json_when_its_name_or_json_says_so(tmp_path: Path, name: str, as_json: bool, kind: str) -> None:
    file = tmp_path / name
    output.emit(Result(), OutputOptions(json=as_json, output=file))
    text = file.read_text(encoding="utf-8")
    if kind == "json":
        assert json.loads(text) == Result().to_dict()
    else:
        assert "η*" in text
        assert "1.5" in text
        assert "\x1b" not in text


def test_stdout_is_the_same_with_and_without_a_file(tmp_path: Path, capsys) -> None:
    output.emit(Result(), OutputOptions())
    alone = capsys.readouterr().out
    output.emit(Result(), OutputOptions(output=tmp_path / "result.json"))
    assert capsys.readouterr().out == alone


def test_an_old_file_survives_a_failed_write(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match="No space left"):
        output.write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_new_file_has_the_usual_mode_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    output.write_whole(tmp_path / "new", "x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    usual.chmod(0o600)
    output.write_whole(usual, "x")
    assert stat.S_IMODE(usual.stat().st_mode) == 0o600


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch()
    link.symlink_to(target)
    output.write_whole(link, "x")
    assert link.is_symlink()
    assert target.read_text() == "x"


def test_a_device_is_written_to_and_not_replaced() -> None:
    output.check_writable(Path(os.devnull))
    output.write_whole(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()


def test_an_unwritable_place_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        output.check_writable(tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        output.check_writable(tmp_path / "missing" / "result.json")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no folder"):
        output.check_writable(tmp_path / "file" / "result.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_checking_a_place_leaves_nothing_behind(tmp_path: Path) -> None:
    output.check_writable(tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []
