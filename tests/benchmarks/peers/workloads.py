"""Networks to measure: each a model where its training stopped, one batch and a criterion, which every tool takes.

A hundred or two of training steps give the spectra their outliers. All are trained from fixed seeds on one thread.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import zoscope

EXAMPLES = Path(__file__).parents[3] / "examples"


@dataclass(frozen=True)
class Workload:
    """A model, one batch ``(inputs, targets)`` and a criterion of ``(outputs, targets)`` that is a mean."""

    name: str
    title: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    criterion: nn.Module
    most: int = 5000
    """Products that zoscope may take."""
    own: zoscope.Problem | None = None
    """The same for zoscope where it takes a more natural form than the other tools; from the rest when left out."""

    @property
    def dim(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model is, and the batch with it."""
        return self.batch[0].device

    @property
    def problem(self) -> zoscope.Problem:
        """What zoscope is given."""
        return self.own or zoscope.Problem.from_criterion(self.model, [self.batch], self.criterion)


class HalfSquaredError(nn.Module):
    """Half the squared distance, averaged over the examples."""

    reduction = "mean"  # curvlinops asks, as it would torch's own losses

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(dim=1).mean()


@dataclass(frozen=True)
class Size:
    """How large a workload is to be.

    Args:
        share: Part of the 32×32 images and of the sequences, where a product takes seconds.
        tiny: A network of the same kind that takes no time: to see that everything runs.
        trained: Whether the networks are trained first, which costs of products do not ask for.
    """

    share: float = 1.0
    tiny: bool = False
    trained: bool = True

    def steps(self, usual: int) -> int:
        """Training steps of a workload that usually takes so many."""
        return 0 if not self.trained else min(usual, 2) if self.tiny else usual


def digits_cnn(size: Size) -> Workload:
    """W0: examples/digits_cnn.py."""
    problem = load_example("digits_cnn").problem(steps=20 if size.tiny else size.steps(4000))
    (batch,) = problem.batches
    return Workload("digits_cnn", "examples/digits_cnn.py, squared loss", problem.model, batch, HalfSquaredError())


def cnn(size: Size) -> Workload:
    """W1: four convolutions of width 32 on 32×32 images, squared loss."""
    width, examples = (4, 8) if size.tiny else (32, round(1000 * size.share))
    images, labels = tinted_digits(examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()),
            nn.AvgPool2d(2),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
        )
    batch = (images, functional.one_hot(labels, 10).float())
    criterion = HalfSquaredError()
    adam(model, batch, criterion, steps=size.steps(150), rows=64, lr=3e-3)
    return Workload("cnn", f"CNN 4×conv{width}, {examples:,} images 32×32, squared loss", model, batch, criterion)


class Residual(nn.Module):
    """Two convolutions around a skip connection that pads channels with zeros, as in ResNet-20 for CIFAR."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.stride, self.extra = outside // inside, outside - inside
        self.first = nn.Conv2d(inside, outside, 3, stride=self.stride, padding=1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        skip = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return torch.relu(y + skip)


def resnet(size: Size) -> Workload:
    """W2: ResNet-20 in evaluation mode, cross-entropy."""
    width, blocks, examples = (4, 1, 8) if size.tiny else (16, 3, round(256 * size.share))
    batch = tinted_digits(examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inside = width
        for outside in (width, 2 * width, 4 * width):
            for _ in range(blocks):
                layers.append(Residual(inside, outside))
                inside = outside
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
    criterion = nn.CrossEntropyLoss()
    adam(model, batch, criterion, steps=size.steps(60), rows=32, lr=2e-3)
    title = f"ResNet-{6 * blocks + 2}, {examples} images 32×32, batch norm in eval, cross-entropy"
    return Workload("resnet", title, model.eval(), batch, criterion)


class FlatLogits(nn.Module):
    """A decoder whose logits have one row per token, the layout that every tool's cross-entropy takes."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, indices: Tensor) -> Tensor:
        return self.decoder(indices).flatten(0, 1)


