"""SPEC: found, loaded, called; and what is said when it is not."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoscope
from zoscope import Problem, SpecError, UsageError
from zoscope.spec import LoadedSpec, load_spec, parse_settings, resolve_spec

GOOD = """
import torch, zoscope
from torch import nn

def make(width: int = 2, *, scale: float = 1.0):
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    return zoscope.Problem(nn.Linear(3, width), [x], lambda model, x: scale * model(x).square().mean())

problem = make()

class Config:
    class Nested:
        wide = make(5)
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "tiny.py") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(spec: str, **options: Any) -> LoadedSpec:
    return load_spec(spec, **{"settings": {}, "params": None, "checkpoint": None, **options})


def refusal(spec: str, kind: type[UsageError] = SpecError, **options: Any) -> Any:
    """The error, after a check that it is one paragraph and that nothing is left on the import path."""
    path = list(sys.path)
    with pytest.raises(kind) as caught:
        load(spec, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert sys.path == path
    return caught.value


# --- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "num_params", "name"),
    [
        ("tiny.py", 8, "tiny"),
        ("./tiny.py:problem", 8, "problem"),
        ("tiny.py:make", 8, "make"),
        ("tiny.py:Config.Nested.wide", 20, "Config.Nested.wide"),
        ("tiny", 8, "tiny"),
        ("tiny:make", 8, "make"),
    ],
)
def test_paths_modules_and_dotted_attributes_load(spec: str, num_params: int, name: str) -> None:
    source = write(GOOD).resolve()
    loaded = load(spec)
    assert loaded.problem.num_params == num_params
    assert loaded.display == spec
    assert loaded.source == source
    assert loaded.problem.name == name


def test_packages_load_by_module_name() -> None:
    write("", "pack/__init__.py")
    write(GOOD, "pack/models.py")
    assert load("pack.models:make", settings={"width": 3}).problem.num_params == 12


def test_an_absolute_path_loads_from_anywhere(tmp_path: Path) -> None:
    write(GOOD, "deep/er/tiny.py")
    assert load(f"{tmp_path}/deep/er/tiny.py:problem").problem.num_params == 8


def test_settings_are_keyword_arguments() -> None:
    write(GOOD)
    assert load("tiny.py:make", settings={"width": 4, "scale": 0.5}).problem.num_params == 16


def test_params_of_the_command_line_replace_those_of_the_spec() -> None:
    write(GOOD)
    assert load("tiny.py", params="bias").problem.num_params == 2


def test_the_specs_own_folder_is_importable_while_it_loads_and_not_after() -> None:
    write(
        "from helper import problem, later\n\ndef make():\n    from lazy import problem\n    return problem\n", "a/m.py"
    )
    write(GOOD + "\nlater = 1\n", "a/helper.py")
    write(GOOD, "a/lazy.py")
    before = list(sys.path)
    assert load("a/m.py").problem.num_params == 8
    assert load("a/m.py:make").problem.num_params == 8
    assert sys.path == before


def test_helpers_of_one_name_in_two_folders_do_not_mix() -> None:
    for folder, width in (("one", 2), ("two", 5)):
        write("from helper import width\nfrom base import make\nproblem = make(width)\n", f"{folder}/m.py")
        write(f"width = {width}\n", f"{folder}/helper.py")
        write(GOOD, f"{folder}/base.py")
    assert load("one/m.py").problem.num_params == 8
    assert load("two/m.py").problem.num_params == 20
    assert load("one/m.py").problem.num_params == 8


def test_a_file_is_run_afresh_each_time() -> None:
    write(GOOD)
    first = load("tiny.py").problem
    write(GOOD.replace("width: int = 2", "width: int = 17"))
    assert first.num_params == 8
    assert load("tiny.py").problem.num_params == 68


def test_a_generator_of_batches_is_read_while_the_folder_is_importable() -> None:
    write(
        "import torch, zoscope\n"
        "def batches():\n    from helper import x\n    yield x\n"
        "problem = zoscope.Problem(torch.nn.Linear(3, 1), batches(), lambda m, x: m(x).square().mean())\n"
    )
    write("import torch\nx = torch.ones(4, 3)\n", "helper.py")
    assert load("tiny.py").problem.num_examples == 4


