"""Whatever is wrong with a user's file or model is one paragraph with the right exit code, and nothing else."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

PREAMBLE = """
import torch
import zoscope
from torch import nn
torch.manual_seed(0)
x, y = torch.randn(12, 3), torch.randn(12, 1)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
x, y = x.double(), y.double()
mse = nn.MSELoss()
def loss(model, batch):
    return mse(model(batch[0]), batch[1])
"""


@dataclass(frozen=True)
class Bad:
    """A spec, what its error must mention, and how it ends."""

    body: str
    named: str
    code: int = 2
    args: tuple[str, ...] = ()
    framed: bool = False


SPECS = {
    "missing name": Bad("other = zoscope.Problem(model, [(x, y)], loss)", "other"),
    "misspelt name": Bad("problme = zoscope.Problem(model, [(x, y)], loss)", "problme"),
    "callable that raises": Bad("def problem():\n    return 1 / 0", "ZeroDivisionError", framed=True),
    "file that raises": Bad("raise RuntimeError('on import')", "on import", framed=True),
    "error beside Exception": Bad("class E(BaseException):\n    pass\nraise E('odd')", "odd", framed=True),
    "error that cannot be shown": Bad(
        "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E", "raised E", framed=True
    ),
    "error of many words": Bad("raise ValueError('x' * 99_999)", "x…", framed=True),
    "syntax error": Bad("def problem(:", "model.py", framed=True),
    "missing import": Bad("import no_such_package_anywhere", "no_such_package_anywhere", framed=True),
    "missing arguments": Bad("def problem(width):\n    return None", "width"),
    "unknown setting": Bad("def problem():\n    return None", "depth", args=("--set", "depth=3")),
    "settings of an object": Bad(
        "problem = zoscope.Problem(model, [(x, y)], loss)", "--set", args=("--set", "depth=3")
    ),
    "not a problem": Bad("problem = model", "Problem"),
    "function without return": Bad("def problem():\n    pass", "None"),
    "no batches": Bad("problem = zoscope.Problem(model, [], loss)", "batch"),
    "batch of no examples": Bad("problem = zoscope.Problem(model, [(x, y), (x[:0], y[:0])], loss)", "0 examples"),
    "loss is a vector": Bad("problem = zoscope.Problem(model, [x], lambda m, b: m(b))", "scalar"),
    "loss is an integer": Bad("problem = zoscope.Problem(model, [x], lambda m, b: torch.tensor(3))", "int64"),
    "loss is a float": Bad("problem = zoscope.Problem(model, [x], lambda m, b: m(b).mean().item())", "float"),
    "loss is nan": Bad("problem = zoscope.Problem(model, [x], lambda m, b: m(b).mean() * float('nan'))", "nan", 3),
    "loss is infinite": Bad("problem = zoscope.Problem(model, [x], lambda m, b: m(b).mean().exp() / 0)", "inf", 3),
    "loss without gradient": Bad(
        "problem = zoscope.Problem(model, [x], lambda m, b: m(b).detach().square().mean())", "detach"
    ),
    "loss that raises": Bad("problem = zoscope.Problem(model, [x], lambda m, b: m(b, b))", "TypeError", framed=True),
    "loss that exits": Bad("problem = zoscope.Problem(model, [x], lambda m, b: exit(0))", "sys.exit(0)", framed=True),
    "async function": Bad("async def problem():\n    return None", "async def"),
    "async loss": Bad(
        "async def later(m, b):\n    return m(b).mean()\nproblem = zoscope.Problem(model, [x], later)", "async def"
    ),
    "nothing to train": Bad("problem = zoscope.Problem(model.requires_grad_(False), [(x, y)], loss)", "requires_grad"),
    "no parameter matches": Bad(
        "problem = zoscope.Problem(model, [(x, y)], loss)", "decoder", args=("--params", "decoder")
    ),
    "dropout": Bad("problem = zoscope.Problem(nn.Sequential(model, nn.Dropout(0.5)), [(x, y)], loss)", "Dropout"),
    "batch norm in several micro-batches": Bad(
        "problem = zoscope.Problem(nn.Sequential(model, nn.BatchNorm1d(1).double()), [(x, y)], loss)",
        "BatchNorm",
        args=("--micro-batch", "4"),
    ),
    "shuffled loader": Bad(
        "data = torch.utils.data.TensorDataset(x, y)\n"
        "loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)\n"
        "problem = zoscope.Problem(model, loader, loss)",
        "shuffle",
    ),
    "no second derivative": Bad(
        "class Once(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        return x * 2\n"
        "    @staticmethod\n"
        "    @torch.autograd.function.once_differentiable\n"
        "    def backward(ctx, g):\n"
        "        return g * 2\n"
        "problem = zoscope.Problem(model, [x], lambda m, b: Once.apply(m(b)).square().mean())",
        "--curvature forward",
    ),
}


@pytest.fixture
def write(tmp_path: Path):
    def call(body: str) -> Path:
        file = tmp_path / "model.py"
        file.write_text(PREAMBLE + textwrap.dedent(body) + "\n")
        return file

    return call


@pytest.mark.parametrize("name", SPECS)
def test_a_bad_spec_is_one_paragraph_and_no_result(zoscope_cli, write, tmp_path: Path, name: str) -> None:
    bad = SPECS[name]
    write(bad.body)
    finished = zoscope_cli("bounds", "model.py", "--output", "result.json", *bad.args)
    assert finished.code == bad.code, finished.err
    lines = finished.err.splitlines()
    assert lines[0].startswith("Error: "), finished.err
    assert bad.named in lines[0]
    assert finished.out == ""
    assert not (tmp_path / "result.json").exists()
    frame = "\n".join(lines[1:])
    if bad.framed:
        assert "model.py" in frame
        assert str(Path("zoscope") / "spec") not in frame, "zoscope's own frames are of no use to the user"
    else:
        assert not frame


GOOD = "problem = zoscope.Problem(model, [(x, y)], loss)"


def keys_renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("0.", "first.", 1): value for key, value in state.items()}


def shapes_changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value[..., :1] for key, value in state.items()}


class Payload:
    """What ``weights_only`` is there to refuse."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (keys_renamed, "first.weight"),
        (shapes_changed, "0.weight"),
        (lambda _: Payload(), "weights_only"),
        (lambda _: [1, 2], "state_dict"),
        (None, "model.pt"),
    ],
    ids=["keys", "shapes", "pickle", "list", "not a checkpoint"],
)
def test_a_bad_checkpoint_is_one_paragraph(zoscope_cli, write, tmp_path: Path, content, named: str) -> None:
    write(GOOD)
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).state_dict()
    file = tmp_path / "model.pt"
    if content is None:
        file.write_bytes(b"not a checkpoint")
    else:
        torch.save(content(state), file)
    finished = zoscope_cli("bounds", "model.py", "--checkpoint", "model.pt")
    assert finished.code == 2
    assert named in finished.paragraph
    assert finished.out == ""


