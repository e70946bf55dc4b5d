import json

import pytest

SPEC = """
import torch, zoscope

def problem():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    matrix = (basis * torch.linspace(0.5, 1.5, 60, dtype=torch.float64)) @ basis.T
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * x @ (matrix @ x), start)
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(SPEC)
    return path


def test_a_confirmed_threshold_exits_0_with_one_document(zoscope_cli, spec):
    done = zoscope_cli("probe", spec, "--optimizer", "gd", "--json", "--quiet")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["schema"] == "zoscope.probe/1"
    assert document["confirmed"] is True


def test_a_wrong_threshold_exits_1(zoscope_cli, spec):
    done = zoscope_cli("probe", spec, "--optimizer", "gd", "--assume-threshold", "0.4", "--quiet")
    assert done.code == 1
    assert "Refuted" in done.out


def test_too_few_steps_exit_3(zoscope_cli, spec):
    done = zoscope_cli("probe", spec, "--threshold", "exact", "--steps", "2", "--replicas", "2", "--quiet")
    assert done.code == 3
    assert "Inconclusive" in done.out


def test_a_picture_is_written(zoscope_cli, spec, tmp_path):
    done = zoscope_cli("probe", spec, "--optimizer", "gd", "--plot", tmp_path / "probe.svg", "--quiet")
    assert done.code == 0
    assert (tmp_path / "probe.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--optimizer", "zo-gd", "--optimizer", "gd"], "--optimizer"),
        (["--steps", "soon"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--ratios", "0.8;1.2"], "--ratios"),
        (["--ratios", "-1"], "--ratios"),
        (["--growth", "1"], "--growth"),
        (["--replicas", "0"], "--replicas"),
        (["--mu", "nan"], "--mu"),
        (["--edge-rtol", "0"], "--edge-rtol"),
        (["--assume-threshold", "0"], "--assume-threshold"),
        (["--plot", "missing/probe.png"], "--plot"),
        (["--batch-size", "4", "--linearized"], "--batch-size"),
        (["--threshold", "best"], "--threshold"),
    ],
)
def test_a_bad_value_is_one_paragraph_and_exit_2(zoscope_cli, spec, options, named):
    done = zoscope_cli("probe", spec, *options)
    assert done.code == 2
    assert named in done.paragraph


def test_forward_passes_have_no_spectrum_to_probe(zoscope_cli, spec):
    finished = zoscope_cli("probe", spec, "--curvature", "forward")
    assert finished.code == 2
    assert "knows no spectrum" in finished.err