def test_what_a_spec_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    write("print('training...')\n" + GOOD)
    load("tiny.py")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "training..." in captured.err


def test_a_spec_that_parses_arguments_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["zoscope", "bounds", "tiny.py", "--json"])
    write("import argparse\nargparse.ArgumentParser().parse_args()\n" + GOOD)
    assert load("tiny.py").problem.num_params == 8
    assert sys.argv[0] == "zoscope"


def test_dataclasses_with_postponed_annotations_work_in_a_spec() -> None:
    write(
        "from __future__ import annotations\nimport dataclasses, typing\n"
        "@dataclasses.dataclass\nclass C:\n    x: typing.ClassVar[int] = 1\n    y: int = 2\n" + GOOD
    )
    assert load("tiny.py").problem.num_params == 8


# --- what is not found --------------------------------------------------------------------------------------------


def test_a_missing_file_names_near_ones() -> None:
    write(GOOD, "models/digits.py")
    said = str(refusal("models/digit.py", UsageError))
    assert said.startswith("SPEC models/digit.py does not exist. Did you mean models/digits.py?")
    assert "there is no folder nowhere" in str(refusal("nowhere/digits.py", UsageError))
    assert "models is a folder" in str(refusal("models/", UsageError))
    assert "It holds digits.py" in str(refusal("./models", UsageError))


def test_a_module_that_does_not_exist_is_told_from_one_that_it_imports() -> None:
    assert "module 'no_such_module' was not found" in str(refusal("no_such_module:problem", UsageError))
    assert "module 'torch.no_such' was not found" in str(refusal("torch.no_such:problem", UsageError))
    write("import no_such_module\n" + GOOD)
    error = refusal("tiny:problem")
    assert "needs the module 'no_such_module', which is not installed (tiny.py, line 1)" in str(error)
    assert "import no_such_module" in error.frame


def test_a_missing_import_of_an_import_is_reported_as_itself() -> None:
    write("import helper\n" + GOOD)
    write("x = 1\nimport absent_package.sub\n", "helper.py")
    error = refusal("tiny.py")
    assert "Loading tiny.py needs the module 'absent_package', which is not installed (helper.py, line 2)" in str(error)
    assert [line.strip() for line in error.frame.splitlines() if line.strip().startswith("import")] == [
        "import helper",
        "import absent_package.sub",
    ]


def test_a_missing_name_lists_what_there_is() -> None:
    write(GOOD.replace("problem = make()", "digits = make()"))
    said = str(refusal("tiny.py"))
    assert said == (
        "tiny.py has no 'problem'. It defines make, digits: name one (the default is 'problem'), "
        "for example tiny.py:digits"
    )
    assert "for example tiny.py:digits" in str(refusal("tiny.py:digit"))
    assert "tiny.py has no 'Config.other'" in str(refusal("tiny.py:Config.other"))
    write("x = 1\n", "empty.py")
    assert "defines no Problem" in str(refusal("empty.py"))


@pytest.mark.parametrize("spec", ["", "my-module", "a b:c", "tiny.py:3", "1x"])
def test_what_is_neither_path_nor_module_is_a_usage_error(spec: str) -> None:
    assert re.search("SPEC .* (is not understood|does not exist)", str(refusal(spec, UsageError)))


# --- what is no problem -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("3", "is an int: expected a zoscope.Problem, or a function"),
        ("None", "is None"),
        ("torch.nn.Linear(2, 2)", "is a Linear"),
        ("torch.nn.Linear", "is the class Linear"),
        ("lambda: None", "returned None: expected a zoscope.Problem"),
        ("lambda: torch.nn.Linear(2, 2)", "returned a Linear"),
        ("lambda size: None", r"cannot be called with no settings \(missing a required argument: 'size'\)"),
    ],
)
def test_what_is_no_problem_is_refused(value: str, said: str) -> None:
    write(f"import torch\nproblem = {value}\n")
    assert re.search(said, str(refusal("tiny.py")))


