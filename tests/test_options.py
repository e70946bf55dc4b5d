"""The table of options is what the signatures of Python and the reference page say.

``GOLDEN=write`` writes the page.
"""

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import zoscope
from zoscope import options
from zoscope.config.keys import OPTIONS as FILE_KEYS
from zoscope.config.load import StepSizes
from zoscope.options import (
    COMMANDS,
    KEYWORDS,
    Flag,
    Option,
    Place,
    Real,
    Several,
    Whole,
    Words,
    argument,
    keywords,
    left_open,
    options_of,
    shown,
)

PAGE = Path(__file__).parents[1] / "examples" / "guide" / "options.md"
LITERALS = {
    options.METHODS: "Method",
    options.PLAN_METHODS: "PlanMethod",
    get_args(options.Differences): "Differences",
    options.MATRICES: "Matrix",
    options.CURVATURES: "CurvatureKind",
    options.DTYPES: "Dtype",
    tuple(options.DIRECTIONS): "Directions",
    get_args(options.Differences): "Differences",
    options.HVPS: "Hvp",
    options.THRESHOLDS: "Threshold",
    get_args(options.CheckThreshold): "CheckThreshold",
    ("pass", "fail"): 'Literal["pass", "fail"]',
}
FORMS = {
    "pair": "tuple[float, float]",
    "size": "int | str",
    "numbers": "float | Sequence[float]",
    "interval": 'int | Literal["auto", "adaptive"]',
    "step sizes": "float | str | StepSizes",
}


# --- signatures -------------------------------------------------------------------------------------------------------


def python_type(domain: Any) -> str:
    """What a keyword argument of such values is declared as; optimizers are text, as there will be more of them."""
    if isinstance(domain, Several):
        item = python_type(domain.item)
        return f"{item} | Sequence[{item}]"
    if isinstance(domain, Words):
        return LITERALS.get(domain.names, "str")
    if isinstance(domain, Place):
        return "str | PathLike[str]"
    return FORMS.get(getattr(domain, "form", ""), domain.type.__name__)


ARGUMENTS = [(function, name) for function, (_, accepted) in KEYWORDS.items() for name in accepted.__annotations__]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda value: value)
def test_a_keyword_argument_has_the_type_of_the_table(function: str, name: str) -> None:
    option = argument(function, name)
    accepted = KEYWORDS[function][1]
    hint = get_type_hints(accepted, localns={"StepSizes": StepSizes})[name]
    open_default = option.default is None and name not in accepted.__required_keys__
    # What has a default in the configuration of checks, or nothing that None could mean, is left out instead.
    text = "Mapping[str, Any]" if name == "settings" else python_type(option.domain)
    allowed = {eval(text, vars(options) | {"StepSizes": StepSizes})}
    if open_default:
        allowed = {eval(f"{text} | None", vars(options) | {"StepSizes": StepSizes})} | (
            allowed if function == "check" else set()
        )
    assert hint in allowed


def test_every_option_of_a_command_is_an_argument_of_its_function() -> None:
    only_there = {"settings", "checkpoint", "estimate", "plot", "html", "moments", "verbose", "json", "output", "quiet"}
    only_there |= {"tensorboard", "logger", "config", "sweep", "compare"}
    for command in ("bounds", "probe", "track", "spectrum"):
        taken = {argument(command, name).name for name in KEYWORDS[command][1].__annotations__}
        assert {option.name for _, option in options_of(command)} - only_there == taken - {"preconditioner"} | (
            taken & {option.name for _, option in options_of(command)}
        )
    assert KEYWORDS["check"][1].__annotations__.keys() == {*left_open("check"), "spec"}


@pytest.mark.parametrize("function", ["bounds", "probe", "spectrum", "track"])
def test_defaults_of_python_are_those_of_the_command_line(function: str) -> None:
    """Left out there, the steps of a probe are what the growth takes, and the optimizer one in particular."""
    by_name = {option.name: option.default for _, option in options_of(function)}
    given = {"lr": 1.0} if function == "track" else {}
    for name, default in keywords(function, given).items():
        if (function, name) not in {("probe", "steps"), ("probe", "optimizer"), ("track", "lr"), ("track", "resume")}:
            assert default == by_name[options.RENAMED.get(name, name)], name


