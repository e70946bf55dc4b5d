"""``zoscope bounds --curvature forward`` and ``--estimate`` from the file to the answer."""

import json
from pathlib import Path

import pytest

BLACK_BOX = """
import numpy as np, torch, zoscope
WEIGHTS = np.linspace(0.5, 2.0, 50)

def simulator(x):
    return float(0.5 * np.sum(WEIGHTS * np.asarray(x) ** 2))

problem = zoscope.Problem.from_function(simulator, torch.ones(50, dtype=torch.float64))
"""


@pytest.fixture
def black_box(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(BLACK_BOX)
    return file


def test_a_simulator_gets_a_table_of_what_can_be_known(zoscope_cli, black_box: Path) -> None:
    finished = zoscope_cli("bounds", black_box, "--curvature", "forward", "--lr", "0.5", "--rtol", "0.2", "-v")
    assert finished.code == 0, finished.err
    for text in ("directions, two forward passes each", "not known", "H ⪰ 0", "blows up in the long run"):
        assert text in " ".join(finished.out.split())
    assert "Forward passes see Tr H and ‖H‖_F² but no spectrum" in finished.err


def test_the_document_has_the_error_bars(zoscope_cli, black_box: Path) -> None:
    finished = zoscope_cli("bounds", black_box, "--curvature", "forward", "--json", "--quiet")
    document = json.loads(finished.out)
    trace = document["curvature"]["hessian"]["trace"]
    assert abs(trace["value"] - 62.5) <= 1.96 * trace["stderr"] + trace["quadrature"]
    assert document["optimizers"]["gd"]["forward"]["upper"]["stderr"] > 0


def test_without_forward_passes_the_simulator_is_refused_with_the_remedy(zoscope_cli, black_box: Path) -> None:
    finished = zoscope_cli("bounds", black_box)
    assert finished.code == 2
    assert "--curvature forward" in finished.err


def test_a_simulator_that_fails_elsewhere_is_told_with_its_own_line(zoscope_cli, black_box: Path) -> None:
    failing = "    if np.asarray(x).max() > 1: raise ValueError('out of range')\n    return float("
    black_box.write_text(BLACK_BOX.replace("    return float(", failing))
    finished = zoscope_cli("bounds", black_box, "--curvature", "forward")
    assert finished.code == 2
    assert "raised ValueError: out of range (model.py, line 6). Parameters are varied" in " ".join(finished.err.split())


def test_strict_shows_the_result_and_exits_3(zoscope_cli, black_box: Path) -> None:
    finished = zoscope_cli(
        "bounds", black_box, "--curvature", "forward", "--rtol", "0.001", "--max-hvps", "60", "--strict"
    )
    assert finished.code == 3
    assert "was not reached" in finished.err


def test_the_estimate_recommends_what_works(zoscope_cli, black_box: Path) -> None:
    finished = zoscope_cli("bounds", black_box, "--estimate")
    assert finished.code == 0, finished.err
    assert "Use --curvature forward" in finished.out
    document = json.loads(zoscope_cli("bounds", black_box, "--estimate", "--json").out)
    assert document["schema"] == "zoscope.estimate/1"
    assert document["recommended"]["curvature"] == "forward"
    assert document["curvature"]["hessian"]["available"] is False
    assert document["curvature"]["forward"]["seconds"] > 0
