"""A small convolutional network, trained by gradient descent on 100 handwritten digits (d = 1,964).

    zoscope bounds examples/digits_cnn.py
    zoscope bounds examples/digits_cnn.py --set steps=500 --set seed=1

After the default 4,000 steps, about ten seconds, the loss is 0.036, Tr H about 87 and λ_max about 26: first-order
gradient descent is stable up to 0.077, zeroth-order gradient descent only up to 0.0163.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zoscope

CLASSES = 4


def problem(steps: int = 4000, seed: int = 0, lr: float = 0.02) -> zoscope.Problem:
    """The network after ``steps`` steps of full-batch gradient descent."""
    images, targets = digits(examples=100)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    with one_thread():
        train(model, images, targets, steps=steps, lr=lr)
    return zoscope.Problem.from_criterion(model, [(images, targets)], half_squared_error)


def digits(examples: int) -> tuple[Tensor, Tensor]:
    """Standardised 8×8 images of the digits 0 to 3, and their labels one-hot."""
    data = load_digits(n_class=CLASSES)
    images = torch.tensor(data.images[:examples], dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[:examples])
    return (images - images.mean()) / images.std(), nn.functional.one_hot(labels, CLASSES).float()


def network(width: int = 8) -> nn.Module:
    """Two pairs of 3×3 convolutions with GELU, each pair averaged down by two, and a linear readout."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()),
        nn.AvgPool2d(2),
        *(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, averaged over the examples."""
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def train(model: nn.Module, images: Tensor, targets: Tensor, *, steps: int, lr: float) -> None:
    """Full-batch gradient descent."""
    parameters = list(model.parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(half_squared_error(model(images), targets), parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, gradients, alpha=lr)


@contextmanager
def one_thread() -> Iterator[None]:
    """The kernels of this network are too small to share: a second thread would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
