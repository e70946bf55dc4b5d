"""What bounds the cost of a measurement, and what is asked of its precision, is an option wherever there is one."""

import json
from pathlib import Path

import pytest

from zoscope.analysis.estimate import estimate
from zoscope.config.keys import CURVATURE
from zoscope.config.training import TRACK
from zoscope.options import KEYWORDS

WIDE = """
import torch, zoscope
d = torch.logspace(-3, 0, 300, dtype=torch.float64)
problem = zoscope.Problem.from_function(lambda x: 0.5 * (d * x * x).sum(), torch.ones_like(d))
"""
COARSE = ("--method", "deflated-slq", "--max-hvps", "24", "--rtol", "1e-4")
EVERYWHERE = ("max_memory", "shard_basis", "strict")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.py"
    path.write_text(WIDE)
    return path


@pytest.mark.parametrize("command", ["bounds", "probe", "check", "track", "spectrum"])
def test_every_command_that_measures_has_them(zoscope_cli, command: str) -> None:
    page = zoscope_cli(command, "--help").out
    assert not [name for name in EVERYWHERE if f"--{name.replace('_', '-')}" not in page]


def test_every_function_that_measures_has_them() -> None:
    for function, (_, accepted) in KEYWORDS.items():
        # A plan keeps no basis that is worth spreading, and is asked for no precision.
        needed = {"max_memory"} if function == "plan" else {*EVERYWHERE}
        assert not needed - {*accepted.__annotations__}, function
    assert not {*EVERYWHERE} - {*CURVATURE.names}
    assert not {*EVERYWHERE} - {*TRACK.names}


def test_one_process_has_nobody_to_spread_a_basis_over(zoscope_cli, wide: Path) -> None:
    for args in (["bounds"], ["bounds", "--estimate"], ["probe"], ["spectrum"], ["track", "--lr", "0.01"]):
        finished = zoscope_cli(args[0], wide, *args[1:], "--shard-basis", "-q")
        assert finished.code == 2, args
        assert "torchrun" in finished.paragraph
    finished = zoscope_cli("check", "--spec", wide, "--optimizer", "gd", "--lr", "0.1", "--shard-basis", "-q")
    assert finished.code == 2
    assert "torchrun" in finished.out


def test_a_probe_needs_the_precision_asked_for_with_strict(zoscope_cli, wide: Path) -> None:
    args = ("probe", wide, *COARSE, "--steps", "2", "--replicas", "2")
    finished = zoscope_cli(*args, "--strict")
    assert finished.code == 3
    assert "--rtol" in finished.paragraph
    assert "Inconclusive" in zoscope_cli(*args).out
    assert zoscope_cli("probe", wide, "--method", "dense", "--optimizer", "gd", "--strict", "-q").code == 0


def test_a_run_shows_its_result_before_strict_fails_it(zoscope_cli, without_pictures, wide: Path) -> None:
    args = ("track", wide, "--lr", "1e-4", "--steps", "2", "--every", "1", *COARSE, "-q")
    assert zoscope_cli(*args, "--run", "one").code == 0
    finished = zoscope_cli(*args, "--run", "two", "--strict")
    assert finished.code == 3
    assert "2" in finished.out
    assert "--rtol" in finished.paragraph
    assert "strict" not in Path("two/config.yaml").read_text()
    swept = zoscope_cli(*args, "--run", "all", "--sweep", "seed=0,1", "--strict")
    assert swept.code == 3
    assert "--rtol" in swept.paragraph


def products(zoscope_cli, wide: Path, *args: str) -> int:
    finished = zoscope_cli("bounds", wide, "--optimizer", "gd", "--estimate", "--json", *args)
    assert finished.code == 0
    return json.loads(finished.out)["curvature"]["hessian"]["num_hvps"]


def test_an_estimate_is_of_the_method_asked_for(zoscope_cli, wide: Path) -> None:
    assert products(zoscope_cli, wide, "--max-hvps", "100") == 100
    assert products(zoscope_cli, wide, "--max-hvps", "100", "--method", "dense") == 300
    assert products(zoscope_cli, wide) == 300
    assert products(zoscope_cli, wide, "--method", "deflated-slq") == 200


def test_an_estimate_is_of_the_kind_that_is_named(zoscope_cli, wide: Path) -> None:
    for named, kinds in (([], ["hessian", "forward"]), (["hessian"], ["hessian"]), (["forward"], ["forward"])):
        args = [word for kind in named for word in ("--curvature", kind)]
        found = json.loads(zoscope_cli("bounds", wide, "--estimate", "--json", *args).out)
        assert list(found["curvature"]) == kinds
        assert found["recommended"]["curvature"] == kinds[0]


def test_an_estimate_is_strict_about_what_is_known_beforehand(zoscope_cli, wide: Path) -> None:
    args = ("bounds", wide, "--estimate", "--curvature", "forward", "--max-hvps", "200", "--rtol")
    assert zoscope_cli(*args, "1e-3").code == 0
    assert zoscope_cli(*args, "0.9", "--strict").code == 0
    finished = zoscope_cli(*args, "1e-3", "--strict")
    assert finished.code == 3
    assert "--max-hvps" in finished.paragraph


def test_an_estimate_computes_products_as_asked(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoscope.analysis import estimate as module
    from zoscope.spec import load_spec

    asked = []
    operator = module.curvature_operator
    monkeypatch.setattr(
        module,
        "curvature_operator",
        lambda objective, request: asked.append(request.hvp) or operator(objective, request),
    )
    estimate(load_spec(str(wide)).problem, hvp="double-backward")
    assert {*asked} == {"double-backward"}


def test_an_estimate_recommends_what_fits_the_memory_allowed(zoscope_cli, wide: Path) -> None:
    args = ("bounds", wide, "--estimate", "--json")
    free, limited = (json.loads(zoscope_cli(*args, *more).out) for more in ([], ["--max-memory", "100GB"]))
    assert limited["bytes_available"] < min(free["bytes_available"], 100e9) or free["bytes_available"] < 100e9
    finished = zoscope_cli(*args, "--max-memory", "1MB")
    assert finished.code == 3
    assert "--max-memory leaves no room" in finished.paragraph