def test_settings_that_the_function_does_not_take_list_those_that_it_does() -> None:
    write(GOOD)
    said = str(refusal("tiny.py:make", settings={"wdith": 3}))
    assert "make in tiny.py cannot be called with wdith (got an unexpected keyword argument 'wdith')" in said
    assert "it accepts width=2, scale=1.0" in said
    assert "not a function" in str(refusal("tiny.py", settings={"width": 3}))


# --- errors of the user's code ------------------------------------------------------------------------------------


def test_an_error_while_loading_shows_the_users_frames_alone() -> None:
    write("def inner():\n    raise ValueError('no data')\n\n\ninner()\n")
    error = refusal("tiny.py")
    assert str(error) == "Loading tiny.py raised ValueError: no data (tiny.py, line 2)."
    path = Path("tiny.py").resolve()
    assert f'File "{path}", line 5, in <module>\n    inner()' in error.frame
    assert f'File "{path}", line 2, in inner\n    raise ValueError' in error.frame
    assert "importlib" not in error.frame
    assert "zoscope/spec" not in error.frame


def test_an_error_inside_a_library_shows_the_users_line() -> None:
    write("import torch\n\nx = torch.ones(2) @ torch.ones(3)\ny = torch.nn.functional.linear(x, 3)\n")
    error = refusal("tiny.py")
    assert "(tiny.py, line 3)" in str(error)
    assert error.frame.count("File") == 1


def test_a_callable_that_raises_shows_its_frame() -> None:
    write("def make(n=0):\n    return 1 / n\n")
    error = refusal("tiny.py:make")
    assert str(error) == "Calling make in tiny.py raised ZeroDivisionError: division by zero (tiny.py, line 2)."
    assert "return 1 / n" in error.frame


def test_a_syntax_error_shows_its_line() -> None:
    write("x = 1\ny = (\n")
    error = refusal("tiny.py")
    assert "SyntaxError: '(' was never closed (tiny.py, line 2)" in str(error)
    assert "y = (" in error.frame


def test_a_mistake_in_the_call_of_problem_shows_the_users_line() -> None:
    write("import torch, zoscope\nproblem = zoscope.Problem(torch.nn.Linear, [], print)\n")
    error = refusal("tiny.py")
    assert "model is the class Linear" in str(error)
    assert "problem = zoscope.Problem(torch.nn.Linear, [], print)" in error.frame


