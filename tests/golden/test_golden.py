"""What the command line prints, word by word: every command, as text at 80 and 120 columns and as JSON.

Text is the answer, and in the files of ``v80`` and ``v120`` all that ``--verbose`` adds.

Each case runs in this process, in a folder of its own, and is compared with the files of its name beside this one.
``GOLDEN=write pytest tests/golden`` writes those files anew. Look at ``git diff tests/golden`` afterwards: it is what
users will see change.

Text has to be the same to the space, but for the last digit of numbers with decimals, percents and multiples. JSON
documents have the same keys in the same order, and floats within 1e-6, or 1e-9 absolutely. Left out are times, sizes of
memory, versions and folders.
"""

import importlib.metadata
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

import zoscope
from zoscope.cli.app import run

HERE = Path(__file__).parent
QUADRATIC = HERE.parents[1] / "examples" / "quadratic.py"
WRITE = os.environ.get("GOLDEN") == "write"

# Answer and everything at 80 and at 120 columns, and JSON. A case is one command line or several, as in a shell.
RESULTS = {
    "bounds": "bounds quadratic.py",
    "bounds-gd-lr": "bounds quadratic.py --optimizer gd --lr 0.02",
    "bounds-network": "bounds net.py --steps 100",
    "bounds-ggn": "bounds net.py --curvature ggn",
    "bounds-batch": "bounds net.py --batch-size 8 --lr 0.01 --optimizer gd --steps 100",
    "bounds-forward": "bounds functions.py:simulator --curvature forward --rtol 0.2 --lr 0.5",
    "bounds-estimate": "bounds net.py --estimate",
    "bounds-saddle": "bounds functions.py:saddle",
    "plan": "plan functions.py:even --steps 30 --replicas 2",
    "probe": "probe functions.py:even --threshold exact --growth 30 --replicas 4",
    "probe-gd": "probe quadratic.py --optimizer gd",
    "check": "check checks.yaml",
    "check-good": "check good.yaml",
    "check-baseline": "check good.yaml --baseline old.json --update-baseline;"
    " check good.yaml --baseline old.json --set scale=3 --max-drop 10%",
    "track": "track functions.py:even --lr 0.05 --steps 30 --every 10 --run one",
    "track-resume": "track functions.py:even --lr 0.05 --steps 20 --every 10 --run one --max-seconds 1e-9;"
    " track --resume one",
    "track-compare": "track functions.py:even --lr 0.01 --steps 10 --every 5 --run one;"
    " track functions.py:even --lr 0.02 --steps 10 --every 5 --run two -q;"
    " track --compare one two",
    "spectrum": "spectrum quadratic.py",
    "spectrum-layers": "spectrum net.py --by-layer --top 3",
    "spectrum-moments": "spectrum functions.py:wide --moments --rtol 0.05",
}

