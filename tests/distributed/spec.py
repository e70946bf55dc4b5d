"""Small problems that a job of several processes loads."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoscope


def problem(batch_size: int = 8, dtype: str = "float64") -> zoscope.Problem:
    """37 examples in batches of 8: the last one is smaller, and no rank gets as many examples as another."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(37, 6, generator=generator), torch.randint(0, 3, (37,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    kind = getattr(torch, dtype)
    data = (x.to(kind), y)
    return zoscope.Problem.from_criterion(model.to(kind), data, nn.CrossEntropyLoss(), batch_size=batch_size)


def wide() -> zoscope.Problem:
    """One batch, with enough work in it to be cut for several ranks."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(401, 300, generator=generator).double(), torch.randint(0, 90, (401,), generator=generator)
    model = nn.Linear(300, 90).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return zoscope.Problem.from_criterion(model, [(x, y)], nn.CrossEntropyLoss())


def images() -> zoscope.Problem:
    """One batch with graphs large enough for pieces with probe vectors of their own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 2, 40, 40, generator=generator).double() + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        convolutions = (nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh())
        model = nn.Sequential(*convolutions, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(288, 2)).double()
        y = model(x).detach() + 0.1
    return zoscope.Problem.from_criterion(model, [(x, y)], nn.MSELoss())


def slow(pids: str) -> zoscope.Problem:
    """Writes its process number as soon as it evaluates losses, and takes forever."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        Path(pids, os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(0.2)
        result: Tensor = model(batch).square().mean()
        return result

    return zoscope.Problem(nn.Linear(50, 50), [torch.ones(4, 50) * i for i in range(6)], loss)


def broken_on_one() -> zoscope.Problem:
    """Fails on rank 1 alone."""
    if os.environ["RANK"] == "1":
        raise FileNotFoundError("no data on this machine")
    return problem()


def drawn_anew() -> zoscope.Problem:
    """Other data on every rank."""
    model = nn.Linear(3, 1)
    generator = torch.Generator()
    generator.seed()
    return zoscope.Problem(
        model, [torch.randn(4, 3, generator=generator)], lambda model, batch: model(batch).square().mean()
    )


def other_loss(where: str = "everywhere") -> zoscope.Problem:
    """A loss that holds something unseeded: it differs by rank everywhere, in its curvature alone, or on one batch."""
    generator = torch.Generator()
    generator.seed()
    own = 1 + torch.rand(3, generator=generator, dtype=torch.float64)
    batches = [torch.full((2, 3), float(i), dtype=torch.float64) for i in range(1, 4)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        weights = own if where != "one batch" or batch[0, 0] == 2 else torch.ones_like(own)
        return (model.weight * batch * weights).square().sum(dim=1).mean()

    model = nn.Linear(3, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.0 if where == "curvature" else 1.0)
    return zoscope.Problem(model, batches, loss)


def sharded(apart: bool = True) -> zoscope.Problem:
    """A model of which every rank holds a part (FSDP2), or the same model whole."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    x, y = torch.randn(37, 6, generator=generator).double(), torch.randint(0, 3, (37,), generator=generator)
    if apart:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return zoscope.Problem.from_criterion(model, (x, y), nn.CrossEntropyLoss(), batch_size=8)
