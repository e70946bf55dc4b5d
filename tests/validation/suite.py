"""Small training tasks on which step sizes are measured and compared; nothing in the package was tuned on them.

Data are scikit-learn's own or made here, everything is seeded, and every task has one batch with all of its examples in
the first dimension. Each starts where Adam has taken it: near a minimum, or in the middle of training.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

import zoscope


@dataclass(frozen=True)
class Task:
    """A training task.

    Args:
        make: Makes the problem, always the same one.
        about: One line about the model, the loss and the point of training.
        language: Whether it is one of the language models, whose loss takes several milliseconds.
    """

    make: Callable[[], zoscope.Problem]
    about: str
    language: bool = False


TASKS: dict[str, Task] = {}
"""By name."""


def task(about: str, *, language: bool = False) -> Callable[[Callable[[], zoscope.Problem]], Callable[..., Any]]:
    """Enter a function that makes a problem under its own name."""

    def enter(make: Callable[[], zoscope.Problem]) -> Callable[[], zoscope.Problem]:
        TASKS[make.__name__] = Task(make, about, language)
        return make

    return enter


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random numbers from a seed, and as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def mlp(unit: type[nn.Module], *widths: int) -> nn.Sequential:
    """A fully connected network with ``unit`` between its layers."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for before, after in itertools.pairwise(widths[1:]):
        layers += [unit(), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def trained(problem: zoscope.Problem, *, steps: int, lr: float) -> zoscope.Problem:
    """The same problem after some steps of Adam on all examples, lr falling to zero along a cosine."""
    (batch,), optimizer = problem.batches, torch.optim.Adam(problem.model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.model, batch).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return problem


def fitted(
    build: Callable[[], nn.Module],
    batch: tuple[Any, Any],
    criterion: Callable[[Any, Any], Tensor],
    *,
    steps: int,
    lr: float = 1e-2,
    seed: int = 0,
) -> zoscope.Problem:
    """A model of inputs and targets with the loss ``criterion(model(x), y)``, trained."""
    with seeded(seed):
        model = build()
    return trained(zoscope.Problem.from_criterion(model, batch, criterion), steps=steps, lr=lr)


def standard(values: Any) -> Tensor:
    """Columns with mean 0 and variance 1, in float32."""
    found = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    return torch.tensor((found - found.mean(0)) / (found.std(0) + 1e-9), dtype=torch.float32)


def classes(data: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Standard inputs, and labels."""
    return standard(data[0]), torch.tensor(data[1])


def targets(data: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Standard inputs, and standard targets ``(n, k)``."""
    return standard(data[0]), standard(data[1])


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Images ``(count, 64)`` with values from 0 to 1, and their labels."""
    data = datasets.load_digits()
    return torch.tensor(data.data[:count] / 16, dtype=torch.float32), torch.tensor(data.target[:count])


# Classification by fully connected networks.


@task("two moons, GELU, cross-entropy, in the middle of training")
def moons() -> zoscope.Problem:
    data = classes(datasets.make_moons(240, noise=0.2, random_state=1))
    return fitted(lambda: mlp(nn.GELU, 2, 32, 16, 2), data, nn.CrossEntropyLoss(), steps=60)


@task("two circles that overlap, tanh, cross-entropy, near a minimum")
def circles() -> zoscope.Problem:
    data = classes(datasets.make_circles(200, noise=0.25, factor=0.5, random_state=2))
    return fitted(lambda: mlp(nn.Tanh, 2, 24, 8, 2), data, nn.CrossEntropyLoss(label_smoothing=0.1), steps=600)


@task("five blobs in eight dimensions, ReLU, cross-entropy, in the middle of training")
def blobs() -> zoscope.Problem:
    data = classes(datasets.make_blobs(250, n_features=8, centers=5, cluster_std=4.0, random_state=3))
    return fitted(lambda: mlp(nn.ReLU, 8, 32, 24, 5), data, nn.CrossEntropyLoss(), steps=40)


@task("iris, tanh, cross-entropy with smoothed labels, near a minimum")
def iris() -> zoscope.Problem:
    data = classes(datasets.load_iris(return_X_y=True))
    return fitted(lambda: mlp(nn.Tanh, 4, 30, 3), data, nn.CrossEntropyLoss(label_smoothing=0.1), steps=600)


@task("wine, ReLU, cross-entropy, in the middle of training")
def wine() -> zoscope.Problem:
    data = classes(datasets.load_wine(return_X_y=True))
    return fitted(lambda: mlp(nn.ReLU, 13, 40, 20, 3), data, nn.CrossEntropyLoss(), steps=15)


@task("breast cancer, tanh, cross-entropy on classes that separate, in the middle of training")
def breast_cancer() -> zoscope.Problem:
    data = classes(datasets.load_breast_cancer(return_X_y=True))
    return fitted(lambda: mlp(nn.Tanh, 30, 24, 2), data, nn.CrossEntropyLoss(), steps=15)


# Regression.


@task("Friedman's first function with noise, GELU, squared loss, in the middle of training")
def friedman() -> zoscope.Problem:
    data = targets(datasets.make_friedman1(200, noise=1.0, random_state=4))
    return fitted(lambda: mlp(nn.GELU, 10, 48, 32, 1), data, nn.MSELoss(), steps=60)


@task("Friedman's second function with noise, tanh, squared loss, near a minimum")
def friedman_fitted() -> zoscope.Problem:
    data = targets(datasets.make_friedman2(160, noise=100.0, random_state=5))
    return fitted(lambda: mlp(nn.Tanh, 4, 36, 1), data, nn.MSELoss(), steps=600)


@task("diabetes, a wide ReLU network, Huber loss, in the middle of training")
def diabetes() -> zoscope.Problem:
    data = targets(datasets.load_diabetes(return_X_y=True))
    return fitted(lambda: mlp(nn.ReLU, 10, 180, 200, 1), data, nn.HuberLoss(delta=0.5), steps=30, lr=1e-3)


@task("linnerud, 20 examples with three targets, tanh, squared loss, near a minimum")
def linnerud() -> zoscope.Problem:
    data = targets(datasets.load_linnerud(return_X_y=True))
    return fitted(lambda: mlp(nn.Tanh, 3, 24, 24, 3), data, nn.MSELoss(), steps=400)


@task("digits as one-hot vectors, a wide GELU network, squared loss, in the middle of training")
def digits_squared() -> zoscope.Problem:
    images, labels = digits(200)
    one_hot = functional.one_hot(labels, 10).float()
    return fitted(lambda: mlp(nn.GELU, 64, 256, 64, 10), (images, one_hot), nn.MSELoss(), steps=30, lr=2e-3)


class Factors(nn.Module):
    """Entries of a matrix of low rank."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(size, rank) / math.sqrt(rank)) for size in (rows, columns))

    def forward(self, places: Tensor) -> Tensor:
        """Places ``(n, 2)`` to entries ``(n,)``."""
        return (self.left[places[:, 0]] * self.right[places[:, 1]]).sum(-1)


@task("completion of a noisy 40 by 30 matrix of rank 5, squared loss, near a minimum")
def matrix() -> zoscope.Problem:
    with seeded(6):
        full = Factors(40, 30, 5)
        places = torch.stack([torch.randint(40, (600,)), torch.randint(30, (600,))], dim=1)
        entries = full(places).detach() + 0.3 * torch.randn(600)
    return fitted(lambda: Factors(40, 30, 5), (places, entries), nn.MSELoss(), steps=800)


# Other losses.


class Taylor(nn.Module):
    """A tanh network of one variable with its first two derivatives, carried along through its layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = mlp(nn.Tanh, 1, width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Points ``(n, 1)`` to values and second derivatives, ``(n,)`` each."""
        value, first, second = x, torch.ones_like(x), torch.zeros_like(x)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                value, first, second = layer(value), first @ layer.weight.T, second @ layer.weight.T
            else:
                value = torch.tanh(value)
                slope = 1 - value**2
                first, second = slope * first, slope * second - 2 * value * slope * first**2
        return value[:, 0], second[:, 0]


@task("the equation u'' + u³ = f on an interval by collocation, tanh, in the middle of training")
def pde() -> zoscope.Problem:
    def loss(model: nn.Module, points: Tensor) -> Tensor:
        exact = torch.sin(2 * math.pi * points[:, 0])
        u, second = model(points)
        ends, _ = model(points.new_tensor([[0.0], [1.0]]))
        force = exact**3 - 4 * math.pi**2 * exact
        return 1e-2 * (second + u**3 - force).square().mean() + ends.square().mean()

    with seeded(7):
        model, points = Taylor(32), torch.rand(128, 1)
    return trained(zoscope.Problem(model, [points], loss), steps=60, lr=1e-2)


class Autoencoder(nn.Module):
    """Variational autoencoder of the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(nn.GELU, 64, 32, 8), mlp(nn.GELU, 4, 32, 64)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images and the noise of their codes to the negative evidence lower bound, per pixel."""
        mean, log_variance = self.encoder(images).chunk(2, dim=-1)
        drawn = self.decoder(mean + noise * (0.5 * log_variance).exp())
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return functional.binary_cross_entropy_with_logits(drawn, images) + divergence / 64


@task("a variational autoencoder of digits, its noise drawn once, in the middle of training")
def vae() -> zoscope.Problem:
    with seeded(8):
        model, noise = Autoencoder(), torch.randn(200, 4)
    return trained(zoscope.Problem(model, (digits(200)[0], noise), lambda m, b: m(*b)), steps=150, lr=3e-3)


@task("a convolutional autoencoder of digits, GELU, squared loss, near a minimum")
def conv_autoencoder() -> zoscope.Problem:
    def build() -> nn.Module:
        encoder = [nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)]
        decoder = [nn.ConvTranspose2d(4, 8, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(8, 1, 2, stride=2)]
        return nn.Sequential(*encoder, *decoder)

    images = digits(128)[0].view(-1, 1, 8, 8)
    return fitted(build, (images, images), nn.MSELoss(), steps=400)


class Policy(nn.Module):
    """Logits of four actions."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(nn.Tanh, 6, 32, 4)

    def forward(self, states: Tensor) -> Tensor:
        """States ``(n, 6)`` to log-probabilities ``(n, 4)``."""
        return functional.log_softmax(self.network(states), dim=-1)


@task("a policy cloned with weights exp(advantage) that differ by a factor of 100, tanh, in the middle of training")
def policy() -> zoscope.Problem:
    with seeded(9):
        model, states, actions = Policy(), torch.randn(256, 6), torch.randint(4, (256,))
        values = torch.sin(states @ torch.randn(6, 4))[torch.arange(256), actions]
    weights = (2.3 * values).exp()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        states, actions, weights = batch
        return -(weights * model(states).gather(1, actions[:, None])[:, 0]).mean()

    return trained(zoscope.Problem(model, (states, actions, weights / weights.mean()), loss), steps=80, lr=1e-2)


# Sequences, and depth.


class Recurrent(nn.Module):
    """An LSTM that reads an image row by row; written out, as torch's own cell cannot run under vmap."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.gates, self.head = nn.Linear(8 + width, 4 * width), nn.Linear(width, 10)
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(n, 64)`` to logits ``(n, 10)``."""
        hidden = cell = images.new_zeros(len(images), self.width)
        for row in images.unflatten(-1, (8, 8)).unbind(-2):
            keep, take, tell, new = self.gates(torch.cat([row, hidden], dim=-1)).chunk(4, dim=-1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(take) * torch.tanh(new)
            hidden = torch.sigmoid(tell) * torch.tanh(cell)
        return self.head(hidden)


@task("an LSTM that reads digits row by row, cross-entropy, in the middle of training")
def lstm() -> zoscope.Problem:
    return fitted(Recurrent, digits(160), nn.CrossEntropyLoss(), steps=60)


class Residual(nn.Module):
    """Two residual blocks, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), mlp(nn.ReLU, 32, 64, 32)) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(n, 64)`` to logits ``(n, 10)``."""
        x = self.first(images)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@task("residual blocks with layer norms on digits, ReLU, cross-entropy with smoothed labels, near a minimum")
def residual() -> zoscope.Problem:
    return fitted(Residual, digits(160), nn.CrossEntropyLoss(label_smoothing=0.1), steps=300, lr=3e-3)


class Decoder(nn.Module):
    """One layer of causal attention, whose readout is its embedding of characters."""

    def __init__(self, vocabulary: int, length: int, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = mlp(nn.GELU, width, 2 * width, width)
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices ``(n, length)`` to logits ``(n, vocabulary, length)``."""
        x = self.tokens(indices) + self.positions.weight[: indices.shape[1]]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.feed(self.norms[1](x))
        return (self.norms[2](x) @ self.tokens.weight.T).transpose(1, 2)


