"""What zoscope should look at: a model, its data, its loss, at the point where training stands.

    zoscope bounds model.py                   step-size bounds, first- and zeroth-order
    zoscope bounds model.py --lr 0.01         would this step size survive?
    zoscope bounds model.py --set steps=500   arguments of problem() from the command line

Replace the three parts below by your own. zoscope changes nothing of what it is given.
"""

import torch
from torch import nn

import zoscope


def problem(steps: int = 100, seed: int = 0) -> zoscope.Problem:
    """Called by zoscope, which looks for the name 'problem' unless told otherwise (model.py:name)."""
    generator = torch.Generator().manual_seed(seed)

    # 1. Data: a list of batches, or a DataLoader with shuffle=False; the same batches each time.
    x = torch.randn(256, 10, generator=generator)
    y = torch.sin(x @ torch.randn(10, 1, generator=generator))
    batches = [(x, y)]

    # 2. The model, in the state that matters to you: bounds hold around the current parameters.
    #    Load your weights here, or leave that to 'zoscope bounds model.py --checkpoint weights.pt'.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 1))
    train(model, batches, steps)
    model.eval()  # no dropout: its noise would not be curvature

    # 3. The loss: the mean over the batch's examples, a scalar.
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    return zoscope.Problem(model, batches, loss)


def train(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Stand-in for your own training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
