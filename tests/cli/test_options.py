"""Every option value that cannot be meant is refused in one paragraph, before a spec is looked at."""

from pathlib import Path
from typing import Any

import pytest

from zoscope import UsageError
from zoscope.cli.options import Given
from zoscope.options import COMMANDS, OPTIONS, options_of

BAD = [
    (["--rtol", "0"], "--rtol"),
    (["--rtol", "nan"], "--rtol"),
    (["--rtol", "-0.1"], "--rtol"),
    (["--rtol", "1"], "--rtol"),
    (["--rtol", "two"], "--rtol"),
    (["--max-hvps", "0"], "--max-hvps"),
    (["--method", "densee"], "dense"),
    (["--curvature", "gnn"], "ggn"),
    (["--hvp", "fast"], "--hvp"),
    (["--device", "gpu"], "cuda:0"),
    (["--device", "cuda:x"], "cuda:0"),
    (["--dtype", "float16"], "float32"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "1.5"], "--seed"),
    (["--micro-batch", "0"], "--micro-batch"),
    (["--max-memory", "lots"], "--max-memory"),
    (["--max-memory", "9" * 25], "--max-memory"),
    (["--optimizer", "zo-sgd"], "'zo-gd'"),
    (["--optimizer", "gd", "--optimizer", "adma"], "'adam'"),
    (["--steps", "0"], "--steps"),
    (["--steps", "2e4"], "'--steps': expected a whole number"),
    (["--optimiser", "gd"], "--optimizer"),
    (["--beta", "-0.1"], "--beta"),
    (["--beta", "1"], "--beta"),
    (["--beta", "nan"], "--beta"),
    (["--betas", "0.9"], "0.9,0.999"),
    (["--betas", "0.9,0.999,1"], "0.9,0.999"),
    (["--betas", "0.9,x"], "0.9,0.999"),
    (["--betas", "0.9,nan"], "--betas"),
    (["--betas", "0.9,1.0"], "--betas"),
    (["--eps", "0"], "--eps"),
    (["--eps", "inf"], "--eps"),
    (["--preconditioner", "adam.pt"], "state:FILE"),
    (["--preconditioner", "state:"], "state:FILE"),
    (["--preconditioner", "state:nowhere.pt"], "nowhere.pt"),
    (["--directions", "laplace"], "sphere"),
    (["--queries", "0"], "--queries"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--params", "layer["], "--params"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--output", "nowhere/result.json"], "nowhere"),
    (["--bogus"], "--bogus"),
    (["a.py", "b.py"], "b.py"),
]


@pytest.mark.parametrize(("args", "named"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_a_bad_value_is_one_paragraph_and_exit_2(zoscope_cli, args: list[str], named: str) -> None:
    finished = zoscope_cli("bounds", "missing.py", *args) if args[0] != "a.py" else zoscope_cli("bounds", *args)
    assert finished.code == 2
    assert named in finished.paragraph
    assert finished.out == ""


def given(command: str = "bounds", **values: Any) -> Given:
    """The options of a command, of which some were given."""
    defaults = {option.name: shown(option.default) for _, option in options_of(command)}
    return Given(command, {**defaults, **values})


def shown(default: object) -> object:
    return ",".join(map(str, default)) if isinstance(default, tuple) else default


def test_zeroth_order_names_mean_the_same_families_for_bounds() -> None:
    assert given(optimizer=["zo-gdm", "gd", "gdm"]).families == ("gdm", "gd")
    assert given().families == ("gd", "gdm", "adam")


def test_betas_arrive_as_two_numbers() -> None:
    assert given(betas="0.8, 0.95").betas == (0.8, 0.95)


def test_every_option_of_the_table_belongs_to_a_command() -> None:
    used = [name for panels in COMMANDS.values() for names in panels.values() for name in names.split()]
    assert {*used} == {*OPTIONS}
    for command, panels in COMMANDS.items():
        names = [name for line in panels.values() for name in line.split()]
        assert len({*names}) == len(names), command


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_of_the_contract_are_accepted(value: str) -> None:
    assert given(device=value).device == value


def test_a_value_that_is_too_large_is_told_the_range(zoscope_cli) -> None:
    for args, range in ((["--queries", "2000000"], "from 1 to 1000000"), (["--eps", "2"], "at most 1")):
        assert range in zoscope_cli("bounds", "missing.py", *args).paragraph


def test_an_optimizer_state_must_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "adam.pt"
    with pytest.raises(UsageError, match=r"adam\.pt"):
        given(preconditioner=f"state:{file}")
    file.write_bytes(b"")
    assert given(preconditioner=f"state:{file}").preconditioner == f"state:{file}"


@pytest.mark.parametrize("command", ["bounds", "probe", "track", "plan"])
def test_eps_is_adams_and_mezos_is_mu(zoscope_cli, command: str) -> None:
    finished = zoscope_cli(command, "missing.py", "--optimizer", "zo-gd", "--eps", "1e-3")
    assert finished.code == 2
    assert "--mu" in finished.paragraph


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--lr", "0.1"], "No such option: --lr. See"),  # not --html
        (["--schedule", "cos"], "--schedule: got 'cos'. Expected constant, linear, cosine"),
    ],
)
def test_what_plan_does_not_take(zoscope_cli, tmp_path: Path, args: list[str], said: str) -> None:
    spec = tmp_path / "spec.py"
    spec.write_text(
        "import torch, zoscope\nproblem = zoscope.Problem.from_function(lambda x: (x * x).sum(), torch.ones(3))\n"
    )
    finished = zoscope_cli("plan", spec, *args)
    assert finished.code == 2
    assert said in finished.paragraph
