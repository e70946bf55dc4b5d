"""``zoscope report`` and ``--html``, ``--plot`` of the other commands: files that the command line writes."""

import json
import shutil
from pathlib import Path

import pytest

QUADRATIC = Path(__file__).parents[2] / "examples" / "quadratic.py"
GOLDEN = Path(__file__).parents[1] / "golden"
CHECKS = """
problem: quadratic.py
checks:
  - {name: low, optimizer: {name: zo-gd, lr: 0.001}}
  - {name: high, optimizer: {name: gd, lr: 9.0}}
"""


def result(folder: Path, name: str) -> Path:
    """A document of the golden files, as ``--json`` wrote it."""
    document = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["runs"][-1]["stdout"]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document | {"seconds": 1.0}), encoding="utf-8")
    return path


def data(page: Path, number: int = 0) -> dict:
    text = page.read_text(encoding="utf-8")
    start = text.index(f'id="data-{number}">') + len(f'id="data-{number}">')
    return json.loads(text[start : text.index("</script>", start)])


def needs_plotly() -> None:
    pytest.importorskip("plotly", reason="needs plotly: pip install 'zoscope[report]'")


def test_several_results_become_one_page(zoscope_cli, tmp_path: Path) -> None:
    needs_plotly()
    paths = [result(tmp_path, name) for name in ("bounds", "plan", "check")]
    done = zoscope_cli("report", *paths, "--html", "page.html")
    assert done.code == 0, done.err
    assert done.out == ""
    assert done.err.startswith("page.html: ")
    for number, path in enumerate(paths):
        assert data(tmp_path / "page.html", number) == json.loads(path.read_text())
    assert "zoscope report" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_folders_of_runs_are_results_too(zoscope_cli, tmp_path: Path) -> None:
    needs_plotly()
    sweep = ("--lr", "0.001", "--steps", "20", "--every", "10", "--sweep", "seed=0,1", "--run", "all", "-q")
    assert zoscope_cli("track", QUADRATIC, *sweep).code == 0
    done = zoscope_cli("report", "all", "all/seed=1", "--html", "page.html", "-q")
    assert (done.code, done.err) == (0, "")
    assert data(tmp_path / "page.html", 0)["schema"] == "zoscope.track-comparison/1"
    assert data(tmp_path / "page.html", 1)["schema"] == "zoscope.track/1"


def test_a_command_writes_a_page_and_a_picture_of_its_result(zoscope_cli, tmp_path: Path) -> None:
    needs_plotly()
    done = zoscope_cli("bounds", QUADRATIC, "--html", "a page.html", "--plot", "a.svg", "--json", "--quiet")
    assert done.code == 0, done.err
    assert data(tmp_path / "a page.html") == json.loads(done.out)
    text = (tmp_path / "a page.html").read_text(encoding="utf-8")
    assert "--html &#x27;a page.html&#x27; --plot a.svg --json --quiet</code>" in text
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("plan", ("--steps", "20", "--replicas", "2")),
        ("plan", ("--only", "mu")),
        ("probe", ("--optimizer", "gd")),
        ("spectrum", ("--moments",)),
        ("track", ("--lr", "0.001", "--steps", "20", "--every", "10", "--run", "one")),
    ],
)
def test_every_command_has_a_page(zoscope_cli, tmp_path: Path, command: str, options: tuple[str, ...]) -> None:
    needs_plotly()
    done = zoscope_cli(command, QUADRATIC, *options, "--html", "page.html", "--json", "-q")
    assert done.code == 0, done.err
    assert data(tmp_path / "page.html") == json.loads(done.out)


def test_checks_have_a_picture_and_a_page_also_when_they_fail(zoscope_cli, tmp_path: Path) -> None:
    needs_plotly()
    shutil.copy(QUADRATIC, tmp_path)
    (tmp_path / "zoscope.yaml").write_text(CHECKS)
    done = zoscope_cli("check", "--plot", "checks.png", "--html", "checks.html", "--json", "-q")
    assert done.code == 1
    assert (tmp_path / "checks.png").read_bytes().startswith(b"\x89PNG")
    assert data(tmp_path / "checks.html") == json.loads(done.out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("report", "a.json"), "--html is missing"),
        (("report", "--html", "page.html"), "RESULT is missing"),
        (("report", "a.json", "--html", "page.txt"), "--html: page.txt has no page's name"),
        (("report", "gone.json", "--html", "page.html"), "gone.json: cannot be read (No such file"),
        (("report", "empty.json", "--html", "page.html"), "empty.json: cannot be read (Expecting value"),
        (("report", "list.json", "--html", "page.html"), "list.json: this is no result of zoscope"),
        (
            ("report", "half.json", "--html", "page.html"),
            "half.json: this is no whole zoscope.plan/1 document",
        ),
        (
            ("report", "new.json", "--html", "page.html"),
            "new.json: this is a zoscope.plan/9 document of another version",
        ),
        (("report", "bent.json", "--html", "page.html"), "bent.json: this is no whole zoscope.bounds/1 document ("),
        (("report", ".", "--html", "page.html"), "no run"),
        (("bounds", QUADRATIC, "--html", "nowhere/page.html"), "--html: there is no folder nowhere"),
        (("bounds", QUADRATIC, "--plot", "a.bmp"), "--plot: a.bmp has no picture's name"),
        (("bounds", QUADRATIC, "--estimate", "--plot", "a.png"), "--estimate with --plot"),
        (("check", "--spec", QUADRATIC, "--plot", "a.bmp"), "--plot: a.bmp has no picture's name"),
        (("spectrum", QUADRATIC, "--moments", "--plot", "a.png"), "--moments with --plot"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_2(zoscope_cli, tmp_path: Path, args, words: str) -> None:
    if "page.html" in args or "nowhere/page.html" in args:
        needs_plotly()
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('{"schema": "zoscope.plan/1"}')
    (tmp_path / "new.json").write_text('{"schema": "zoscope.plan/9"}')
    bent = json.loads(result(tmp_path, "bounds").read_text())
    (tmp_path / "bent.json").write_text(json.dumps(bent | {"optimizers": {"gd": "none"}}))
    done = zoscope_cli(*args)
    assert done.code == 2, done.err
    assert words in done.paragraph
    assert not (tmp_path / "page.html").exists()