@task("a transformer with tied embeddings on characters, GELU, cross-entropy, in the middle of training")
def transformer() -> zoscope.Problem:
    rows = [text[:17] for text in TEXTS[:32]]
    characters = sorted(set("".join(rows)))
    indices = torch.tensor([[characters.index(c) for c in row] for row in rows])
    data = (indices[:, :-1], indices[:, 1:])
    return fitted(lambda: Decoder(len(characters), 16), data, nn.CrossEntropyLoss(), steps=60)


# Language models, as transformers builds them: about 125,000 parameters on 64 texts of eight words.


def next_word_loss(model: nn.Module, words: Tensor) -> Tensor:
    """Mean cross-entropy of every word after the first one."""
    logits = model(input_ids=words[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), words[:, 1:])


def language_model(build: Callable[[int], nn.Module]) -> zoscope.Problem:
    """A model for so many different words, after 60 steps of Adam on all texts."""
    words = sorted(set(" ".join(TEXTS).split()))
    indices = torch.tensor([[words.index(word) for word in text.split()] for text in TEXTS])
    with seeded(10):
        model = build(len(words)).eval()
    return trained(zoscope.Problem(model, [indices], next_word_loss), steps=60, lr=3e-3)


ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@task("a GPT-2 with two layers of width 64 on short texts, in the middle of training", language=True)
def gpt2() -> zoscope.Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    return language_model(
        lambda n: GPT2LMHeadModel(GPT2Config(vocab_size=n, n_positions=16, n_embd=64, n_layer=2, n_head=4, **ENDS))
    )


