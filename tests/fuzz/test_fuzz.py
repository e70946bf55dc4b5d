"""Hostile input of every kind: a result, or one paragraph; FUZZ=1000 makes it long."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import zoscope
from zoscope.cli.app import is_ranked
from zoscope.options import options_of
from zoscope.report.console import usable

from .hostile import ODD, VALUES, WORDS, changed, damaged, folder_of, seeded, zoscope_says

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX files and signals")

SLOW = {"plot", "html", "tensorboard", "sweep", "steps", "replicas", "max_steps", "max_passes", "max_cost", "help"}
SLOW |= {"batch_size"}
BASE = {
    "bounds": ["bounds", "model.py", "-q"],
    "spectrum": ["spectrum", "model.py", "-q"],
    "check": ["check", "--spec", "model.py", "--optimizer", "zo-gd", "--lr", "1e-3", "-q"],
    "track": ["track", "model.py", "--lr", "1e-3", "--steps", "4", "--every", "2", "--max-seconds", "2", "-q"],
    "probe": ["probe", "model.py", "-q", "--replicas", "1", "--steps", "4"],
    "plan": ["plan", "model.py", "-q", "--replicas", "2", "--steps", "4"],
}


@pytest.fixture(autouse=True)
def no_pictures(without_pictures: None) -> None:
    """Pictures of runs take seconds."""


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from([*BASE, *BASE, "init", "explain", "report"]))
    args = list(BASE.get(command, [command]))
    if command not in BASE:
        return [*args, *draw(st.lists(ODD, max_size=2))]
    options = [option for _, option in options_of(command) if option.name not in SLOW and option.name != "spec"]
    for option in draw(st.lists(st.sampled_from(options), min_size=1, max_size=3)):
        flag = draw(st.sampled_from(option.flags))
        flags_alone = type(option.domain).__name__ == "Flag"
        args += [flag] if flags_alone else draw(st.sampled_from([[flag, draw(VALUES)], [f"{flag}={draw(VALUES)}"]]))
    return args


@seeded
@given(command_lines())
def test_options(args: list[str]) -> None:
    with folder_of({}):
        zoscope_says(args)


CONFIG: dict[str, Any] = {
    "problem": "model.py",
    "defaults": {"steps": 100, "curvature": {"rtol": 0.1, "seed": 1}, "estimator": {"mu": 1e-3, "queries": 2}},
    "checks": [
        {"name": "a", "optimizer": {"name": "zo-adam", "lr": 1e-4, "betas": [0.9, 0.99]}, "policy": {"margin": 0.5}},
        {
            "name": "b",
            "optimizer": {"name": "gd", "lr": {"schedule": "linear", "peak": 0.1, "warmup": 3}},
            "set": {"scale": 2},
        },
    ],
}


@seeded
@given(st.data())
def test_configurations(data: st.DataObject) -> None:
    document = changed(data.draw, CONFIG)
    text = yaml.safe_dump(document, allow_unicode=True)
    content = data.draw(damaged(text.encode(errors="replace"))) if data.draw(st.booleans()) else text
    form = data.draw(st.sampled_from(["text", "json", "github", "markdown", "junit", "sarif"]))
    with folder_of({"zoscope.yaml": content}):
        said = zoscope_says(["check", "zoscope.yaml", "--format", form, "-q"])
        if form in ("json", "sarif") and said.out:
            json.loads(said.out)


HF = {"learning_rate": 1e-4, "optim": "adamw_torch", "per_device_train_batch_size": 8, "max_steps": 10, "zo_eps": 1e-3}


@seeded
@given(st.data())
def test_other_documents(data: st.DataObject) -> None:
    """Training arguments, baselines, a pyproject.toml and the configuration of a run."""
    kind = data.draw(st.sampled_from(["hf", "baseline", "pyproject", "track"]))
    if kind == "hf":
        text, name, args = json.dumps(changed(data.draw, HF)), "args.json", ["check", "--spec", "model.py", "--hf-args"]
        args += ["args.json"]
    elif kind == "baseline":
        checks = [{"name": "zo-gd", "optimizer": "zo-gd", "threshold": 0.1, "ci95": [0.1, 0.2], "status": "pass"}]
        text = json.dumps(changed(data.draw, {"schema": "zoscope.check/1", "checks": checks}))
        name, args = "b.json", [*BASE["check"], "--baseline", "b.json"]
    elif kind == "pyproject":
        text, name, args = '[tool.zoscope]\nproblem = "model.py"\n', "pyproject.toml", ["bounds", "-q"]
    else:
        run = {"spec": "model.py", "optimizer": "zo-gd", "lr": 1e-3, "steps": 3, "every": 2, "betas": [0.9, 0.99]}
        text, name = yaml.safe_dump(changed(data.draw, run)), "run.yaml"
        args = ["track", "--config", "run.yaml", "--max-seconds", "2", "-q", "--steps", "3"]
    content = data.draw(damaged(text.encode())) if data.draw(st.booleans()) else text
    with folder_of({name: content}):
        zoscope_says(args)


GOLDEN = Path(__file__).parents[1] / "golden"
RESULTS = ("bounds", "bounds-forward-batch", "plan", "probe-edge", "track", "track-sweep", "check", "spectrum-layers")


@seeded
@given(st.data())
def test_results_that_are_put_into_a_page(data: st.DataObject) -> None:
    pytest.importorskip("plotly", reason="needs plotly: pip install 'zoscope[report]'")
    text = (GOLDEN / f"{data.draw(st.sampled_from(RESULTS))}.json").read_text(encoding="utf-8")
    document = json.loads(text.replace('"seconds": "#"', '"seconds": 1.5'))["runs"][-1]["stdout"]
    for _ in range(data.draw(st.integers(1, 3))):
        document = changed(data.draw, document)
    with folder_of({"a.json": json.dumps(document)}):
        said = zoscope_says(["report", "a.json", "--html", "page.html", "-q"])
        assert Path("page.html").exists() == (said.code == 0)


EXPRESSIONS = st.sampled_from(
    ["None", "3", "'x'", "lambda: None", "lambda: problem()", "lambda: 1/0", "lambda: exit()", "lambda: [][0]"]
    + [
        f"zoscope.Problem.from_function(lambda x: {loss}, torch.ones(3))"
        for loss in (
            "x",
            "x.sum()",
            "None",
            "1.0",
            "x.sum() * float('nan')",
            "x.sum() * 1e38",
            "1e300 * (x.double() ** 2).sum()",
            "(x * 0).sum()",
            "x.abs().sum()",
            "x.sqrt().sum() * 0",
            "x.round().sum()",
            "x.sum().item()",
            "torch.rand(())",
            "(x - 1).square().sum() * 1e-300",
            "(x - 1).double().square().sum() * 1e-200",
            "x.sum().long()",
            "x[5]",
            "(x ** 4).sum().detach()",
            "(x ** 40).sum()",
            "torch.exp(x * 100).sum()",
            "x.prod() ** 9",
            "x.sum() + 1e30",
        )
    ]
    + [
        f"zoscope.Problem.from_function(lambda x: (x ** 2).sum(), {x})"
        for x in (
            "None",
            "torch.ones(0)",
            "torch.ones(3).int()",
            "torch.ones(3) * float('inf')",
            "[1.0]",
            "torch.ones(())",
            "torch.ones(3).half()",
            "torch.ones(3, dtype=torch.complex64)",
            "torch.zeros(3)",
            "torch.ones(3) * 1e30",
            "torch.ones(3, device='meta')",
            "torch.ones(3).to_sparse()",
            "torch.full((3,), 1e-30)",
        )
    ]
    + [
        f"zoscope.Problem(torch.nn.Linear(2, 1), {batches}, lambda m, b: m(b).square().mean())"
        for batches in (
            "[]",
            "None",
            "[None]",
            "[torch.ones(0, 2)]",
            "torch.ones(3, 2)",
            "[torch.ones(3, 5)]",
            "iter([])",
            "{}",
            "3",
            "[torch.ones(3, 2) * 1e20]",
            "[torch.ones(3, 2)] * 3",
            "[[1, 2]]",
            "lambda: 3",
            "[torch.ones(3, 2).long()]",
        )
    ]
)


@seeded
@given(
    EXPRESSIONS, st.sampled_from(["hessian", "ggn", "forward"]), st.sampled_from(["bounds", "spectrum", "check"]), WORDS
)
def test_specs(expression: str, curvature: str, command: str, text: str) -> None:
    source = f"import torch, zoscope\nNAME = {text!r}\nproblem = {expression}\n"
    extra = ["--curvature", curvature] if command == "bounds" else []
    with folder_of({"model.py": source}):
        zoscope_says([*BASE[command], *extra])


def stopped_run() -> dict[str, bytes]:
    """The files of a run that was stopped half-way, and of one that is over."""
    start = ["track", "model.py", "--lr", "1e-3", "-q"]
    with folder_of({}) as place:
        zoscope_says([*start, "--steps", "40", "--every", "10", "--run", "over"])
        zoscope_says([*start, "--steps", "4000", "--every", "2", "--run", "run", "--max-seconds", "0.2"])
        while len((place / "run" / "metrics.jsonl").read_bytes().splitlines()) <= 2:  # the machine is slow
            zoscope_says(["track", "--resume", "run", "--max-seconds", "0.2", "-q"])
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in place.glob("*/*.*") if path.is_file()}


RUNS: dict[str, bytes] = {}


@seeded
@given(st.data())
def test_run_folders(data: st.DataObject) -> None:
    if not RUNS:
        RUNS.update(stopped_run())
    name = data.draw(st.sampled_from(sorted(RUNS)))
    original = RUNS[name]
    if data.draw(st.booleans()) or name.endswith(".pt"):
        content = data.draw(damaged(original))
    elif name.endswith(".yaml"):
        content = yaml.safe_dump(changed(data.draw, yaml.safe_load(original))).encode(errors="replace")
    else:
        lines = original.split(b"\n") if name.endswith(".jsonl") else [original]
        number = data.draw(st.integers(0, max(len(lines) - 2, 0)))
        lines[number] = json.dumps(changed(data.draw, json.loads(lines[number]))).encode(errors="replace")
        content = b"\n".join(lines)
    with folder_of({**RUNS, name: content}) as place:
        (place / "run" / "summary.json").unlink(missing_ok=True)
        zoscope_says(["track", "--compare", "run", "over"])
        said = zoscope_says(["track", "--resume", "run", "--max-seconds", "0.01", "-q"])
        metrics = (place / "run" / "metrics.jsonl").read_bytes()
        if said.code == 0:
            assert b"\0" not in metrics
            steps = [json.loads(line)["step"] for line in metrics.splitlines()]
            assert steps == sorted(set(steps))
            zoscope_says(["track", "--compare", "run"])
        else:  # what was refused was left as it was
            assert metrics == (content if name == "run/metrics.jsonl" else RUNS["run/metrics.jsonl"])


@seeded
@given(st.data())
def test_checkpoints_of_runs(data: st.DataObject) -> None:
    """A checkpoint in which a value was changed by a program that knows its format."""
    if not RUNS:
        RUNS.update(stopped_run())
    with folder_of(RUNS) as place:
        file = place / "run" / "checkpoint.pt"
        content = torch.load(file, weights_only=True)
        if data.draw(st.booleans()):
            content.pop("seal")
        torch.save(changed(data.draw, content), file)
        zoscope_says(["track", "--resume", "run", "--max-seconds", "0.01", "-q"])


@pytest.mark.parametrize("config", [None, True, [], [[1]], {3: 4, "a": 5}])
def test_a_checkpoint_whose_config_is_no_table_is_refused(config: Any) -> None:
    if not RUNS:
        RUNS.update(stopped_run())
    with folder_of(RUNS) as place:
        content = torch.load(place / "run" / "checkpoint.pt", weights_only=True)
        del content["seal"]
        torch.save(content | {"config": config}, place / "run" / "checkpoint.pt")
        assert zoscope_says(["track", "--resume", "run", "--max-seconds", "0.01", "-q"]).code == 2


@seeded
@given(st.data())
def test_weights(data: st.DataObject) -> None:
    state = {data.draw(st.one_of(st.just("weight"), st.just("bias"), WORDS)): torch.zeros(1, 2), "bias": torch.zeros(1)}
    with tempfile.TemporaryDirectory() as name:
        torch.save(changed(data.draw, state), Path(name) / "w.pt")
        content = (Path(name) / "w.pt").read_bytes()
    content = data.draw(damaged(content)) if data.draw(st.booleans()) else content
    model = "zoscope.Problem(torch.nn.Linear(2, 1), [torch.ones(3, 2)], lambda m, b: m(b).square().mean())"
    with folder_of({"model.py": f"import torch, zoscope\nproblem = {model}\n", "w.pt": content}):
        option = data.draw(st.sampled_from([["--checkpoint", "w.pt"], ["--preconditioner", "state:w.pt"]]))
        zoscope_says([*BASE["bounds"], *option])


CACHE: dict[str, Any] = {}


@seeded
@given(st.data())
def test_caches(data: st.DataObject) -> None:
    args = [*BASE["check"], "--cache", "cache", "--json"]
    if not CACHE:
        with folder_of({}) as place:
            CACHE["truth"] = _thresholds(zoscope_says(args).out)
            (file,) = (place / "cache").glob("*.json")
            CACHE["name"], CACHE["content"] = file.name, file.read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(damaged(CACHE["content"]))
    else:
        content = json.dumps(changed(data.draw, json.loads(CACHE["content"]))).encode(errors="replace")
    with folder_of({f"cache/{CACHE['name']}": content}):
        assert _thresholds(zoscope_says(args).out) == CACHE["truth"]


def _thresholds(document: str) -> list[Any]:
    return [(check["threshold"], check["ci95"], check["status"]) for check in json.loads(document)["checks"]]


NAMES = ["COLUMNS", "LINES", "TERMINAL_WIDTH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NO_COLOR", "TERM"]
NAMES += ["GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY", "LANG", "PYTHONIOENCODING", "OMP_NUM_THREADS"]


@seeded
@given(st.dictionaries(st.sampled_from(NAMES), VALUES.filter(lambda text: "\0" not in text), min_size=1, max_size=5))
def test_environments(environment: dict[str, str]) -> None:
    with contextlib.suppress(zoscope.UsageError):
        is_ranked(environment)
    sizes = usable(environment)
    assert all(50 <= int(sizes[name]) <= 1000 for name in ("COLUMNS", "TERMINAL_WIDTH") if name in sizes)
    with pytest.MonkeyPatch.context() as patch, folder_of({}):
        for name, value in environment.items():
            if name not in ("RANK", "WORLD_SIZE"):
                patch.setenv(name, value)
        said = zoscope_says(BASE["bounds"])
        assert "use lr" in said.out
        zoscope_says(BASE["check"])
