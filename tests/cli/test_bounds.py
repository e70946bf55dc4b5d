"""``zoscope bounds`` from the file to the answer."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUADRATIC = Path(__file__).parents[2] / "examples" / "quadratic.py"
CLOSED_FORM = 1e-8  # relative, what the dense path promises

SMALL = """
import torch, zoscope
H = torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
def problem(scale=1.0):
    print("the user's own words")
    return zoscope.Problem.from_function(lambda x: 0.5 * scale * x @ H @ x, torch.ones(3, dtype=torch.float64))
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(SMALL)
    return file


def document(zoscope_cli, *args: str | Path) -> dict[str, Any]:
    finished = zoscope_cli("bounds", *args, "--json")
    assert finished.code == 0, finished.err
    found: dict[str, Any] = json.loads(finished.out)
    return found


def test_the_quadratic_has_the_thresholds_of_its_closed_form(zoscope_cli) -> None:
    found = document(zoscope_cli, QUADRATIC)
    gd, gdm = found["optimizers"]["gd"], found["optimizers"]["gdm"]
    expected = {
        "lower": 2 / (40 + 2 * 5),
        "upper": 2 / 40,
        "upper_tight": 2 / (40 + 2 * 110 / 40),
        "exact": 1 / 23,
        "descent": 2 / (40 + 2 * 505 / 110),
    }
    assert gd["fo"] == pytest.approx(2 / 5, rel=CLOSED_FORM)
    for name, value in expected.items():
        assert gd["zo"][name] == pytest.approx(value, rel=CLOSED_FORM), name
    assert gd["zo"]["exact_ci95"] == pytest.approx([1 / 23, 1 / 23], rel=CLOSED_FORM)
    assert gdm["fo"] == pytest.approx(2 * 1.9 / 5, rel=CLOSED_FORM)
    assert gdm["zo"]["lower"] == pytest.approx(0.2 / (40 + 2 / 1.9 * 5), rel=CLOSED_FORM)
    assert found["curvature"]["hessian"]["method"] == "dense"
    assert found["problem"]["loss"] == pytest.approx(20, rel=CLOSED_FORM)


def test_rotating_the_quadratic_changes_nothing(zoscope_cli) -> None:
    found = document(zoscope_cli, QUADRATIC, "--set", "seed=5", "--optimizer", "zo-gd")
    assert list(found["optimizers"]) == ["gd"]
    assert found["optimizers"]["gd"]["zo"]["exact"] == pytest.approx(1 / 23, rel=CLOSED_FORM)


def test_the_document_says_what_was_measured(zoscope_cli, small: Path) -> None:
    found = document(zoscope_cli, "model.py", "--seed", "3", "--steps", "50", "--queries", "2", "--device", "cpu")
    assert found["schema"] == "zoscope.bounds/1"
    assert (found["spec"], found["seed"], found["device"]) == ("model.py", 3, "cpu")
    assert found["estimator"] == {"directions": "gaussian", "queries": 2}
    assert found["optimizers"]["gd"]["zo"]["horizon"]["steps"] == 50


def test_settings_reach_the_users_function(zoscope_cli, small: Path) -> None:
    once = document(zoscope_cli, "model.py")["optimizers"]["gd"]["zo"]["exact"]
    assert document(zoscope_cli, "model.py", "--set", "scale=2.0")["optimizers"]["gd"]["zo"]["exact"] == (
        pytest.approx(once / 2, rel=CLOSED_FORM)
    )


def test_a_spec_left_out_is_found_and_the_header_says_where(zoscope_cli, small: Path, tmp_path: Path) -> None:
    assert "model.py (found here)" in zoscope_cli("bounds").out
    small.rename(tmp_path / "net.py")
    (tmp_path / "zoscope.yaml").write_text("problem: net.py\n")
    assert "net.py (from zoscope.yaml)" in zoscope_cli("bounds").out


def test_what_the_users_code_prints_stays_out_of_the_result(zoscope_cli, small: Path) -> None:
    finished = zoscope_cli("bounds", "model.py", "--json")
    json.loads(finished.out)
    assert "the user's own words" in finished.err