@pytest.mark.parametrize("spec", ["nowhere.py", "no.such.module:problem", "", ":", "model.py:", "."])
def test_a_spec_that_is_not_there_is_one_paragraph(zoscope_cli, write, spec: str) -> None:
    write(GOOD)
    finished = zoscope_cli("bounds", spec)
    assert finished.code == 2
    assert finished.paragraph


def test_no_spec_at_all_says_where_one_is_looked_for(zoscope_cli) -> None:
    finished = zoscope_cli("bounds")
    assert finished.code == 2
    for place in ("zoscope.yaml", "pyproject.toml", "model.py"):
        assert place in finished.paragraph


@pytest.mark.parametrize("item", ["steps", "=3", "1a=3", "steps=[1"])
def test_a_setting_that_is_not_one_is_refused(zoscope_cli, write, item: str) -> None:
    write(GOOD)
    finished = zoscope_cli("bounds", "model.py", "--set", item)
    assert finished.code == 2
    assert "--set" in finished.paragraph


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_one_paragraph(zoscope_cli, write) -> None:
    write(GOOD)
    finished = zoscope_cli("bounds", "model.py", "--device", "cuda")
    assert finished.code == 2
    assert "cuda" in finished.paragraph.lower()


def test_an_interrupt_in_the_users_code_is_130(zoscope_cli, write) -> None:
    write("def problem():\n    raise KeyboardInterrupt")
    finished = zoscope_cli("bounds", "model.py")
    assert (finished.code, finished.out) == (130, "")
    assert "Traceback" not in finished.err
