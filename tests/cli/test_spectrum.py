"""``zoscope spectrum`` from end to end."""

import json
from pathlib import Path

import pytest

MODEL = """
import torch, zoscope
def problem(negative=0.3):
    d = torch.logspace(-4, 1, 200, dtype=torch.float64)
    d[::3] *= -negative
    return zoscope.Problem.from_function(lambda x: 0.5 * (d * x * x).sum(), torch.ones_like(d))
"""
SAMPLED = ("--method", "deflated-slq", "--max-hvps", "150")


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


def test_the_document_holds_ends_density_and_layers(zoscope_cli) -> None:
    finished = zoscope_cli("spectrum", "model.py", "--top", "3", "--by-layer", "--json", *SAMPLED)
    assert finished.code == 0, finished.err
    found = json.loads(finished.out)
    assert found["schema"] == "zoscope.spectrum/1"
    assert found["top"][0]["value"] == pytest.approx(10.0, rel=0.15)
    assert len(found["top"]) == 3
    assert found["bottom"][0]["value"] < 0
    assert [layer["name"] for layer in found["layers"]] == ["x"]
    assert found["num_hvps"] <= 150 + 4  # checks: symmetry, and three directions of differences


def test_tables_keep_to_the_width_of_the_terminal(zoscope_cli, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    finished = zoscope_cli("spectrum", "model.py", "--by-layer", *SAMPLED, "-v")
    assert finished.code == 0, finished.err
    assert "Where the eigenvalues are" in finished.out
    assert max(len(line.rstrip()) for line in finished.out.splitlines()) <= 80


@pytest.mark.parametrize("name", ["spectrum.png", "spectrum.svg"])
def test_a_picture_is_written_beside_the_tables(zoscope_cli, tmp_path: Path, name: str) -> None:
    finished = zoscope_cli("spectrum", "model.py", "--plot", name)
    assert finished.code == 0, finished.err
    assert "effective rank" in finished.out
    assert (tmp_path / name).stat().st_size > 5000


def test_a_file_holds_the_document(zoscope_cli, tmp_path: Path) -> None:
    assert zoscope_cli("spectrum", "model.py", "--output", "found.json").code == 0
    assert json.loads((tmp_path / "found.json").read_text())["schema"] == "zoscope.spectrum/1"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--plot", "spectrum.txt"), "--plot: spectrum.txt"),
        (("--plot", "nowhere/spectrum.png"), "--plot: there is no folder nowhere"),
        (("--top", "0"), "--top: got 0"),
        (("--curvature", "forward"), "--curvature: unknown value 'forward'. Expected one of hessian, ggn"),
        (("--rtol", "2"), "--rtol: got 2"),
        (("--moments", "--by-layer"), "--moments with --by-layer"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_2(zoscope_cli, args: tuple[str, ...], words: str) -> None:
    finished = zoscope_cli("spectrum", "model.py", *args)
    assert finished.code == 2
    assert words in finished.paragraph


def test_with_strict_a_precision_out_of_reach_exits_3_after_the_result(zoscope_cli) -> None:
    args = ("spectrum", "model.py", "--method", "deflated-slq", "--max-hvps", "24", "--rtol", "1e-4")
    honest = zoscope_cli(*args)
    assert honest.code == 0
    assert "Warning precision: " in honest.err
    strict = zoscope_cli(*args, "--strict")
    assert strict.code == 3
    assert "effective rank" in strict.out
    assert strict.err.splitlines()[-1].startswith("Error: ")


def test_moments_alone(zoscope_cli, monkeypatch) -> None:
    finished = zoscope_cli("spectrum", "model.py", "--moments", "--rtol", "0.05", "--json")
    assert finished.code == 0, finished.err
    found = json.loads(finished.out)
    assert found["schema"] == "zoscope.moments/1"
    assert found["curvature"]["hessian"]["lambda_max"]["value"] == pytest.approx(10.0, rel=0.01)
    assert "density" not in found
    monkeypatch.setenv("COLUMNS", "80")
    shown = zoscope_cli("spectrum", "model.py", "--moments", "--rtol", "0.05")
    assert "‖·‖_F²" in shown.out
    assert max(len(line.rstrip()) for line in shown.out.splitlines()) <= 80


def test_moments_that_are_not_precise_enough_exit_3_with_strict(zoscope_cli) -> None:
    args = ("spectrum", "model.py", "--moments", "--max-hvps", "24", "--rtol", "1e-4")
    honest = zoscope_cli(*args, "-v")
    assert honest.code == 0
    assert "--rtol 0.0001" in honest.err
    assert "--method" not in honest.err
    assert zoscope_cli(*args, "--strict").code == 3
