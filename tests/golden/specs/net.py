"""A small network that was trained for a while."""

import torch
from torch import nn

import zoscope


def problem(activation: str = "GELU", steps: int = 40, head: float = 1.0, save: bool = False) -> zoscope.Problem:
    """Thirty-two examples in four batches, twenty-one parameters.

    Args:
        activation: Name of a layer of torch; some have kinks.
        steps: Length of the training.
        head: What the last layer is multiplied with at the end.
        save: Leave weights and the optimizer's state in the working folder.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x.sum(1, keepdim=True)) + 0.3 * torch.randn(32, 1, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), getattr(nn, activation)(), nn.Linear(4, 1)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    if save:
        torch.save(model.state_dict(), "weights.pt")
        torch.save(optimizer.state_dict(), "adam.pt")
    with torch.no_grad():
        model[2].weight *= head
        model[2].bias *= head
    return zoscope.Problem.from_criterion(model, list(zip(x.chunk(4), y.chunk(4), strict=True)), nn.MSELoss())