# Answer and everything at 80 columns, and JSON.
DETAILS = {
    "bounds-found": "bounds",
    "bounds-gdm-lr": "bounds quadratic.py --optimizer zo-gdm --beta 0.5 --lr 0.1 --steps 50",
    "bounds-params": "bounds net.py --params ^2 --optimizer zo-gd --micro-batch 4 --hvp batched",
    "bounds-state": "spectrum net.py --set save=true --moments -q;"
    " bounds net.py --set steps=0 --checkpoint weights.pt --optimizer adam --preconditioner state:adam.pt",
    "bounds-forward-kinks": "bounds net.py --set activation=ReLU --curvature forward --max-hvps 100",
    "bounds-forward-bent": "bounds functions.py:bent --curvature forward --optimizer gd --max-hvps 100",
    "bounds-forward-hill": "bounds functions.py:hill --curvature forward --max-hvps 60",
    "bounds-estimate-forward": "bounds functions.py:simulator --estimate",
    "bounds-hill": "bounds functions.py:hill --optimizer gd",
    "bounds-line": "bounds functions.py:line",
    "bounds-staircase": "bounds functions.py:staircase",
    "bounds-kinks": "bounds functions.py:bent",
    "bounds-upcast": "bounds functions.py:saddle --dtype bfloat16 --optimizer gd",
    "bounds-valley": "bounds functions.py:valley --optimizer zo-gd --lr 0.05",
    "bounds-plain": "bounds functions.py:plain --optimizer zo-gd",
    "bounds-prints": "bounds functions.py:talking --optimizer gd",
    "bounds-adam": "bounds quadratic.py --optimizer adam --betas 0.8,0.99 --eps 1e-3 --directions sphere --queries 4",
    "bounds-slq": "bounds functions.py:wide --method deflated-slq --rtol 0.05",
    "bounds-forward-batch": "bounds net.py --curvature forward --batch-size 8 --optimizer gd --max-hvps 100",
    "plan-batch": "plan net.py --steps 20 --batch-size 8 --replicas 2 --schedule linear --warmup 0.1",
    "plan-rehearsal": "plan functions.py:even --steps 200 --replicas 4 --method rehearsal",
    "probe-edge": "probe functions.py:even --edge --edge-rtol 0.2 --steps 60 --replicas 2 --growth 10",
    "probe-batch": "probe net.py --batch-size 8 --steps 10 --replicas 2 --lr 0.01",
    "check-only": "check checks.yaml --only near --only high --on-warn fail",
    "check-options": "check --spec functions.py:even --optimizer zo-adam --lr 1e-3 --margin 0.5 --rtol 0.01",
    "check-hf": "check good.yaml --only first --hf-args hf.json",
    "check-probe": "check good.yaml --only first --threshold exact --probe --steps 50",
    "track-adam": "track net.py --optimizer zo-adam --lr 0.002 --steps 20 --every 20 --batch-size 8 --curvature ggn",
    "track-config": "track --config run.yaml --seed 1",
    "track-forward": "track functions.py:even --lr 0.01,10:0.02 --steps 20 --every 10 --forward-every 5",
    "track-diverged": "track functions.py:even --optimizer gd --lr 5 --steps 300",
    "track-sweep-failed": "track functions.py:even --lr 0.01 --steps 10 --every 5 --run all --sweep set.scale=1,.inf",
    "track-sweep": "track functions.py:even --optimizer zo-gdm --lr 0.01 --steps 10 --every 5 --run all"
    " --sweep beta=0,0.5 --sweep set.scale=1,2",
    "spectrum-ggn": "spectrum net.py --curvature ggn --top 2",
    "spectrum-moments-network": "spectrum net.py --moments",
    "spectrum-line": "spectrum functions.py:line",
    "spectrum-saddle": "spectrum functions.py:saddle",
    "spectrum-slq": "spectrum functions.py:wide --method deflated-slq --top 4 --by-layer --rtol 0.1",
}