@pytest.mark.parametrize("columns", ["80", "120"])
def test_tables_keep_to_the_width_of_the_terminal(zoscope_cli, small: Path, monkeypatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    finished = zoscope_cli("bounds", "model.py", "--lr", "0.1")
    assert finished.code == 0
    assert max(len(line.rstrip()) for line in finished.out.splitlines()) <= int(columns)


def test_warnings_go_to_stderr_unless_silenced(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "saddle.py").write_text(SMALL.replace("0.25]", "-0.25]"))
    said = zoscope_cli("bounds", "saddle.py")
    codes = {warning["code"] for warning in document(zoscope_cli, "saddle.py")["warnings"]}
    assert codes
    assert all(code in said.err for code in codes)
    assert len((said.out + said.err).splitlines()) <= 12
    assert "indefinite" not in said.out
    whole = zoscope_cli("bounds", "saddle.py", "-v")
    assert "Warning: The Hessian is indefinite: " in whole.err
    assert zoscope_cli("bounds", "saddle.py", "--quiet").err == "the user's own words\n"


def test_a_file_is_written_beside_stdout(zoscope_cli, small: Path, tmp_path: Path) -> None:
    finished = zoscope_cli("bounds", "model.py", "--output", "result.json")
    assert "use lr" in finished.out
    assert json.loads((tmp_path / "result.json").read_text())["schema"] == "zoscope.bounds/1"
    assert zoscope_cli("bounds", "model.py", "--output", "result.txt").code == 0
    assert "Step-size bounds" in (tmp_path / "result.txt").read_text()


def test_a_precision_out_of_reach_is_an_answer_and_with_strict_exit_3(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(
        "import torch, zoscope\n"
        "d = torch.logspace(-3, 0, 300, dtype=torch.float64)\n"
        "problem = zoscope.Problem.from_function(lambda x: 0.5 * (d * x * x).sum(), torch.ones_like(d))\n"
    )
    args = ("bounds", "wide.py", "--method", "deflated-slq", "--max-hvps", "24", "--rtol", "1e-4")
    honest = zoscope_cli(*args)
    assert honest.code == 0
    assert "--rtol" in honest.err
    strict = zoscope_cli(*args, "--strict")
    assert strict.code == 3
    assert "use lr" in strict.out
    assert strict.err.splitlines()[-1].startswith("Error: ")


def test_the_starter_runs_as_it_is(zoscope_cli) -> None:
    assert zoscope_cli("init").code == 0
    found = document(zoscope_cli, "model.py")
    assert 0 < found["optimizers"]["gd"]["zo"]["binding"]["value"] < math.inf


def test_the_starter_config_passes(zoscope_cli) -> None:
    assert zoscope_cli("init", "--ci").code == 0
    finished = zoscope_cli("check")
    assert finished.code == 0, finished.out + finished.err


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_reader_that_leaves_early_causes_no_traceback(small: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m zoscope bounds {small} --json | head -c 1; echo code $?"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in finished.stderr
    assert finished.stdout.endswith(("code 141\n", "code 0\n"))


BATCHED = """
import torch, zoscope
def problem():
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    model = torch.nn.Linear(3, 1).double()
    return zoscope.Problem.from_criterion(model, (x, x[:, :1] * 2), torch.nn.MSELoss())
"""


def test_a_batch_size_adds_the_thresholds_with_mini_batches(zoscope_cli, tmp_path: Path) -> None:
    file = tmp_path / "batched.py"
    file.write_text(BATCHED)
    zo = document(zoscope_cli, file, "--optimizer", "zo-gd", "--batch-size", "2")["optimizers"]["gd"]["zo"]
    found = zo["minibatch"]
    assert (found["batch_size"], found["examples"]) == (2, 8)
    assert found["horizon"]["steps"] == 1000
    assert 0 < found["horizon"]["lower"] <= found["horizon"]["upper"] * (1 + 1e-9) < zo["horizon"]["upper"]
    assert "minibatch" not in document(zoscope_cli, file, "--optimizer", "zo-gd")["optimizers"]["gd"]["zo"]


def test_a_batch_size_is_a_positive_number(zoscope_cli) -> None:
    finished = zoscope_cli("bounds", QUADRATIC, "--batch-size", "0")
    assert finished.code == 2
    assert "--batch-size" in finished.err