def public(function: str) -> Callable[..., Any]:
    return getattr(zoscope, function)


@pytest.mark.parametrize("function", KEYWORDS)
def test_signatures_repeat_no_option(function: str) -> None:
    parameters = inspect.signature(public(function)).parameters
    positional = {
        "optimizer",
        "baseline",
        "cache",
        "hf_args",
        "max_drop",
        "only",
    }  # a monitor's, those of a check alone
    assert not {*parameters} & {*options.OPTIONS} - positional
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("function", KEYWORDS)
def test_an_argument_that_there_is_not_is_named_with_the_nearest(function: str) -> None:
    with pytest.raises(TypeError, match=rf"{function}\(\).*'micro_batc'. Did you mean 'micro_batch'"):
        options.refuse_unknown(function, ["micro_batc"])
    with pytest.raises(TypeError, match=r"it takes .*seed"):
        options.refuse_unknown(function, ["xyzzy"])


def test_a_step_size_is_needed_to_train() -> None:
    with pytest.raises(TypeError, match="needs the keyword argument 'lr'"):
        keywords("track", {})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rtol", 1.0, "strictly between 0 and 1"),
        ("rtol", "x", "strictly between 0 and 1"),
        ("rtol", True, "strictly between 0 and 1"),
        ("max_hvps", 0, "an integer of at least 1"),
        ("max_hvps", 2.5, "an integer of at least 1"),
        ("max_hvps", 10**9, "from 1 to 10000000"),
        ("method", "exact", "one of auto, dense, deflated-slq"),
        ("betas", (0.9, 1.0), "two numbers"),
        ("betas", 0.9, "two numbers"),
        ("eps", -1e-9, "at least 0"),
        ("lr", 1e12, "at most 1e\\+09"),
        ("strict", 1, "True or False"),
        ("device", "gpu", "such as cuda:0"),
        ("max_memory", "lots", "'2GB'"),
        ("max_memory", 0, "'2GB'"),
        ("optimizers", "lion", "one of gd, gdm, adam"),
        ("optimizers", ["gd", 3], "one of gd, gdm, adam"),
        ("preconditioner", "state:", "'state:FILE'"),
    ],
)
def test_a_value_out_of_range_is_told_the_range(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{words}"):
        keywords("bounds", {name: value})


def test_memory_may_have_a_unit() -> None:
    assert keywords("bounds", {"max_memory": "2GB"})["max_memory"] == 2 * 10**9


SCRIPT = """
import torch, zoscope
problem = zoscope.Problem.from_function(lambda x: x.square().sum(), torch.ones(2))
zoscope.bounds(problem, rtol=0.1, max_hvps=3, optimizers=["gd"], curvature="forward", max_memory="2GB")
zoscope.track(problem, lr=0.1, every="adaptive", steps=3)
zoscope.bounds(problem, max_hvp=3)
zoscope.bounds(problem, rtol="x")
zoscope.probe(problem, threshold="fo")
zoscope.spectrum(problem, curvature="forward")
zoscope.moments(problem, method="dense")
zoscope.track(problem)
zoscope.check("zoscope.yaml", margin="0.8")
zoscope.StabilityMonitor(problem, "zo-gd", every="auto")
"""


def test_mypy_rejects_wrong_arguments(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    # What zoscope is made of takes most of the time, and says nothing of its options.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*,scipy.*,rich.*]\nfollow_imports = skip\n")
    home = Path(zoscope.__file__).parents[1]
    # mypy finds by itself what is installed, and refuses to be told where that is.
    environment = os.environ if home.name == "site-packages" else {**os.environ, "MYPYPATH": str(home)}
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path), file]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    lines = sorted({int(line) for line in re.findall(r"script\.py:(\d+): error", done.stdout)})
    assert lines == list(range(6, 14)), done.stdout + done.stderr


# --- the reference page -----------------------------------------------------------------------------------------------


