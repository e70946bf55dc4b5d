"""Models that accelerate (device_map) has dispatched: one device, several, and weights that are offloaded."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import zoscope
from zoscope import SpecError
from zoscope.cli.app import run
from zoscope.optim.directions import partition
from zoscope.problem.model import entrance

accelerate = pytest.importorskip("accelerate")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

QUICK = {"optimizers": ("gd",), "rtol": 0.5}


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def problem(model: nn.Module, params: str | None = None) -> zoscope.Problem:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(37, 6, generator=generator), torch.randint(0, 3, (37,), generator=generator)
    return zoscope.Problem.from_criterion(model, data, nn.CrossEntropyLoss(), batch_size=20, params=params)


def dispatched(folder: Path, **where: str) -> nn.Module:
    """With ``first`` and ``last`` on a device or offloaded to ``disk``."""
    device_map = {"0": where["first"], "1": "cpu", "2": where["last"]}
    model: nn.Module = accelerate.dispatch_model(
        network(), device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )
    return model


@pytest.mark.parametrize("curvature", ["forward", "hessian"])
def test_a_model_dispatched_to_one_device_is_like_any_other(tmp_path: Path, curvature: str) -> None:
    whole, there = network(), dispatched(tmp_path, first="cpu", last="cpu")
    one, other = (zoscope.bounds(problem(m), curvature=curvature, **QUICK) for m in (whole, there))
    assert one.optimizers["gd"].to_dict() == other.optimizers["gd"].to_dict()


@pytest.mark.parametrize("curvature", ["forward", "hessian"])
@pytest.mark.parametrize("kind", ["cpu", "disk", "part"])
def test_offloaded_parameters_cannot_be_varied_and_that_is_said(tmp_path: Path, kind: str, curvature: str) -> None:
    if kind == "cpu":
        model = accelerate.cpu_offload(network(), execution_device=torch.device("cpu"))
    elif kind == "disk":
        model = accelerate.disk_offload(network(), str(tmp_path), execution_device=torch.device("cpu"))
    else:
        model = dispatched(tmp_path, first="cpu", last="disk")
    name = "2.weight" if kind == "part" else "0.weight"
    with pytest.raises(SpecError, match=rf"'{name}' is offloaded by accelerate.*device_map"):
        zoscope.bounds(problem(model), curvature=curvature, **QUICK)


def test_forward_passes_measure_what_is_in_place_beside_offloaded_weights(tmp_path: Path) -> None:
    model = dispatched(tmp_path, first="cpu", last="disk")
    before = {name: parameter.clone() for name, parameter in model[0].named_parameters()}
    found = zoscope.bounds(problem(model, "^0"), curvature="forward", **QUICK)
    whole = zoscope.bounds(problem(network(), "^0"), curvature="forward", **QUICK)
    assert found.optimizers["gd"].to_dict() == whole.optimizers["gd"].to_dict()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model[0].named_parameters())
    with pytest.raises(SpecError, match=r"spread over cpu and offloaded weights.*--curvature forward"):
        zoscope.bounds(problem(model, "^0"), **QUICK)


def test_the_command_says_so_in_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "model.py"
    spec.write_text(
        "import accelerate, torch, zoscope\n"
        "model = accelerate.cpu_offload(torch.nn.Linear(3, 1), execution_device=torch.device('cpu'))\n"
        "problem = zoscope.Problem(model, [torch.ones(4, 3)], lambda model, batch: model(batch).square().mean())\n"
    )
    assert run(["bounds", str(spec), "--curvature", "forward"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sum("Error: " in line for line in said) == 1
    assert "offloaded by accelerate" in " ".join(said)


def test_no_block_of_a_direction_spans_two_devices() -> None:
    parameters = [torch.zeros(3), torch.zeros(4), torch.zeros(5, device="meta"), torch.zeros(2)]
    blocks = partition(parameters, block_size=100)
    assert [[piece.numel() for piece in block.pieces] for block in blocks] == [[3, 4], [5], [2]]
    assert [block.device.type for block in blocks] == ["cpu", "meta", "cpu"]


def test_batches_enter_where_the_model_sends_them(tmp_path: Path) -> None:
    assert entrance(dispatched(tmp_path, first="cpu", last="cpu")) == torch.device("cpu")
    assert entrance(network()) == torch.device("cpu")


@pytest.mark.gpu
@needs_cuda
def test_forward_passes_measure_a_model_on_two_devices(tmp_path: Path) -> None:
    model = dispatched(tmp_path, first="cpu", last="cuda:0")
    found = zoscope.bounds(problem(model), curvature="forward", optimizers=("gd",), rtol=0.1)
    truth = zoscope.bounds(problem(network()), method="dense", device="cpu", optimizers=("gd",))
    trace = found.forward.trace
    assert abs(trace.value - truth.curvature["hessian"].trace.value) < 4 * trace.stderr
    assert [p.device.type for p in model.parameters()] == ["cpu", "cpu", "cuda", "cuda"]
    with pytest.raises(SpecError, match="spread over cpu and cuda:0"):
        zoscope.bounds(problem(model), **QUICK)


def test_the_estimate_leaves_out_what_a_spread_model_cannot_do(tmp_path: Path) -> None:
    spec = tmp_path / "model.py"
    spec.write_text(
        "import accelerate, torch, zoscope\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))\n"
        f"model = accelerate.dispatch_model(model, {{'0': 'cpu', '1': 'disk'}}, 'cpu', offload_dir={str(tmp_path)!r})\n"
        "problem = zoscope.Problem(model, [torch.ones(4, 3)], lambda model, batch: model(batch).square().mean())\n"
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["bounds", str(spec), "--estimate", "--params", "^0", "--json"]) == 0
    assert json.loads(out.getvalue())["recommended"]["curvature"] == "forward"
