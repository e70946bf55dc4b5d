"""A small decoder that predicts the next character of the Zen of Python (attention through SDPA).

    zoscope bounds examples/transformer.py
    zoscope bounds examples/transformer.py --params 'blocks' --set steps=200

The fused attention kernels have no second derivative; zoscope switches to the one that has while it measures.
"""

import codecs
import contextlib
import io

import torch
from torch import Tensor, nn
from torch.nn import functional

import zoscope


def problem(
    steps: int = 100, seed: int = 0, lr: float = 3e-3, width: int = 32, layers: int = 2, context: int = 32
) -> zoscope.Problem:
    """The decoder after ``steps`` steps of Adam on the whole text."""
    windows, vocabulary = text_windows(context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(vocabulary, width=width, layers=layers, context=context)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        next_character_loss(model, windows).backward()
        optimizer.step()
    return zoscope.Problem(model, [windows], next_character_loss)


def text_windows(context: int) -> tuple[Tensor, int]:
    """The text cut into rows of ``context + 1`` characters, as indices, and the number of different characters."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself when imported
        import this
    text = codecs.decode(this.s, "rot13")
    characters = sorted(set(text))
    indices = torch.tensor([characters.index(character) for character in text])
    return indices.unfold(0, context + 1, context).contiguous(), len(characters)


def next_character_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each character given those before it in its row."""
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm and around a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, context, width)`` in and out."""
        qkv = self.to_qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm_feed(x))


class Decoder(nn.Module):
    """Token and position embeddings, blocks, and a readout that shares the token embedding."""

    def __init__(self, vocabulary: int, *, width: int, layers: int, context: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, vocabulary, bias=False)
        self.readout.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices ``(rows, context)`` to logits ``(rows, context, vocabulary)``."""
        positions = torch.arange(indices.shape[1], device=indices.device)
        x = self.tokens(indices) + self.positions(positions)
        return self.readout(self.norm(self.blocks(x)))