@task("an OPT with two layers of width 64 on short texts, in the middle of training", language=True)
def opt() -> zoscope.Problem:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "ffn_dim": 256}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 16}
    return language_model(lambda n: OPTForCausalLM(OPTConfig(vocab_size=n, **shape, **ENDS)))


@task("a Llama with two layers of width 64 on short texts, in the middle of training", language=True)
def llama() -> zoscope.Problem:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return language_model(
        lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, max_position_embeddings=16, **shape, **ENDS))
    )


TEXTS = """\
the old mill stands beside the quiet river
a small dog waits at the garden gate
heavy rain fell over the hills all night
she found a silver coin under the bridge
the baker opens his shop before the sunrise
two boats crossed the lake in thick fog
he wrote a long letter to his brother
children ran across the field toward the fire
the train was late because of fresh snow
a tired farmer carried water to his horses
we watched the stars from the wooden roof
the teacher drew a map on the wall
an owl called twice from the dark forest
my sister painted her door green last spring
the market sells apples and honey every morning
strong wind bent the tall trees near town
he repaired the clock with a thin wire
the ship left the harbour without its captain
a narrow path leads up to the castle
they shared warm bread and soup at noon
the doctor walked home through the empty street
snow covered the roofs and the silent square
she keeps her books in a glass case
the river carried leaves and branches to sea
a young fox slept below the fallen tree
the mayor spoke to the crowd for hours
grandfather tells the same story about the war
the bus stopped in front of our school
three birds built a nest above the window
he lost his key somewhere on the beach
the cook added salt and pepper to taste
a bright lamp hung over the kitchen table
the painter mixed blue and yellow for leaves
her uncle sold the farm to a stranger
the cat watched the mouse behind the stove
soldiers marched past the church at early dawn
the judge read the letter without a word
a storm broke the mast of the boat
they planted roses along the old stone wall
the student solved the puzzle in one evening
our neighbour plays the piano late at night
the hunter followed deep tracks in the snow
a cold spring runs beneath the mountain road
the clerk counted the money and went home
she opened the window to hear the rain
the boy threw a stone into the well
four horses pulled the cart up the hill
the captain marked the island on his map
a thin smoke rose from the distant valley
the nurse sang softly to the sick child
he bought a red scarf for his mother
the library closes at six on winter days
a wooden sign points the way to town
the fisherman mended his nets in the sun
she danced with her father at the wedding
the gardener cut the grass before the storm
old men play chess under the chestnut tree
the bell rang and the pupils went outside
a white horse stood alone in the meadow
the thief escaped through a small back door
they lit candles when the power went out
the carpenter made a chair from oak wood
her letter arrived two weeks after the feast
the king gave his crown to the poor""".splitlines()
