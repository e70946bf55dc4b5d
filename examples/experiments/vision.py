"""The paper's networks for images, untrained, with the squared loss.

    zoscope track --config examples/experiments/zo-gd-cnn.yaml
    zoscope track --config examples/experiments/zo-gd-cnn.yaml --set data=cifar-10-batches-py --set width=32

Images are scikit-learn's 8×8 digits, or CIFAR-10 where ``data`` names its folder.
"""

import torch
from networks import ViT, cnn, resnet20
from sources import half_squared_error, images, one_hot
from torch import nn

import zoscope


def problem(
    network: str = "cnn",
    data: str | None = None,
    examples: int = 100,
    classes: int = 4,
    side: int | None = None,
    width: int = 8,
    norm: str = "group",
    patch: int = 2,
    layers: int = 2,
    batch_size: int | None = None,
    seed: int = 0,
) -> zoscope.Problem:
    """``examples`` images of the first ``classes`` classes, and a network for them.

    ``norm`` (``group`` or ``batch``) is for ResNet-20: with ``batch`` the layers use the statistics of all images at
    the start and keep them, as in evaluation. ``patch`` and ``layers`` are for the ViT.
    """
    if network not in ("cnn", "resnet20", "vit"):
        raise ValueError(f"network is {network!r}: expected cnn, resnet20 or vit")
    pixels, labels = images(data, examples=examples, classes=classes, side=side)
    channels, size = pixels.shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "cnn":
            model = cnn(channels, width=width, outputs=classes)
        elif network == "resnet20":
            model = resnet20(channels, width=width, outputs=classes, norm=norm)
        else:
            model = ViT(channels, size, width=width, outputs=classes, patch=patch, layers=layers)
    with torch.no_grad():
        settle(model)(pixels)
    rows = examples if batch_size is None else batch_size
    return zoscope.Problem.from_criterion(
        model.eval(), (pixels, one_hot(labels, classes)), half_squared_error, batch_size=rows
    )


def settle(model: nn.Module) -> nn.Module:
    """Make the next forward pass set the running statistics of batch norms to those of its input."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    return model.train()