# Text at 80 columns alone.
LINES = {
    "version": "--version",
    "init": "init",
    "init-ci": "init nets.py --ci",
    "init-exists": "init model.py",
    "init-no-python": "init model.txt",
    "init-no-folder": "init gone/model.py",
    "explain": "explain",
    "explain-code": "explain few-modes",
    "explain-last": "bounds functions.py:saddle -q; explain indefinite-hessian",
    "error-explain": "explain few-mods",
    "bounds-exact": "bounds quadratic.py --optimizer zo-gd --threshold exact --lr 0.044",
    "bounds-adaptive": "bounds functions.py:even --optimizer zo-signsgd --optimizer zo-normalized --lr 0.04",
    "probe-sign-edge": "probe functions.py:even --optimizer zo-signsgd --edge",
    "track-normalized": "track functions.py:even --optimizer zo-normalized --lr 0.001 --steps 20 --every 10",
    "bounds-dense": "bounds net.py --method dense --optimizer gd",
    "strict": "bounds functions.py:wide --method deflated-slq --max-hvps 24 --rtol 1e-4 --optimizer gd --strict",
    "output-text": "bounds functions.py:saddle --output found.txt -q",
    "probe-refuted": "probe functions.py:even --optimizer gd --assume-threshold 0.4",
    "probe-inconclusive": "probe functions.py:even --threshold exact --steps 2 --replicas 2",
    "probe-time": "probe functions.py:even --max-seconds 1e-6 --replicas 2 --growth 10",
    "probe-linearized": "probe net.py --linearized --steps 30 --replicas 2 --ratios 0.5,1.1",
    "probe-adam": "probe functions.py:even --optimizer zo-adam --threshold exact --steps 30 --replicas 2",
    "check-forward": "check --spec net.py --optimizer gd --lr 0.001 --curvature forward --max-hvps 100",
    "check-batch": "check --spec net.py --optimizer zo-gd --lr 0.001 --batch-size 8",
    "check-markdown": "check checks.yaml --format markdown",
    "check-github": "check checks.yaml --format github",
    "check-junit": "check checks.yaml --format junit",
    "check-sarif": "check checks.yaml --format sarif",
    "check-lost": "check good.yaml --only first --spec gone.py --format github",
    "check-schema": "check --schema",
    "check-summary": "GITHUB_STEP_SUMMARY=summary.md check good.yaml -q",
    "check-files": "check checks.yaml --output junit=a.xml --output markdown=b.md --output text=c.txt -q",
    "check-cache": "check good.yaml --cache kept -q; check good.yaml --cache kept",
    "track-gd": "track net.py --optimizer gd --lr 0.05 --steps 20 --every 10",
    "track-target": "track functions.py:even --lr 0.05 --steps 99 --every adaptive --target-loss 0.1",
    "spectrum-imprecise": "spectrum functions.py:wide --method deflated-slq --max-hvps 30 --rtol 1e-3 --strict",
    "colours-bounds": "FORCE_COLOR=1 TERM=xterm-256color bounds functions.py:saddle --lr 0.05 -q",
    "colours-check": "FORCE_COLOR=1 TERM=xterm-256color check checks.yaml -q",
    "colours-error": "FORCE_COLOR=1 TERM=xterm-256color bounds functions.py:failing -q",
    "colours-probe": "FORCE_COLOR=1 TERM=xterm-256color probe functions.py:even --optimizer gd -q",
    "colours-spectrum": "FORCE_COLOR=1 TERM=xterm-256color spectrum net.py --by-layer -q",
    "colours-track": "FORCE_COLOR=1 TERM=xterm-256color track functions.py:even --lr 0.05 --steps 20 --every 10 -q",
    "error-spec-file": "bounds gone.py",
    "error-spec-module": "bounds no.such.module:problem",
    "error-spec-name": "bounds functions.py:sadle",
    "error-spec-default-name": "bounds functions.py",
    "error-spec-syntax": "bounds broken.py",
    "error-spec-raises": "bounds functions.py:failing",
    "error-spec-interrupted": "bounds functions.py:interrupted",
    "error-setting": "bounds net.py --set width=3",
    "error-setting-syntax": "bounds net.py --set width",
    "error-params": "bounds net.py --params decoder",
    "error-params-pattern": "bounds net.py --params (",
    "error-checkpoint": "bounds net.py --checkpoint gone.pt",
    "error-checkpoint-kind": "bounds net.py --checkpoint hf.json",
    "error-not-a-number": "bounds functions.py:undefined",
    "error-no-derivative": "bounds functions.py:simulator",
    "error-optimizer": "bounds net.py --optimizer zo-gdn",
    "error-lr": "bounds net.py --lr 0",
    "error-batch-size": "bounds net.py --batch-size 0",
    "error-rtol": "bounds net.py --rtol 2",
    "error-betas": "bounds net.py --betas 0.9",
    "error-method": "bounds net.py --method denes",
    "error-device": "bounds net.py --device gpu",
    "error-memory": "bounds net.py --max-memory lots",
    "error-memory-small": "bounds net.py --max-memory 1MB",
    "error-preconditioner": "bounds net.py --preconditioner state:gone.pt",
    "error-shard-basis": "bounds net.py --shard-basis",
    "error-output": "bounds net.py --output gone/found.json",
    "error-probe-two": "probe net.py --optimizer gd --optimizer adam",
    "error-probe-steps": "probe net.py --steps soon",
    "error-probe-ratios": "probe net.py --ratios 0.8:1.2",
    "error-probe-growth": "probe net.py --growth 1",
    "error-probe-forward": "probe net.py --curvature forward",
    "error-probe-linearized": "probe net.py --linearized --batch-size 8",
    "error-probe-plot": "probe net.py --plot picture.png",
    "error-plan-schedule": "plan net.py --schedule square",
    "error-plan-optimizer": "plan net.py --optimizer gd",
    "error-check-mistakes": "check mistakes.yaml",
    "error-check-github": "check mistakes.yaml --format github",
    "error-check-yaml": "check unreadable.yaml",
    "error-check-file": "check gone.yaml",
    "error-check-nothing": "check",
    "error-check-only": "check good.yaml --only firts",
    "error-check-format": "check good.yaml --format xml",
    "error-check-formats": "check good.yaml --json --format text",
    "error-check-lr": "check good.yaml --lr -1",
    "error-check-drop": "check good.yaml --max-drop 150%",
    "error-check-baseline": "check good.yaml --baseline gone.json",
    "error-check-update": "check good.yaml --update-baseline",
    "error-check-hf": "check good.yaml --hf-args gone.json",
    "error-track-lr": "track net.py",
    "error-track-schedule": "track net.py --lr x",
    "error-track-optimizer": "track net.py --lr 1 --optimizer zo-gdn",
    "error-track-every": "track net.py --lr 1 --every often",
    "error-track-specs": "track net.py model.py --lr 1",
    "error-track-config": "track --config run-mistake.yaml",
    "error-track-resume": "track --resume gone",
    "error-track-resume-options": "track --resume gone --lr 1",
    "error-track-sweep": "track net.py --lr 1 --sweep bet=1",
    "error-track-compare": "track --compare gone",
    "error-track-compare-nothing": "track --compare",
    "error-track-occupied": "track functions.py:even --lr 0.01 --steps 2 --every 2 --run one -q;"
    " track functions.py:even --lr 0.01 --run one",
    "error-spectrum-top": "spectrum net.py --top 0",
    "error-spectrum-forward": "spectrum net.py --curvature forward",
    "error-spectrum-moments": "spectrum net.py --moments --by-layer",
    "error-spectrum-plot": "spectrum net.py --plot picture.bmp",
}