def test_a_spec_that_exits_is_an_error_and_an_interrupt_is_none() -> None:
    write("import sys\nsys.exit(3)\n")
    assert "called sys.exit(3) (tiny.py, line 2)" in str(refusal("tiny.py"))
    write("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load("tiny.py")


def test_bad_batches_are_refused_while_loading() -> None:
    write("import torch, zoscope\nproblem = zoscope.Problem(torch.nn.Linear(2, 2), [], print)\n")
    assert "batches is empty" in str(refusal("tiny.py"))


# --- without a SPEC -----------------------------------------------------------------------------------------------


def test_a_given_spec_is_taken_as_it_is() -> None:
    write("problem: other.py\n", "zoscope.yaml")
    assert resolve_spec("mine.py:x", cwd=Path.cwd()) == ("mine.py:x", None)


def test_the_fallbacks_are_tried_in_order() -> None:
    with pytest.raises(UsageError, match=r"zoscope.yaml.*pyproject.toml.*model.py.*zoscope init"):
        resolve_spec(None, cwd=Path.cwd())
    write(GOOD, "model.py")
    assert resolve_spec(None, cwd=Path.cwd()) == ("model.py", "model.py")
    write('[project]\nname = "x"\n', "pyproject.toml")
    assert resolve_spec(None, cwd=Path.cwd()) == ("model.py", "model.py")
    write('[tool.zoscope]\nproblem = "b.py:make"\n', "pyproject.toml")
    assert resolve_spec(None, cwd=Path.cwd()) == ("b.py:make", "pyproject.toml")
    write("checks: []\n", "zoscope.yaml")
    assert resolve_spec(None, cwd=Path.cwd()) == ("b.py:make", "pyproject.toml")
    write("problem: pack.c:make\n", "zoscope.yaml")
    assert resolve_spec(None, cwd=Path.cwd()) == ("pack.c:make", "zoscope.yaml")


def test_a_fallback_in_another_folder_is_found_there(tmp_path: Path) -> None:
    write(GOOD, "sub/model.py")
    spec, _ = resolve_spec(None, cwd=tmp_path / "sub")
    assert load(spec).problem.num_params == 8


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("zoscope.yaml", "problem: [unclosed\n"),
        ("zoscope.yaml", "problem: 3\n"),
        ("zoscope.yaml", "problem: {a: b}\n"),
        ("pyproject.toml", "[tool.zoscope\n"),
        ("pyproject.toml", "[tool.zoscope]\nproblem = 1\n"),
    ],
)
def test_a_broken_config_is_a_usage_error_that_names_the_file(name: str, text: str) -> None:
    write(text, name)
    with pytest.raises(UsageError, match=name) as caught:
        resolve_spec(None, cwd=Path.cwd())
    assert "\n" not in str(caught.value)


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_are_yaml_scalars() -> None:
    items = ["a=1", "b=1e-3", "c=true", "d=text", "e='7'", "f=", "g=x=y", "h=null", "i=-2.5E4", "j=1_000"]
    expected = {"a": 1, "b": 1e-3, "c": True, "d": "text", "e": "7", "f": None, "g": "x=y", "h": None, "i": -2.5e4}
    expected["j"] = 1000
    settings = parse_settings(items)
    assert settings == expected
    assert [type(value) for value in settings.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("item", ["novalue", "=3", "a b=3", "1a=3", "a=[1", "a: b=3"])
def test_a_setting_that_is_no_pair_is_a_usage_error(item: str) -> None:
    with pytest.raises(UsageError, match=f"--set {re.escape(repr(item))}"):
        parse_settings([item])


# --- checkpoints --------------------------------------------------------------------------------------------------


def saved(state: Any, name: str = "weights.pt") -> Path:
    path = Path(name)
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


def state(width: int = 2) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((width, 3), 2.0), "bias": torch.zeros(width)}


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors", "W.PT"])
def test_a_checkpoint_is_loaded_into_the_model(name: str) -> None:
    write(GOOD)
    problem = load("tiny.py", checkpoint=saved(state(), name)).problem
    assert problem.model.get_parameter("weight").eq(2).all()
    assert problem.model.get_parameter("bias").eq(0).all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
)
def test_state_dicts_inside_of_training_checkpoints_and_of_wrapped_models_load(wrap: Any) -> None:
    write(GOOD)
    assert load("tiny.py", checkpoint=saved(wrap(state()))).problem.model.get_parameter("weight").eq(2).all()


TIED = """
import torch, zoscope
from torch import nn
model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
model[1].weight = model[0].weight
problem = zoscope.Problem(model, [torch.arange(4)], lambda m, x: m(x).square().mean())
"""


