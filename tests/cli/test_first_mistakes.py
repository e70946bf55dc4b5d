"""What a newcomer gets wrong first: one paragraph that names the line and the remedy."""

from dataclasses import dataclass
from pathlib import Path

import pytest

PREAMBLE = """\
import torch
import zoscope
from torch import nn
torch.manual_seed(0)
x, y = torch.randn(12, 3), torch.randn(12, 1)
net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
def loss(model, batch):  # line 7
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()
"""
HERE = PREAMBLE.count("\n") + 1


@dataclass(frozen=True)
class Mistake:
    """A spec's last lines, the line that is named (0: none is to blame), and words of the cause and of the remedy."""

    body: str
    line: int
    cause: str
    remedy: str


MISTAKES = {
    "dropout in train mode": Mistake(
        "problem = zoscope.Problem(nn.Sequential(net, nn.Dropout(0.5)), [(x, y)], loss)",
        7,
        "Dropout '1' (p=0.5) is active in train mode",
        "Call model.eval()",
    ),
    "batch norm in train mode": Mistake(
        "halves = [(x[:6], y[:6]), (x[6:], y[6:])]\n"
        "problem = zoscope.Problem(nn.Sequential(nn.BatchNorm1d(3), net), halves, loss)",
        0,
        "BatchNorm1d '0' normalises with the statistics of each batch",
        "Call model.eval()",
    ),
    "shuffled loader": Mistake(
        "data = torch.utils.data.TensorDataset(x, y)\n"
        "loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)\n"
        "problem = zoscope.Problem(net, loader, loss)",
        HERE + 2,
        "its sampler shuffles",
        "shuffle=False",
    ),
    "dataset in place of a loader": Mistake(
        "problem = zoscope.Problem(net, torch.utils.data.TensorDataset(x, y), loss)",
        HERE,
        "single examples",
        "torch.utils.data.DataLoader(dataset, batch_size=...)",
    ),
    "used generator": Mistake(
        "batches = (pair for pair in [(x, y)])\nlist(batches)\nproblem = zoscope.Problem(net, batches, loss)",
        HERE + 2,
        "batches is empty",
        "batches=list(...)",
    ),
    "generator that was not called": Mistake(
        "def batches():\n    yield x, y\nproblem = zoscope.Problem(net, batches, loss)",
        HERE + 2,
        "batches is of type function",
        "call it: batches()",
    ),
    "inputs and targets as two batches": Mistake(
        "problem = zoscope.Problem(net, [x, y], loss)",
        8,
        "a list of two tensors is read as two batches",
        "[(inputs, targets)]",
    ),
    "loss and outputs": Mistake(
        "def both(model, batch):\n"
        "    outputs = model(batch[0])\n"
        "    return (outputs - batch[1]).square().mean(), outputs\n"
        "problem = zoscope.Problem(net, [(x, y)], both)",
        HERE,
        "returned a tuple (tensor scalar, tensor 12 × 1)",
        "return the loss alone, its item [0]",
    ),
    "loss in a dict": Mistake(
        "problem = zoscope.Problem(net, [(x, y)], lambda model, batch: {'loss': loss(model, batch)})",
        HERE,
        "returned a dict",
        "its item ['loss']",
    ),
    "number in place of a tensor": Mistake(
        "problem = zoscope.Problem(net, [(x, y)], lambda model, batch: loss(model, batch).item())",
        HERE,
        "returned a float",
        "without .item()",
    ),
    "loss that is not reduced": Mistake(
        "problem = zoscope.Problem(net, [(x, y)], lambda model, batch: (model(batch[0]) - batch[1]).square())",
        HERE,
        "shape (12, 1)",
        "end with .mean()",
    ),
    "criterion in place of a loss": Mistake(
        "problem = zoscope.Problem(net, [(x, y)], nn.MSELoss())",
        0,
        "MSELoss compares outputs with targets",
        "zoscope.Problem.from_criterion(model, batches, nn.MSELoss())",
    ),
    "arguments in the other order": Mistake(
        "def swapped(batch, model):\n"
        "    inputs, targets = batch\n"
        "    return (model(inputs) - targets).square().mean()\n"
        "problem = zoscope.Problem(net, [(x, y)], swapped)",
        HERE + 1,
        "unpack",
        "called as loss(model, batch), here with a Sequential and (tensor 12 × 3, tensor 12 × 1)",
    ),
    "texts in a batch": Mistake(
        "problem = zoscope.Problem(net, [(['a', 'b'], y[:2])], loss)",
        9,
        "The batch is (2 texts, tensor 2 × 1)",
        "with a tokenizer",
    ),
    "NumPy arrays in a batch": Mistake(
        "problem = zoscope.Problem(net, [(x.numpy(), y)], loss)",
        9,
        "it holds NumPy arrays where a tensor is needed",
        "torch.as_tensor",
    ),
    "tensor of the loss on another device": Mistake(
        "weights = torch.ones(1, device='meta')\n"
        "def weighted(model, batch):\n"
        "    return (weights * (model(batch[0]) - batch[1]).square()).mean()\n"
        "problem = zoscope.Problem(net, [(x, y)], weighted)",
        HERE + 2,
        "lives on another device",
        "put it into the batches",
    ),
    "batch on a device without values": Mistake(
        "problem = zoscope.Problem(net, [(x.to('meta'), y)], loss)",
        HERE,
        "holds a tensor without values (meta device)",
        "Load the data into it",
    ),
    "model on a device without values": Mistake(
        "problem = zoscope.Problem(net.to('meta'), [(x, y)], loss)",
        0,
        "Parameter '0.weight' has no values (meta device)",
        "load the weights",
    ),
    "inputs of a wrong shape": Mistake(
        "problem = zoscope.Problem(net, [(x[:, :2], y)], loss)",
        9,
        "the batch is (tensor 12 × 2, tensor 12 × 1). '0.weight' of the model is tensor 4 × 3",
        "Print the shapes on that line",
    ),
    "wrong shape in the loss": Mistake(
        "def product(model, batch):\n"
        "    return (model(batch[0]) @ batch[1]).mean()\n"
        "problem = zoscope.Problem(net, [(x, y)], product)",
        HERE + 1,
        "shapes cannot be multiplied (12x1 and 12x1)",
        "Print the shapes on that line",
    ),
    "labels that are no integers": Mistake(
        "problem = zoscope.Problem(nn.Linear(3, 4), [(x, torch.zeros(12))],\n"
        "    lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))",
        HERE + 1,
        "Long",
        "call .long() on them",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_first_mistake_is_one_paragraph_with_its_line_and_remedy(zoscope_cli, tmp_path: Path, name: str) -> None:
    mistake = MISTAKES[name]
    (tmp_path / "model.py").write_text(PREAMBLE + mistake.body + "\n")
    finished = zoscope_cli("bounds", "model.py")
    paragraph, *frame = finished.err.splitlines()
    assert (finished.code, finished.out) == (2, ""), finished.err
    assert paragraph.startswith("Error: ")
    assert mistake.cause in paragraph
    assert mistake.remedy in paragraph
    assert paragraph.index(mistake.cause) < paragraph.index(mistake.remedy)
    assert not mistake.line or f"(model.py, line {mistake.line})" in paragraph
    assert not any("zoscope/" in line and "site-packages" not in line for line in frame), "frames of zoscope's own"


def test_a_sum_is_measured_and_said_to_be_one(zoscope_cli, tmp_path: Path) -> None:
    body = "problem = zoscope.Problem(net, [(x, y)], lambda m, b: (m(b[0]) - b[1]).square().sum())\n"
    (tmp_path / "model.py").write_text(PREAMBLE + body)
    assert "Warning sum-reduced: " in zoscope_cli("bounds", "model.py", "--max-hvps", "20").err
    finished = zoscope_cli("bounds", "model.py", "--max-hvps", "20", "-v")
    said = " ".join(finished.err.split())
    assert finished.code == 0
    assert f"The loss (model.py, line {HERE}) grows with the batch size" in said
    assert "12 times as large" in said
    assert "Use reduction='mean'" in said


def test_a_generator_that_is_fresh_is_read_once_and_kept(zoscope_cli, tmp_path: Path) -> None:
    body = "problem = zoscope.Problem(net, ((x[i:i+4], y[i:i+4]) for i in range(0, 12, 4)), loss)\n"
    (tmp_path / "model.py").write_text(PREAMBLE + body)
    finished = zoscope_cli("bounds", "model.py", "--max-hvps", "20", "--json")
    assert finished.code == 0
    assert '"num_examples": 12' in finished.out
