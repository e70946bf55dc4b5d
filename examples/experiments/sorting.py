"""An LSTM or a Mamba network that learns to sort (Karpathy's task): digits in, the same digits in order out.

    zoscope track --config examples/experiments/zo-gd-lstm.yaml
    zoscope track --config examples/experiments/zo-gd-mamba.yaml

The network reads ``length`` digits and then the sorted ones; at every position from the last unsorted digit on it
predicts the next sorted one. The loss is half the squared distance of its outputs to the one-hot target.
"""

import torch
from sequences import LSTM, Mamba
from sources import half_squared_error, one_hot, sorting
from torch import Tensor, nn

import zoscope


def problem(
    network: str = "lstm",
    examples: int = 100,
    length: int = 4,
    digits: int = 3,
    width: int = 16,
    layers: int = 1,
    state: int = 8,
    seed: int = 0,
) -> zoscope.Problem:
    """An untrained network and ``examples`` random sequences of ``length`` digits from 0 to ``digits`` − 1.

    ``seed`` is that of the network; the sequences are always the same. ``state`` is the size of Mamba's state.
    """
    if network not in ("lstm", "mamba"):
        raise ValueError(f"network is {network!r}: expected lstm or mamba")
    inputs, targets = sorting(examples=examples, length=length, digits=digits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "lstm":
            model: nn.Module = LSTM(digits, width=width, layers=layers)
        else:
            model = Mamba(digits, width=width, layers=layers, state=state)

    def squared_error(outputs: Tensor, answers: Tensor) -> Tensor:
        return half_squared_error(outputs[:, length - 1 :].flatten(0, 1), answers.flatten(0, 1))

    return zoscope.Problem.from_criterion(model, [(inputs, one_hot(targets, digits))], squared_error)