def test_a_checkpoint_that_names_tied_weights_once_is_complete() -> None:
    write(TIED)
    for key in ("0.weight", "1.weight"):
        problem = load("tiny.py", checkpoint=saved({key: torch.full((4, 3), 2.0)}, "w.safetensors")).problem
        assert problem.model.get_parameter("0.weight").eq(2).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (state(5), r"shapes differ \(weight is \(5, 3\) in the file and \(2, 3\) in the model"),
        ({**state(), "bias": torch.zeros(2) * 1j}, "bias is complex in the file and real in the model"),
        ({"weight": torch.zeros(2, 3)}, "the file lacks bias"),
        ({**state(), "head.weight": torch.zeros(1)}, "the model has no head.weight"),
        ({"layers": 3}, "a dict with the keys layers: expected a state dict"),
        ({}, "an empty dict"),
        (torch.zeros(3), "holds a Tensor"),
        (nn.Linear(3, 2), r"not opened because unpickling could run code.*torch.save\(model.state_dict\(\), path\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(content: Any, said: str) -> None:
    write(GOOD)
    path = saved(content)
    assert re.search(said, str(refusal("tiny.py", checkpoint=path)))


def test_a_refused_checkpoint_leaves_the_model_as_it_was() -> None:
    from zoscope.problem.checkpoint import load_checkpoint

    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(SpecError, match="Nothing was loaded"):
        load_checkpoint(model, saved({"weight": torch.zeros(2, 3), "bias": torch.zeros(7)}))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(name: str) -> None:
    write(GOOD)
    for content in (b"", b"hello world, this is no checkpoint", b"PK\x03\x04broken"):
        Path(name).write_bytes(content)
        assert str(refusal("tiny.py", checkpoint=Path(name))).startswith(f"--checkpoint {name} ")


def test_a_checkpoint_that_does_not_exist_or_has_another_suffix_is_a_usage_error() -> None:
    write(GOOD)
    saved(state(), "weights.pt")
    assert "Did you mean weights.pt?" in str(refusal("tiny.py", UsageError, checkpoint=Path("weight.pt")))
    write("", "w.npz")
    assert "expected a state dict as .pt, .pth, .bin, .ckpt or .safetensors" in str(
        refusal("tiny.py", UsageError, checkpoint=Path("w.npz"))
    )


def test_a_name_in_front_of_all_names_is_found_and_said() -> None:
    write(GOOD)
    inside = {f"net.{name}": tensor for name, tensor in state().items()}
    content = {"state_dict": {**inside, "criterion.weight": torch.ones(3)}, "epoch": 3, "callbacks": {}}
    problem = load("tiny.py", checkpoint=saved(content, "w.ckpt")).problem
    assert problem.model.get_parameter("weight").eq(2).all()
    (notice,) = problem.notices
    assert "begin with 'net.'" in notice.message
    assert "criterion.weight left out" in notice.message
    assert notice in zoscope.bounds(problem, device="cpu").warnings
    twice = {**inside, **{f"average.{name}": tensor for name, tensor in state().items()}}
    assert "holds the model 2 times" in str(refusal("tiny.py", checkpoint=saved(twice)))


def test_a_name_in_front_of_the_models_names_is_found_and_said() -> None:
    write(GOOD.replace("nn.Linear(3, width)", "nn.Sequential(nn.Linear(3, width))"))
    problem = load("tiny.py", checkpoint=saved(state())).problem
    assert problem.model.get_parameter("0.weight").eq(2).all()
    assert "begin with '0.'" in problem.notices[0].message


def test_the_folder_of_a_training_checkpoint_is_looked_into(tmp_path: Path) -> None:
    write(GOOD)
    Path("checkpoint-100").mkdir()
    saved({"momentum": torch.zeros(1)}, "checkpoint-100/optimizer.pt")
    assert "a folder without weights" in str(refusal("tiny.py", UsageError, checkpoint=Path("checkpoint-100")))
    for name, tensor in state().items():
        saved({name: tensor}, f"checkpoint-100/model-{name}.safetensors")
    index = {"weight_map": {name: f"model-{name}.safetensors" for name in state()}}
    Path("checkpoint-100/model.safetensors.index.json").write_text(json.dumps(index))
    assert load("tiny.py", checkpoint=Path("checkpoint-100")).problem.model.get_parameter("weight").eq(2).all()
    Path("checkpoint-100/model.safetensors.index.json").write_text("[]")
    assert "not a readable index" in str(refusal("tiny.py", checkpoint=Path("checkpoint-100")))


def test_without_safetensors_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write(GOOD)
    path = saved(state(), "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install 'zoscope[hf]'" in str(refusal("tiny.py", checkpoint=path))


def test_a_checkpoint_fits_a_compiled_model() -> None:
    from zoscope.problem.checkpoint import load_checkpoint

    model = torch.compile(nn.Linear(3, 2), backend="eager")
    load_checkpoint(model, saved(state()))
    assert model.weight.eq(2).all()
    assert isinstance(Problem(model, [torch.ones(1, 3)], lambda m, x: m(x).mean()), Problem)
