"""The README and the guide: every command and option in them exists, every link leads somewhere, code is Python."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import zoscope
from zoscope.cli.app import build

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide"
PAGES = [ROOT / "README.md", *sorted(page for page in GUIDE.glob("*.md") if page.name != "options.md")]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[str, str]]:
    """Name and rest of what starts a line of a block, or stands between backticks."""
    code = "\n".join(blocks(text, "[a-z]*"))
    typed = re.findall(r"^ *(?:\$ |torchrun .*-m (?:-- )?)?zoscope ([a-z]+)\b([^#\n]*)", code, flags=re.MULTILINE)
    return typed + re.findall(r"`zoscope ([a-z]+)\b([^`\n]*)`", text)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@EVERY_PAGE
def test_every_command_and_option_exists(page: Path) -> None:
    group = typer.main.get_command(build())
    for name, rest in commands(page.read_text(encoding="utf-8")):
        assert name in group.commands, f"zoscope {name}"  # type: ignore[attr-defined]
        known = {option for parameter in group.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"(?<= )--[a-z][a-z-]*", rest)) <= known, f"zoscope {name}{rest}"


@EVERY_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@EVERY_PAGE
def test_code_is_python_and_its_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        ast.parse(block)
    for name in re.findall(r"\bzoscope\.([A-Za-z_]+)\(", text):
        assert hasattr(zoscope, name), name


def test_the_readme_s_loop_trains() -> None:
    (code,) = (b for b in blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python") if "AutoLR" in b)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    x = torch.randn(16, 4)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - 1).square().mean()

    before = loss(model, x).item()
    exec(code, {"zoscope": zoscope, "model": model, "loss": loss, "batches": [x] * 3000})
    assert loss(model, x).item() < before


PREAMBLE = """
from collections.abc import Iterable
from typing import Any

import torch

import zoscope

model: torch.nn.Module
batches: Iterable[Any]


def load(checkpoint: str) -> tuple[torch.nn.Module, Iterable[Any]]: ...
def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor: ...
"""
"""What the code of the README takes to be there."""


def test_the_readme_s_code_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "readme.py").write_text("\n".join([PREAMBLE, *blocks((ROOT / "README.md").read_text(), "python")]))
    # What zoscope is made of takes most of the time, and says nothing of its options. The preamble's bodies are empty.
    settings = "[mypy]\ndisable_error_code = empty-body\n[mypy-torch.*,numpy.*,scipy.*,rich.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings)
    home = Path(zoscope.__file__).parents[1]
    # mypy finds by itself what is installed, and refuses to be told where that is.
    environment = os.environ if home.name == "site-packages" else {**os.environ, "MYPYPATH": str(home)}
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    done = subprocess.run([*command, "readme.py"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
