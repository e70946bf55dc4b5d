"""A fully connected network on all 1,797 handwritten digits, cross-entropy (d = 26,122).

    zoscope bounds examples/digits_mlp.py
    zoscope bounds examples/digits_mlp.py --set activation=gelu --set width=32

In the middle of training its Hessian has nearly as much negative as positive curvature: the case in which the trace
alone misleads, and the planned number of steps matters.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import zoscope

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def problem(
    steps: int = 140, seed: int = 0, lr: float = 0.1, width: int = 128, activation: str = "relu"
) -> zoscope.Problem:
    """Two hidden layers of ``width`` units after ``steps`` steps of full-batch gradient descent."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    unit = ACTIVATIONS[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, width), unit(), nn.Linear(width, width), unit(), nn.Linear(width, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
    return zoscope.Problem.from_criterion(model, [(images, labels)], criterion)
