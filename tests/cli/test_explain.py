"""``zoscope explain``: every notice has an explanation, with the numbers of the last run.

``GOLDEN=write`` writes the page of the guide.
"""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import zoscope
from zoscope.analysis import explanations
from zoscope.analysis.explanations import EXPLANATIONS
from zoscope.cli import output

PACKAGE = Path(zoscope.__file__).parent
SADDLE = """
import torch, zoscope
H = torch.diag(torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64))
problem = zoscope.Problem.from_function(lambda x: 0.5 * x @ H @ x, torch.ones(3, dtype=torch.float64))
"""


def emitted() -> Iterator[str]:
    """Codes in the calls that make notices; those that are passed on from another notice have one already."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in {"Notice", "notify"}:
                continue
            code = node.args[0]
            if isinstance(code, ast.Constant):
                yield code.value
            elif isinstance(code, ast.Name) and code.id.isupper():
                yield getattr(explanations, code.id)
            else:
                assert ast.unparse(code) in {"code", "notice.code", "entry['code']"}, f"{path}:{node.lineno}"


def test_every_notice_has_an_explanation_and_every_explanation_a_notice() -> None:
    assert {*emitted()} == {*EXPLANATIONS}


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_an_explanation_is_sentences_and_its_clause_fits_a_line(code: str) -> None:
    found = EXPLANATIONS[code]
    assert len(f"{found.word} {code}: {found.clause}") <= 80
    assert not found.clause.endswith(".")
    for text in (found.means, found.matters, found.remedy):
        assert text.endswith(".")
        assert text[0].isupper() or text.startswith(("`", "η"))


def page() -> str:
    """The page of the guide."""
    parts = [
        "# Notices",
        "What each notice means, why it matters and what to do, those that matter most first. `zoscope explain CODE` "
        "says the same, with the numbers of the last run.",
    ]
    for code, found in EXPLANATIONS.items():
        parts += [f"## {code}", f"{found.means} {found.matters}", f"**What to do:** {found.remedy}"]
    return "\n\n".join(parts) + "\n"


def test_the_page_of_the_guide_is_up_to_date() -> None:
    file = Path(__file__).parents[2] / "examples" / "guide" / "notices.md"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(page(), encoding="utf-8")
    assert file.read_text(encoding="utf-8") == page()


def test_a_code_is_explained(zoscope_cli) -> None:
    finished = zoscope_cli("explain", "few-modes")
    assert (finished.code, finished.err) == (0, "")
    for line in ("Note few-modes: ", "means ", "matters ", "do "):
        assert line in finished.out
    assert "last run" not in finished.out


def test_without_a_code_all_are_listed(zoscope_cli) -> None:
    finished = zoscope_cli("explain")
    assert finished.code == 0
    assert all(f"  {code} " in finished.out for code in EXPLANATIONS)


def test_a_code_that_there_is_not_is_told_the_nearest(zoscope_cli) -> None:
    finished = zoscope_cli("explain", "few-mods")
    assert finished.code == 2
    assert "few-modes" in finished.paragraph


def test_the_last_run_is_named_with_its_numbers(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "saddle.py").write_text(SADDLE)
    zoscope_cli("bounds", "saddle.py")
    shown = " ".join(zoscope_cli("explain", "indefinite-hessian").out.split())
    assert "last run saddle.py: The Hessian is indefinite" in shown
    assert "-0.25" in shown
    assert zoscope_cli("explain").out.startswith("In the last run\n")
    zoscope_cli("check", "--spec", "saddle.py", "--optimizer", "zo-gd", "--lr", "0.1")
    assert "last run" in zoscope_cli("explain", "indefinite-hessian").out


def test_a_result_that_is_too_large_keeps_its_notices(monkeypatch) -> None:
    notices = [{"code": "few-modes", "message": "Few."}]
    output.remember(
        json.dumps({"schema": "a/1", "spec": "m.py", "curve": [0] * output.MOST_REMEMBERED, "warnings": notices})
    )
    assert output.remembered() == {"schema": "a/1", "spec": "m.py", "warnings": notices}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_no_room_for_the_last_result_is_nobody_s_trouble(zoscope_cli, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "saddle.py").write_text(SADDLE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    finished = zoscope_cli("bounds", "saddle.py", "-q")
    assert (finished.code, finished.err) == (0, "")
    assert zoscope_cli("explain", "few-modes").code == 0


def test_a_last_result_that_is_broken_counts_as_none(zoscope_cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for text in ("{", "[]", '{"warnings": 3}', '{"warnings": [1, {"code": "few-modes"}]}'):
        (tmp_path / "zoscope").mkdir(exist_ok=True)
        (tmp_path / "zoscope" / output.LAST).write_text(text)
        assert zoscope_cli("explain", "few-modes").code == 0
