import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import zoscope
from zoscope.analysis.check_runner import UncacheableError, local_files, problem_fingerprint


def mse(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1)).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)


def fingerprint(model: nn.Module | None = None, data: object = None, loss: Callable[..., torch.Tensor] = mse) -> str:
    problem = zoscope.Problem(model or network(), [batch() if data is None else data], loss)
    return problem_fingerprint(problem, source=None)


def changed(change: Callable[[nn.Module], object]) -> str:
    model = network()
    with torch.no_grad():
        change(model)
    return fingerprint(model)


def test_equal_problems_have_equal_fingerprints() -> None:
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight[0, 0].add_(1e-7),
        lambda m: m[1].running_mean.add_(1e-3),
        lambda m: m.train(),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: setattr(m[2], "p", 0.2),
        lambda m: m.double(),
        lambda m: setattr(m[0], "scale", torch.ones(1)),
    ],
)
def test_a_change_of_the_model_shows(change: Callable[[nn.Module], object]) -> None:
    assert changed(change) != fingerprint()


def test_a_change_of_the_data_shows() -> None:
    x, y = batch()
    assert fingerprint(data=(x, y + 1e-6)) != fingerprint()
    assert fingerprint(data=(x[:7], y[:7])) != fingerprint()
    assert fingerprint(data=[x, y]) != fingerprint()


def closing_over(value: object) -> Callable[..., torch.Tensor]:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert value is not None
        return mse(model, batch)

    return loss


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1.0, 2.0),
        (torch.ones(2), torch.zeros(2)),
        (np.ones(2), np.zeros(2)),
        ({"a": 1}, {"a": 2}),
        ((1, (2,)), ((1, 2),)),
        (functools.partial(mse, 1), functools.partial(mse, 2)),
        (nn.Linear(1, 1), nn.Linear(1, 1)),
        (torch.float32, torch.float64),
    ],
)
def test_what_a_loss_closes_over_shows(one: object, other: object) -> None:
    assert fingerprint(loss=closing_over(one)) != fingerprint(loss=closing_over(other))
    assert fingerprint(loss=closing_over(one)) == fingerprint(loss=closing_over(one))


@pytest.mark.parametrize("value", [iter([1]), torch.Generator(), object()], ids=["iterator", "generator", "object"])
def test_what_has_no_value_is_refused(value: object) -> None:
    with pytest.raises(UncacheableError):
        fingerprint(loss=closing_over(value))


def test_cycles_end() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert fingerprint(loss=closing_over(loop)) == fingerprint(loss=closing_over(loop))


def test_files_are_followed_over_local_imports_only(tmp_path: Path) -> None:
    package = tmp_path / "net"
    package.mkdir()
    (tmp_path / "model.py").write_text("import torch, json\nimport net.layers\nfrom helper import x\n")
    (tmp_path / "helper.py").write_text("import model\n")
    (tmp_path / "unrelated.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("from . import blocks\nfrom .. import nothing\n")
    (package / "blocks.py").write_text("def broken(:\n")
    found = [file.relative_to(tmp_path).as_posix() for file in local_files([tmp_path / "model.py"])]
    assert found == ["helper.py", "model.py", "net/__init__.py", "net/blocks.py", "net/layers.py"]