def values(domain: Any) -> str:
    """The values of an option in words."""
    if isinstance(domain, Several):
        return f"{values(domain.item)}; several"
    if isinstance(domain, Words):
        return ", ".join(f"`{name}`" for name in domain.names)
    if isinstance(domain, Whole):
        ends = f"at least {domain.low}" if domain.high >= options.MOST else f"from {domain.low} to {domain.high:,}"
        return f"integer, {ends}"
    if isinstance(domain, Real):
        low = f"{'above' if domain.open_low else 'at least'} {domain.low:g}"
        if domain.low < -1e100:
            return "number"
        return f"number, {low}" if math.isinf(domain.high) or domain.high > 1e100 else f"number, {domain.range}"
    if isinstance(domain, Flag):
        return "yes or no"
    said = {
        "pair": "two numbers in [0, 1)",
        "size": "bytes, or with a unit",
        "numbers": "numbers above 0",
        "steps": "`auto` or integer, at least 1",
        "interval": "`auto`, `adaptive` or integer, at least 1",
        "step sizes": "number, steps and numbers, or a schedule",
        "regex": "regular expression",
        "device": "`auto`, `cpu`, `cuda` or `cuda:i`",
        "preconditioner": "`expected` or `state:FILE`",
    }
    return "path" if isinstance(domain, Place) else said.get(domain.form, "text")


def in_python(command: str, option: Option) -> str:
    for function in dict.fromkeys((*[command] * (command in KEYWORDS), *KEYWORDS)):
        shares, accepted = KEYWORDS[function]
        for name in accepted.__annotations__ if shares == command else ():
            if options.RENAMED.get(name, name) == option.name and (function == command or name not in COMMANDS):
                own = argument(function, name)
                differs = values(own.domain) != values(option.domain) and own.name != "spec"
                return f"`{name}`" + (f" ({values(own.domain)})" if differs else "")
    return ""


def in_files(command: str, option: Option) -> str:
    if option.name not in (*left_open(command), "spec"):
        return ""
    if command == "check":
        return f"`{'.'.join(FILE_KEYS[option.name])}`"
    return f"`{'set' if option.name == 'settings' else option.name}`" if command == "track" else ""


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def default(value: Any) -> str:
    return "" if value is None else ("yes" if value else "no") if isinstance(value, bool) else f"`{shown(value)}`"


def page() -> str:
    lines = [
        "# Options",
        "",
        "Every option of every command: its name on the command line, in configuration files and in Python, its",
        "values, its default, and what it is for. The page is made from the table in `zoscope/options.py`; a test",
        "keeps it up to date (`GOLDEN=write pytest tests/test_options.py` writes it).",
        "",
        "Functions of Python take the options by keyword: `zoscope.bounds(problem, rtol=0.01)`. A name that there is",
        "not is a `TypeError`, a value out of range a `ValueError`, and type checkers know both.",
    ]
    for command in COMMANDS:
        lines += ["", f"## zoscope {command}", ""]
        file = command in options.ONLY_HERE
        lines += [row(["Option", *(["In files"] if file else []), "In Python", "Values", "Default", "What for"])]
        lines += [row(["---"] * (6 if file else 5))]
        for panel, option in options_of(command):
            name = option.name.upper() if panel == "Arguments" else option.flag
            text = option.help.replace("\\[", "[").replace("\n", " ")
            cells = [f"`{name}`", *([in_files(command, option)] if file else []), in_python(command, option)]
            lines.append(row([*cells, values(option.domain), default(option.default), text]))
    lines += [
        "",
        "## zoscope.moments and zoscope.StabilityMonitor",
        "",
        "`zoscope.moments` takes the options of `zoscope spectrum` but `top`, `by_layer` and `method`.",
        "`zoscope.StabilityMonitor` takes these:",
        "",
        row(["In Python", "Values", "Default", "What for"]),
        row(["---"] * 4),
    ]
    for name in KEYWORDS["StabilityMonitor"][1].__annotations__:
        option = argument("StabilityMonitor", name)
        lines.append(row([f"`{name}`", values(option.domain), default(option.default), option.help]))
    return "\n".join(lines) + "\n"


def test_the_reference_page_is_up_to_date() -> None:
    if os.environ.get("GOLDEN") == "write":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()
