"""Image networks of the experiments, in plain PyTorch: the paper's CNN, ResNet-20 and a small vision transformer."""

import itertools

import torch
from torch import Tensor, nn


def cnn(channels: int, *, width: int, outputs: int) -> nn.Module:
    """Two pairs of 3×3 convolutions with GELU, each pair averaged down by two, average pooling and a linear readout."""

    def convolution(inputs: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(inputs, width, 3, padding=1), nn.GELU()

    pair = (*convolution(channels), *convolution(width), nn.AvgPool2d(2))
    return nn.Sequential(
        *pair,
        *(*convolution(width), *convolution(width), nn.AvgPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)),
    )


class Residual(nn.Module):
    """Two 3×3 convolutions around which a skip connection leads; a shortcut without parameters where sizes change."""

    def __init__(self, inputs: int, outputs: int, *, norm: str) -> None:
        super().__init__()
        self.stride, self.more = (2 if outputs > inputs else 1), outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(normalisation(norm, outputs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` to ``(n, outputs, h/stride, w/stride)``."""
        inner = self.second(nn.functional.relu(self.norms[0](self.first(x))))
        skip = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return nn.functional.relu(skip + self.norms[1](inner))


def normalisation(norm: str, channels: int) -> nn.Module:
    """``group`` (four groups) or ``batch``.

    Raises:
        ValueError: For any other name.
    """
    if norm == "group":
        return nn.GroupNorm(4, channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"norm is {norm!r}: expected group or batch")


def resnet20(channels: int, *, width: int, outputs: int, norm: str) -> nn.Module:
    """He et al.'s network for small images: three stages of three blocks with 1, 2 and 4 times ``width`` channels."""
    sizes = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
    stem = nn.Conv2d(channels, width, 3, padding=1, bias=False), normalisation(norm, width), nn.ReLU()
    blocks = [Residual(n, m, norm=norm) for n, m in itertools.pairwise([width, *sizes])]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs))


class Attention(nn.Module):
    """Self-attention and a feed-forward layer, each after a layer norm and around a skip connection."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, tokens, width)`` in and out."""
        q, k, v = self.to_qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))


class ViT(nn.Module):
    """A vision transformer: patches, learned positions, blocks, the mean over the tokens and a linear readout."""

    def __init__(
        self, channels: int, side: int, *, width: int, outputs: int, patch: int, layers: int, heads: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Attention(width, heads=heads) for _ in range(layers)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """``(n, channels, side, side)`` to ``(n, outputs)``."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.readout(self.norm(self.blocks(tokens)).mean(dim=1))
