"""Every command of the README and of the guide runs, in a copy of the examples, beside a model of the reader's own.

A quick test runs each with examples that are hardly trained, few products and few steps; a slow one as it stands.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from zoscope.cli.app import COMMANDS, run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GUIDE = sorted(page for page in (EXAMPLES / "guide").glob("*.md") if page.name != "options.md")
PAGES = [ROOT / "README.md", EXAMPLES / "ci" / "README.md", *GUIDE]

MODEL = """
import torch
import zoscope
from torch import nn


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.lora = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora(x)


def problem(checkpoint="model.pt"):
    torch.manual_seed(0)
    model = Adapted()
    model.load_state_dict(torch.load(checkpoint))
    x = torch.randn(32, 4)
    y = torch.sin(x[:, :3]) + 0.1 * torch.randn(32, 3)
    return zoscope.Problem.from_criterion(model, [(x, y)], nn.MSELoss())
"""
"""The reader's own model, which the pages call model.py."""

FILES = {
    "run.yaml": "spec: model.py\nlr: 0.001\nsteps: 20\nevery: 10\n",
    "zoscope.yaml": "problem: model.py\nchecks:\n  - {name: first, steps: 100, optimizer: {name: zo-gd, lr: 1e-4}}\n",
    "args.json": '{"trainer": "zo", "learning_rate": 1e-4, "max_steps": 20, "per_device_train_batch_size": 4}\n',
}

PLACEHOLDERS = {"SPEC": "model.py", "RUN": "runs/first", "FILE": "file.svg", "DIR": "folder"}

SHORT = {
    "bounds": "--max-hvps 40 --rtol 0.5",
    "spectrum": "--max-hvps 40 --rtol 0.5",
    "check": "--max-hvps 60 --rtol 0.5",
    "plan": "--steps 6 --replicas 2 --max-cost 300",
    "probe": "--max-hvps 40 --rtol 0.5 --steps 6 --replicas 2 --edge-rtol 0.5 --max-seconds 1",
    "track": "--max-hvps 40 --rtol 0.5 --max-seconds 0.2",
}
"""Options that come last, and count: they make a command short."""


@dataclass(frozen=True)
class Command:
    """A command of a page, as it is written, in words."""

    text: str
    words: tuple[str, ...]
    processes: int = 0  # with torchrun

    @property
    def name(self) -> str:
        return self.words[0]

    def short(self) -> list[str]:
        """Words of the command made short, in one process and without a picture, which have tests of their own."""
        words = [word for word in self.words if word != "--shard-basis"]
        if "--plot" in words:
            words = [*words[: words.index("--plot")], *words[words.index("--plot") + 2 :]]
        if "--compare" in words or (self.name == "plan" and "--only" in words):
            return words
        if "--resume" in words:
            return [*words, "--max-seconds", "0.2"]
        return [*words, *SHORT.get(self.name, "").split()]


NAMED = rf"zoscope +((?:{'|'.join(COMMANDS)})\b[^`#\n]*)"
BLOCK = r"^ *```[a-z]*\n.*?^ *```$|^(?: {4}.*\n)+"
TYPED = rf"^ *(?:\$ )?(?:torchrun --nproc-per-node (\d) -m (?:-- )?)?{NAMED}"
"""What starts a line of a block of code."""

QUOTED = rf"`{NAMED}`"
"""What stands between backticks; a command where it names a model or a file of its own."""


