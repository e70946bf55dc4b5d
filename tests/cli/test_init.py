"""The starter spec."""

import runpy
from pathlib import Path

import pytest
import torch


def test_the_starter_is_written_and_says_what_comes_next(zoscope_cli, tmp_path: Path) -> None:
    finished = zoscope_cli("init")
    assert finished.code == 0
    assert "zoscope bounds model.py" in finished.out
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]


def test_a_name_and_a_folder_are_both_places(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert zoscope_cli("init", "folder").code == 0
    assert zoscope_cli("init", "folder/other.py").code == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["model.py", "other.py"]


def test_ci_adds_a_config_that_names_the_spec(zoscope_cli, tmp_path: Path) -> None:
    assert zoscope_cli("init", "net.py", "--ci").code == 0
    assert "net.py" in (tmp_path / "zoscope.yaml").read_text()


def test_ci_keeps_a_spec_that_is_there(zoscope_cli, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("mine")
    assert zoscope_cli("init", "--ci").code == 0
    assert (tmp_path / "model.py").read_text() == "mine"
    assert "model.py" in (tmp_path / "zoscope.yaml").read_text()


@pytest.mark.parametrize(("taken", "options"), [("model.py", []), ("zoscope.yaml", ["--ci"])])
def test_nothing_is_overwritten_and_nothing_half_written(
    zoscope_cli, tmp_path: Path, taken: str, options: list[str]
) -> None:
    (tmp_path / taken).write_text("mine")
    finished = zoscope_cli("init", *options)
    assert finished.code == 2
    assert taken in finished.paragraph
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


@pytest.mark.parametrize("path", ["missing/model.py", "model.txt"])
def test_a_place_that_cannot_be_meant_is_refused(zoscope_cli, tmp_path: Path, path: str) -> None:
    finished = zoscope_cli("init", path)
    assert finished.code == 2
    assert path.split("/")[0] in finished.paragraph
    assert list(tmp_path.iterdir()) == []


def test_the_starter_is_a_problem_near_a_minimum_and_leaves_the_global_seed_alone(zoscope_cli, tmp_path: Path) -> None:
    zoscope_cli("init")
    state = torch.get_rng_state()
    problem = runpy.run_path(str(tmp_path / "model.py"))["problem"](steps=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert problem.num_params == 10 * 32 + 32 + 32 + 1
    assert problem.loss(problem.model, problem.batches[0]).item() < 0.5


def test_the_starter_config_is_a_valid_one(zoscope_cli, tmp_path: Path) -> None:
    from zoscope.config.load import build_checks, load_document

    zoscope_cli("init", "net.py", "--ci")
    checks = build_checks(load_document(tmp_path / "zoscope.yaml"))
    assert [check.name for check in checks] == ["zo-gd"]
