"""The threshold in the logs of a real Lightning ``Trainer``."""

from pathlib import Path

import pytest
import torch
from torch import nn

import zoscope

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from zoscope.integrations.lightning import StabilityCallback  # noqa: E402


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_threshold_and_ratio_are_logged_every_so_many_optimizer_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, data = Module(), (torch.randn(8, 3), torch.randn(8, 1))
    problem = zoscope.Problem.from_criterion(module.net, data, nn.MSELoss())
    callback = StabilityCallback(problem, every=2)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[callback],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=2)
    trainer.fit(module, loader)
    assert [record.step for record in callback.records] == [0, 2, 4, 6]
    assert {record.operator for record in callback.records} == {"hessian"}
    assert "zoscope/ratio" in trainer.callback_metrics
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "zoscope/max_lr" in header


class Slow(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def test_accumulated_losses_are_those_of_the_problem() -> None:
    """Lightning hands over a part of each."""
    torch.manual_seed(0)
    module, data = Slow(), (torch.randn(8, 3), torch.randn(8, 1))
    problem = zoscope.Problem.from_criterion(module.net, data, nn.MSELoss())
    callback = StabilityCallback(problem, every=3)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=4,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    repeated = torch.utils.data.TensorDataset(*(part.repeat(12, 1) for part in data))
    trainer.fit(module, torch.utils.data.DataLoader(repeated, batch_size=8))
    assert callback._monitor.compared
    assert not [notice for notice in callback.warnings if notice.code == "other-loss"]


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 1)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        for net, optimizer in zip((self.other, self.net), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.other.parameters(), 1e-3), torch.optim.SGD(self.net.parameters(), 0.2)]


@pytest.mark.parametrize("name", [None, "gd"])
def test_the_optimizer_that_holds_the_parameters_counts(name: str | None) -> None:
    torch.manual_seed(0)
    module, data = TwoOptimizers(), (torch.randn(8, 3), torch.randn(8, 1))
    problem = zoscope.Problem.from_criterion(module.net, data, nn.MSELoss())
    expected = zoscope.bounds(problem, optimizers=["gd"], device="cpu").optimizers["gd"].fo
    callback = StabilityCallback(problem, every=1, optimizer=name)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=8))
    assert callback.records[0].lr == 0.2
    assert callback.records[0].ratio == pytest.approx(0.2 / expected, rel=1e-4)


def test_models_and_optimizers_of_fabric_are_looked_into() -> None:
    from lightning.fabric import Fabric

    torch.manual_seed(0)
    net, data = nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    bare = torch.optim.SGD(net.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu")
    model, optimizer = fabric.setup(net, bare)
    found = []
    for watched, by in ((net, bare), (model, optimizer)):
        problem = zoscope.Problem.from_criterion(watched, data, nn.MSELoss())
        found.append(zoscope.StabilityMonitor(problem, by, device="cpu").step().ratio)
    assert found[0] == pytest.approx(found[1])
