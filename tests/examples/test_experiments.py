"""``examples/experiments``: every spec can be measured, every configuration is valid and runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import zoscope
from zoscope.cli.app import run
from zoscope.config.training import read_track_config
from zoscope.spec import load_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "experiments"
QUICK = {"batch-size", "flatzero-logistic", "gd-mlp", "toy", "zo-adam-mlp", "zo-gd-lstm"}
CONFIGS = [
    pytest.param(file, id=file.stem, marks=() if file.stem in QUICK else pytest.mark.slow)
    for file in sorted(FOLDER.glob("*.yaml"))
]
TINY: dict[str, dict[str, Any]] = {
    "mlp.py": {"examples": 12, "width": 6},
    "vision.py": {"examples": 6, "width": 4},
    "sorting.py": {"examples": 6, "length": 2, "width": 4},
    "flatzero.py:logistic": {"features": 40, "examples": 20},
    "flatzero.py:svm": {"features": 40, "examples": 20},
    "flatzero.py:toy": {"size": 10},
}
SPECS = [
    ("mlp.py", {}),
    ("mlp.py", {"activation": "gelu"}),
    ("vision.py", {"network": "cnn"}),
    ("vision.py", {"network": "resnet20", "norm": "group"}),
    ("vision.py", {"network": "resnet20", "norm": "batch"}),
    ("vision.py", {"network": "vit"}),
    ("sorting.py", {"network": "lstm"}),
    ("sorting.py", {"network": "mamba"}),
    ("flatzero.py:logistic", {}),
    ("flatzero.py:svm", {}),
    ("flatzero.py:toy", {}),
]


@pytest.mark.parametrize(("spec", "settings"), SPECS)
def test_a_spec_has_finite_bounds(spec: str, settings: dict[str, Any]) -> None:
    problem = load_spec(str(FOLDER / spec), settings={**TINY[spec], **settings}).problem
    result = zoscope.bounds(problem, optimizers=("gd",), max_hvps=30, rtol=0.3, device="cpu", method="deflated-slq")
    gd = result.to_dict()["optimizers"]["gd"]
    assert 0 < gd["fo"] < float("inf")
    assert 0 < gd["zo"]["exact"] < float("inf")


@pytest.mark.parametrize(("spec", "settings"), SPECS)
def test_a_spec_is_the_same_twice_other_with_another_seed_and_leaves_the_global_generator(
    spec: str, settings: dict[str, Any]
) -> None:
    def start(seed: int) -> torch.Tensor:
        problem = load_spec(str(FOLDER / spec), settings={**TINY[spec], **settings, "seed": seed}).problem
        return torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_runs_for_a_few_steps(
    config: Path, without_pictures: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = read_track_config(config)
    spec = Path(values["spec"]).name
    folder = tmp_path / "run"
    options = ["--steps", "4", "--every", "2", "--max-hvps", "20", "--run", str(folder), "--quiet"]
    for key, value in TINY[spec].items():
        options += ["--set", f"{key}={value}"]
    for key in values.get("sweep", {}):  # one run of a sweep is enough here
        last = values["sweep"][key][-1]
        options += ["--sweep", f"{key}={last}"]
    assert run(["track", "--config", str(config), *options]) == 0, capfd.readouterr().err
    (metrics,) = folder.rglob("metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(record["trace"] is not None for record in records)


def test_every_configuration_is_in_the_readme_and_the_readme_names_no_other() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"experiments/([\w.-]+\.yaml)", text))
    assert named == {file.name for file in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        ("vision.py", {"network": "alexnet"}, "expected cnn, resnet20 or vit"),
        ("vision.py", {"network": "resnet20", "norm": "layer"}, "expected group or batch"),
        ("sorting.py", {"network": "gru"}, "expected lstm or mamba"),
        ("mlp.py", {"activation": "sine"}, "expected gelu or tanh"),
        ("vision.py", {"data": "no-such-folder"}, "cifar-10-batches-py"),
        ("flatzero.py:logistic", {"data": "no-such-file"}, "LIBSVM"),
    ],
)
def test_a_wrong_setting_says_what_is_expected(spec: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(zoscope.errors.SpecError, match=words):
        load_spec(str(FOLDER / spec), settings=settings)
