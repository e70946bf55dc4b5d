"""Sequence networks of the experiments, in plain PyTorch: an LSTM and a Mamba block, whose scan is a loop over time."""

import math

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """An embedding, ``layers`` LSTM layers and a linear readout at every position.

    The recurrence is written out, so that it has second derivatives on every device; cuDNN's has none.
    """

    def __init__(self, vocabulary: int, *, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.readout = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.inputs = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.recurrent = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(layers))

    def forward(self, indices: Tensor) -> Tensor:
        """Indices ``(n, time)`` to logits ``(n, time, vocabulary)``."""
        x = self.tokens(indices)
        for inputs, recurrent in zip(self.inputs, self.recurrent, strict=True):
            h = c = torch.zeros_like(x[:, 0])
            states = []
            for driven in inputs(x).unbind(dim=1):
                i, f, o, new = (driven + recurrent(h)).chunk(4, dim=-1)
                c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(new)
                h = torch.sigmoid(o) * torch.tanh(c)
                states.append(h)
            x = torch.stack(states, dim=1)
        return self.readout(x)


class Selective(nn.Module):
    """One Mamba block (Gu & Dao, arXiv:2312.00752): a gated causal convolution and a selective scan.

    With ``Δ``, ``B``, ``C`` computed from the input ``x_t``: ``s_t = exp(Δ_t A) s_{t−1} + Δ_t B_t x_t`` and
    ``y_t = C_t s_t + D x_t``, a state of ``state`` numbers for each of the ``2·width`` channels.
    """

    def __init__(self, width: int, *, state: int, kernel: int = 4) -> None:
        super().__init__()
        inner, self.state, self.kernel = 2 * width, state, kernel
        self.rank = math.ceil(width / 16)
        self.norm = nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.convolution = nn.Conv1d(inner, inner, kernel, groups=inner)
        self.select = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.to_delta = nn.Linear(self.rank, inner)
        nn.init.uniform_(self.to_delta.bias, -4.6, -2.3)  # softplus gives step sizes from 0.01 to 0.1
        self.log_decay = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, time, width)`` in and out."""
        u, gate = self.inward(self.norm(x)).chunk(2, dim=-1)
        padded = nn.functional.pad(u.transpose(1, 2), (self.kernel - 1, 0))
        u = nn.functional.silu(self.convolution(padded).transpose(1, 2))
        return x + self.outward(self.scan(u) * nn.functional.silu(gate))

    def scan(self, u: Tensor) -> Tensor:
        """``(n, time, inner)`` in and out."""
        delta, b, c = self.select(u).split([self.rank, self.state, self.state], dim=-1)
        delta = nn.functional.softplus(self.to_delta(delta))
        decay = torch.exp(-delta.unsqueeze(-1) * self.log_decay.exp())
        drive = (delta * u).unsqueeze(-1) * b.unsqueeze(2)
        state, states = torch.zeros_like(drive[:, 0]), []
        for d, v in zip(decay.unbind(dim=1), drive.unbind(dim=1), strict=True):
            state = d * state + v
            states.append(state)
        return (torch.stack(states, dim=1) * c.unsqueeze(2)).sum(dim=-1) + self.skip * u


class Mamba(nn.Module):
    """An embedding, ``layers`` Mamba blocks, a layer norm and a linear readout at every position."""

    def __init__(self, vocabulary: int, *, width: int, layers: int, state: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Selective(width, state=state) for _ in range(layers)))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices ``(n, time)`` to logits ``(n, time, vocabulary)``."""
        return self.readout(self.norm(self.blocks(self.tokens(indices))))