# What Typer lays out, at 80 and at 120 columns: compared where its release is that of the stored files.
PAGES = {
    "help": "--help",
    "help-nothing": "",
    "help-bounds": "bounds --help",
    "help-plan": "plan --help",
    "help-probe": "probe --help",
    "help-check": "check --help",
    "help-track": "track --help",
    "help-spectrum": "spectrum --help",
    "help-report": "report --help",
    "help-explain": "explain --help",
    "help-init": "init --help",
    "usage-command": "bound net.py",
    "usage-option": "bounds net.py --lrr 0.1",
    "usage-number": "bounds net.py --lr high",
    "usage-missing": "bounds net.py --lr",
    "usage-argument": "bounds net.py model.py",
}

TABLES = (
    (RESULTS, ("80", "120", "v80", "v120", "json")),
    (DETAILS, ("80", "v80", "json")),
    (LINES, ("80",)),
    (PAGES, ("80", "120")),
)
CASES = {(name, form): table[name] for table, forms in TABLES for name in table for form in forms}
TYPER = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("typer", "rich"))
SHOWN = (".md", ".py", ".txt", ".xml", ".yaml")
"""Files whose text is compared; of others the name."""


def stored(name: str, form: str) -> Path:
    return HERE / (f"{name}.json" if form == "json" else f"{name}.{form}.txt")