def commands(page: Path) -> list[Command]:
    """Those of a page, in order."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = list(re.finditer(BLOCK, text, flags=re.DOTALL | re.MULTILINE))
    inside = [(block.start() + m.start(), m) for block in blocks for m in re.finditer(TYPED, block[0], re.MULTILINE)]
    prose = re.sub(BLOCK, lambda block: " " * len(block[0]), text, flags=re.DOTALL | re.MULTILINE)
    outside = [(m.start(), m) for m in re.finditer(QUOTED, prose) if re.search(r"SPEC|\.py\b|\.yaml\b", m[1])]
    found = []
    for _, match in sorted(inside + outside, key=lambda item: item[0]):
        typed = match[match.re.groups].strip()
        if "…" not in typed:
            words = tuple(PLACEHOLDERS.get(word, word) for word in shlex.split(typed))
            found.append(Command(f"zoscope {typed}", words, int(match[1] or 0) if match.re.groups == 2 else 0))
    return found


def possible(page: Path) -> list[Command]:
    """Those that can run here: pages for a browser need plotly."""
    return [command for command in commands(page) if "--html" not in command.words or find_spec("plotly") is not None]


def test_commands_are_found() -> None:
    found = {page.name: [command.text for command in commands(page)] for page in GUIDE}
    assert "zoscope bounds model.py --set checkpoint=other.pt" in found["your-model.md"]
    assert (
        "zoscope probe examples/digits_mlp.py --batch-size 224 --edge --steps 300 --seed 0" in found["mini-batches.md"]
    )
    assert "zoscope bounds model.py --shard-basis" in found["several-processes.md"]
    assert any("--schedule cosine" in command.text for command in commands(ROOT / "README.md"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random decoder as ``save_pretrained`` writes it, which the pages call FOLDER."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    split = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "great": 2, "terrible": 3}, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    sizes: dict[str, Any] = {"vocab_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=8, ffn_dim=16, max_position_embeddings=64)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples and what the pages take to be there."""
    import torch

    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("*.png", "__pycache__", "*.ipynb"))
    (tmp_path / "model.py").write_text(MODEL)
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(shape) for name, shape in SHAPES.items()}
    for name in ("model.pt", "other.pt"):
        torch.save(state, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


SHAPES = {"base.weight": (3, 4), "base.bias": (3,), "lora.weight": (3, 4)}


def prepare(command: Command, world: Path, language_model: Callable[[], Path]) -> list[str]:
    """The words of a command in the world of its page; what it writes takes the place of what is there."""
    if command.name == "init":
        for name in ("model.py", "training_args.json", *["zoscope.yaml"] * ("--ci" in command.words)):
            (world / name).unlink(missing_ok=True)
    if (
        command.name == "track" and "--run" not in command.words
    ):  # each page begins anew; the folder has the spec's name
        shutil.rmtree(world / "runs" / "model-zo-gd", ignore_errors=True)
    if "--compare" in command.words:  # with a run that the page has not made
        there = next(world.glob("runs/**/config.yaml")).parent
        for folder in command.words[2:]:
            if not (world / folder).exists():
                shutil.copytree(there, world / folder)
    return [word.replace("FOLDER", str(language_model())) if "FOLDER" in word else word for word in command.words]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [*filter(commands, PAGES), pytest.param(EXAMPLES / "README.md", marks=pytest.mark.slow)], ids=named
)
def test_every_command_runs_in_short(
    page: Path,
    world: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    without_pictures: None,
) -> None:
    for example in (world / "examples").glob("*.py"):
        text = re.sub(r"(\bsteps: int = )\d+", r"\g<1>2", example.read_text(encoding="utf-8"))
        example.write_text(text, encoding="utf-8")
    for command in possible(page):
        words = prepare(command, world, lambda: request.getfixturevalue("language_model"))
        code = run(replace(command, words=tuple(words)).short())
        said = capfd.readouterr().err
        assert code in (0, 1, 3), f"{command.text}\n{said}"
        assert "bug in zoscope" not in said, f"{command.text}\n{said}"


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(commands, PAGES)), ids=named)
def test_every_command_runs_as_it_stands(page: Path, world: Path, request: pytest.FixtureRequest) -> None:
    resumed = {word for command in commands(page) if "--resume" in command.words for word in command.words[2:]}
    for command in possible(page):
        words = prepare(command, world, lambda: request.getfixturevalue("language_model"))
        if "--run" in words and resumed & set(words):
            words += ["--max-seconds", "1"]  # so that something is left to do
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(command.processes)] if command.processes else []
        line = [sys.executable, *start, "-m", *["--"] * bool(start), "zoscope", *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=3600)
        assert done.returncode in (0, 1), f"{command.text}\n{done.stderr}"


def scripts() -> list[tuple[str, str]]:
    """Scripts that the pages name, and what follows them."""
    found = {}
    for page in (*PAGES, EXAMPLES / "README.md"):
        for path, rest in re.findall(
            r"python ((?:tests|examples)/\S+\.py)([^`\n#]*)", page.read_text(encoding="utf-8")
        ):
            found[path, rest.strip()] = None
    return list(found)


@pytest.mark.parametrize(("path", "rest"), scripts())
def test_scripts_that_pages_name_exist_with_their_options(path: str, rest: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest):
        assert f'"{option}"' in source, f"{path} has no {option}"