def decoder(size: Size) -> Workload:
    """W3: the decoder of examples/transformer.py with an untied readout, on sequences of a Markov chain."""
    width, layers, rows, vocabulary = (8, 1, 2, 20) if size.tiny else (128, 2, round(64 * size.share), 1000)
    context = 64
    indices = markov_chain(rows, context + 1, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = load_example("transformer").Decoder(vocabulary, width=width, layers=layers, context=context)
        inner.readout = nn.Linear(width, vocabulary, bias=False)
        model = FlatLogits(inner)
    inputs, targets = indices[:, :-1].contiguous(), indices[:, 1:].contiguous()
    criterion = nn.CrossEntropyLoss()
    adam(model, (inputs, targets), criterion, steps=size.steps(60), rows=16, lr=2e-3)
    title = (
        f"decoder, {layers} layers, width {width}, {rows}×{context} tokens, vocabulary {vocabulary:,}, cross-entropy"
    )
    own = zoscope.Problem(model, [(inputs, targets)], next_token_loss)
    return Workload("decoder", title, model, (inputs, targets.flatten()), criterion, own=own)


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over the tokens of whole sequences, which can be taken in pieces."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs), targets.flatten())


def digits_mlp(size: Size) -> Workload:
    """W4: examples/digits_mlp.py."""
    problem = load_example("digits_mlp").problem(steps=size.steps(140), width=8 if size.tiny else 128)
    (batch,) = problem.batches
    title = "examples/digits_mlp.py, ReLU, 1,797 digits, cross-entropy"
    return Workload("digits_mlp", title, problem.model, batch, nn.CrossEntropyLoss())


def build(name: str, size: Size, device: str = "cpu") -> Workload:
    """The workload of a name, trained on the CPU wherever it is measured."""
    found = WORKLOADS[name](size)
    inputs, targets = found.batch
    found = replace(found, model=found.model.to(device), batch=(inputs.to(device), targets.to(device)))
    return replace(found, most=60) if size.tiny else found


WORKLOADS: dict[str, Callable[[Size], Workload]] = {
    "digits_cnn": digits_cnn,
    "cnn": cnn,
    "resnet": resnet,
    "decoder": decoder,
    "digits_mlp": digits_mlp,
}
"""By name: builds the workload in a size."""


def adam(
    model: nn.Module, batch: tuple[Tensor, Tensor], criterion: nn.Module, *, steps: int, rows: int, lr: float
) -> None:
    """Mini-batches in the order of the data, so that the same model comes out each time."""
    inputs, targets = batch
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        chosen = torch.arange(step * rows, (step + 1) * rows) % len(inputs)
        optimizer.zero_grad()
        wanted = targets[chosen]
        criterion(model(inputs[chosen]), wanted.flatten() if wanted.dtype == torch.long else wanted).backward()
        optimizer.step()
    optimizer.zero_grad()


def tinted_digits(examples: int) -> tuple[Tensor, Tensor]:
    """Handwritten digits as colour images ``(n, 3, 32, 32)``, each in a colour of its own, and their labels."""
    data = load_digits()
    grey = torch.tensor(data.images[:examples], dtype=torch.float32).unsqueeze(1)
    colours = torch.rand(examples, 3, 1, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    images = functional.interpolate(grey, size=32, mode="bilinear") * colours
    return (images - images.mean()) / images.std(), torch.tensor(data.target[:examples])


def markov_chain(rows: int, length: int, vocabulary: int) -> Tensor:
    """Sequences ``(rows, length)`` in which every symbol has four successors: something to learn."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=generator)
    choices = torch.randint(4, (rows, length), generator=generator)
    symbols = [torch.randint(vocabulary, (rows,), generator=generator)]
    for position in range(1, length):
        symbols.append(successors[symbols[-1], choices[:, position]])
    return torch.stack(symbols, dim=1)


def load_example(name: str) -> ModuleType:
    """The module of a file in examples/."""
    spec = importlib.util.spec_from_file_location(f"zoscope_benchmark_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