@pytest.mark.parametrize(("name", "form"), CASES, ids=map("-".join, CASES))
def test_the_command_line_says_what_it_did(
    name: str,
    form: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    commands = CASES[name, form]
    written_with = HERE / "typer.txt"  # other releases lay pages out in other ways
    if name in PAGES and not WRITE and written_with.read_text() != f"{TYPER}\n":
        pytest.skip(f"stored with {written_with.read_text().strip()}, and this is {TYPER}")
    folder = tmp_path_factory.mktemp("case").resolve()
    shutil.copytree(HERE / "specs", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(QUADRATIC, folder)
    (folder / "broken.py").write_text('"""What Python cannot read."""\n\nproblem = (\n')
    before = {*folder.rglob("*")}
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "100" if form == "json" else form.removeprefix("v"))
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed: it takes seconds to load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Which way to step replicas is faster differs from run to run on a busy machine, and so does their rounding.
    monkeypatch.setattr("zoscope.optim.perturbation._seconds", lambda function: 1.0)
    monkeypatch.setattr("zoscope.planning.sources._seconds", lambda surface, theta: 1.0)
    if "--estimate" in commands:  # a table of times, which has to be of one width
        monkeypatch.setattr(time, "perf_counter", itertools.count(0, 1e-3).__next__)

    extra = {"j": " --json", "v": " --verbose"}.get(form[0], "")
    runs = list(finished(commands, extra, monkeypatch, capfd))
    made = [path for path in sorted({*folder.rglob("*")} - before) if path.is_file() and path.suffix != ".pyc"]
    text = (as_json if form == "json" else as_text)(runs, made, folder)
    file = stored(name, form)
    if WRITE:
        file.write_text(text, encoding="utf-8")
        written_with.write_text(f"{TYPER}\n")
    expected = file.read_text(encoding="utf-8")
    differs = json_differences if form == "json" else text_differences
    found = list(differs(expected, text))
    assert not found, f"{file.name}\n" + "\n".join(found[:40])


@pytest.mark.parametrize("name", [name for table in (RESULTS, DETAILS) for name in table])
def test_an_answer_has_twelve_lines_at_most(name: str) -> None:
    """With its notices, but without the lines that follow a run while it goes on; of several commands the last."""
    *_, last = stored(name, "80").read_text(encoding="utf-8").split("$ zoscope ")
    lines = last.partition("--- file")[0].splitlines()[2:]
    said = [line for line in lines if not re.match(r"--- std|([\w=,.]+: )?step \d|Error: ", line)]
    assert len(said) <= 12, "\n".join(said)


def test_every_stored_file_is_that_of_a_case() -> None:
    known = {stored(name, form) for name, form in CASES} | {HERE / "typer.txt"}
    strangers = {*HERE.glob("*.txt"), *HERE.glob("*.json")} - known
    if WRITE:
        for path in strangers:
            path.unlink()
    else:
        assert not strangers


Run = tuple[str, int, str, str]


def finished(
    commands: str, extra: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Command line, exit code, stdout and stderr of each command; the last one with an option more, if any."""
    lines = [line.strip() for line in commands.split(";")]
    lines[-1] += extra
    for line in lines:
        words = shlex.split(line)
        while words and re.match(r"[A-Z_]+=", words[0]):
            monkeypatch.setenv(*words.pop(0).split("="))
        code = run(words)
        yield line, code, *capfd.readouterr()


def as_text(runs: list[Run], files: list[Path], folder: Path) -> str:
    parts = []
    for line, code, out, err in runs:
        parts += [f"$ zoscope {line}", f"exit code {code}", "--- stdout", out, "--- stderr", err]
    for path in files:
        parts += [f"--- file {shown(path, folder)}", path.read_text(encoding="utf-8") if path.suffix in SHOWN else ""]
    return "".join(f"{line.rstrip()}\n" for part in parts for line in scrubbed(part, folder).splitlines())


def as_json(runs: list[Run], files: list[Path], folder: Path) -> str:
    last = len(runs) - 1
    document = {
        "runs": [
            {
                "command": line,
                "exit code": code,
                "stdout": json.loads(out) if number == last and out else out.splitlines(),
                "stderr": err.splitlines(),
            }
            for number, (line, code, out, err) in enumerate(runs)
        ],
        "files": {shown(path, folder): parsed(path) for path in files},
    }
    return json.dumps(scrubbed(document, folder), indent=1, ensure_ascii=False) + "\n"


VARIES = re.compile("seconds|^bytes")
"""Keys of times and sizes in documents."""
MEASURED = re.compile(r" *(?<![\d.])\d[\d.e-]* (?:(?:s|min|h|[KMGT]?i?B)\b|%(?= of the time))|(?<=time=\")[\d.]+")
"""The same in text."""


def shown(path: Path, folder: Path) -> str:
    """Name of a file; those of a cache are hashes."""
    return re.sub("[0-9a-f]{64}", "#", path.relative_to(folder).as_posix())


def parsed(path: Path) -> Any:
    """What a program finds in a file."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return None


def scrubbed(value: Any, folder: Path) -> Any:
    """The same without what differs between machines, releases and times of the day."""
    if isinstance(value, dict):
        return {key: "#" if item and VARIES.search(key) else scrubbed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [scrubbed(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    for name in (str(folder), str(folder).replace("_", "\\_")):  # the latter in Markdown
        value = value.replace(name, "<folder>")
    return MEASURED.sub(" #", value.replace(zoscope.__version__, "<version>"))


# --- comparison -------------------------------------------------------------------------------------------------------


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?: ?[%×])?")


ROUNDING = ("quadrature", "disagreement")
"""Ends of keys whose values may come from rounding alone."""


def text_differences(expected: str, found: str) -> Iterator[str]:
    old, new = expected.splitlines(), found.splitlines()
    if len(old) != len(new):
        yield f"{len(old)} lines became {len(new)}"
    for number, (before, after) in enumerate(zip(old, new, strict=False), 1):
        if not same_line(before, after):
            yield f"line {number}\n- {before}\n+ {after}"


def same_line(expected: str, found: str) -> bool:
    numbers = [NUMBER.findall(line) for line in (expected, found)]
    words = [NUMBER.sub("#", line) for line in (expected, found)]
    if [len(number) for number in numbers[0]] != [len(number) for number in numbers[1]]:
        words = [" ".join(line.split()) for line in words]
    return words[0] == words[1] and all(same_number(*pair) for pair in zip(*numbers, strict=True))


def same_number(expected: str, found: str) -> bool:
    """Whether two numbers are one up to a unit in the last place; whole numbers count things and are exact."""
    if not any(mark in expected + found for mark in ".e%×"):
        return expected == found
    pair = [Decimal(text.replace(",", "").rstrip(" %×")) for text in (expected, found)]
    unit = max(Decimal(1).scaleb(int(number.as_tuple().exponent)) for number in pair)
    return abs(pair[0] - pair[1]) <= unit


def json_differences(expected: str, found: str) -> Iterator[str]:
    yield from value_differences("", json.loads(expected), json.loads(found))


def value_differences(path: str, expected: Any, found: Any) -> Iterator[str]:
    if type(expected) is not type(found):
        yield f"{path}: {expected!r} became {found!r}"
    elif isinstance(expected, dict):
        if list(expected) != list(found):
            yield f"{path}: keys {list(expected)} became {list(found)}"
        for key in expected.keys() & found.keys():
            yield from value_differences(f"{path}/{key}", expected[key], found[key])
    elif isinstance(expected, list):
        if len(expected) != len(found):
            yield f"{path}: {len(expected)} entries became {len(found)}"
        for number, pair in enumerate(zip(expected, found, strict=False)):
            yield from value_differences(f"{path}/{number}", *pair)
    elif not same_value(expected, found, abs_tol=1e-6 if path.endswith(ROUNDING) else 1e-9):
        yield f"{path}: {expected!r} became {found!r}"


def same_value(expected: Any, found: Any, *, abs_tol: float) -> bool:
    if isinstance(expected, float):
        return math.isclose(expected, found, rel_tol=1e-6, abs_tol=abs_tol)
    if isinstance(expected, str) and " " in expected:  # a sentence, with numbers that were rounded
        return same_line(expected, found)
    return bool(expected == found)
