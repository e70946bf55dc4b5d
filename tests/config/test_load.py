from collections.abc import Callable
from pathlib import Path

import pytest

from zoscope import UsageError
from zoscope.config.keys import OPTIONS
from zoscope.config.load import EMPTY, CheckConfig, build_checks, find_config, load_document, override_tree
from zoscope.config.sources import ConfigError

Load = Callable[..., tuple[CheckConfig, ...]]


def ad_hoc(**options: object) -> CheckConfig:
    (check,) = build_checks(EMPTY, overrides=[("the command line", override_tree(options))])
    return check


def test_checks_start_from_the_defaults_of_the_file(load: Load, valid: str) -> None:
    plain, adam, scheduled = load(valid)
    assert (plain.steps, plain.estimator.queries, plain.policy.margin) == (500, 4, 0.8)
    assert (adam.steps, adam.policy.threshold, adam.policy.margin, adam.policy.on_warn) == (1000, "exact", 0.8, "fail")
    assert (scheduled.optimizer.beta, scheduled.optimizer.rule, scheduled.optimizer.zeroth_order) == (0.5, "gdm", False)


def test_the_spec_of_the_file_may_be_called_spec_as_in_the_file_of_a_run(load: Load) -> None:
    (check,) = load("spec: m.py\nchecks: [{name: a, optimizer: {name: zo-gd, lr: 1e-3}}]")
    assert check.shown_spec == "m.py"


def test_what_nobody_says_has_the_documented_default(load: Load) -> None:
    (check,) = load("checks: [{name: a, spec: m.py, optimizer: {name: zo-gd, lr: 1e-3}}]")
    assert (check.steps, check.policy.margin, check.policy.threshold, check.policy.on_warn) == (
        1000,
        0.8,
        "binding",
        "pass",
    )
    assert (check.curvature.rtol, check.curvature.max_hvps, check.curvature.device) == (0.02, 600, "auto")
    assert (check.optimizer.beta, check.optimizer.betas, check.optimizer.eps) == (0.9, (0.9, 0.999), 1e-8)


def test_the_peak_of_a_schedule_is_checked(load: Load, valid: str) -> None:
    scheduled = load(valid)[2]
    assert scheduled.optimizer.lr == 0.05
    assert scheduled.optimizer.schedule.describe() == "peak of a cosine schedule, warm-up 100"


def test_a_warmup_that_never_ends_is_an_error(load: Load, valid: str) -> None:
    with pytest.raises(ConfigError, match="never reaches its peak in 500 steps"):
        load(valid.replace("warmup: 100", "warmup: 500"))


def test_paths_are_relative_to_the_file(load: Load, valid: str, tmp_path: Path) -> None:
    plain, adam, _ = load(valid)
    assert plain.spec == str(tmp_path / "model.py")
    assert (adam.spec, adam.checkpoint) == (f"{tmp_path}/other.py:make", tmp_path / "weights.pt")
    assert (plain.shown_spec, adam.shown_spec) == ("model.py", "other.py:make")


def test_a_spec_that_names_a_module_stays_as_it_is(load: Load) -> None:
    (check,) = load("checks: [{name: a, spec: 'package.module:make', optimizer: {name: gd, lr: 1}}]")
    assert check.spec == "package.module:make"


def test_annotations_point_at_the_line_of_lr(load: Load, valid: str) -> None:
    lines = [check.where.line for check in load(valid) if check.where is not None]
    assert [valid.splitlines()[line - 1].strip() for line in lines if line] == [
        "lr: 0.01",
        "lr: 1e-4",
        "lr: {schedule: cosine, peak: 0.05, warmup: 100}",
    ]


def test_options_win_over_the_file(load: Load, valid: str) -> None:
    overrides = [("the command line", override_tree({"lr": 1.0, "rtol": 0.1, "settings": {"width": 8}, "beta": None}))]
    checks = load(valid, overrides=overrides)
    assert [check.optimizer.lr for check in checks] == [1.0, 1.0, 1.0]
    assert checks[1].settings == {"width": 8, "activation": "gelu"}
    assert checks[1].curvature.rtol == 0.1
    assert checks[2].optimizer.beta == 0.5


def test_options_alone_make_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check = ad_hoc(spec="m.py", optimizer="zo-adam", lr=1e-4, betas=(0.8, 0.9))
    assert (check.optimizer.name, check.optimizer.lr, check.optimizer.betas) == ("zo-adam", 1e-4, (0.8, 0.9))
    assert check.where is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"optimizer": "zo-sgd"}, "Did you mean 'zo-gd'"),
        ({"max_hvps": 0}, "--max-hvps must be from 1"),
        ({"spec": "m.py", "optimizer": "gd"}, "no optimizer.lr.*--lr"),
        ({"lr": 1.0, "optimizer": "gd"}, "no spec.*--spec"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        ad_hoc(**options)


def test_every_option_overrides_a_key_that_exists() -> None:
    values = {
        "optimizer": "gd", "lr": 1.0, "betas": (0.1, 0.2), "settings": {"a": 1}, "params": "w", "spec": "m.py",
        "checkpoint": "w.pt", "directions": "sphere", "preconditioner": "expected", "device": "cpu", "dtype": "float32",
        "method": "dense", "hvp": "auto", "curvature": "ggn", "threshold": "exact", "on_warn": "fail", "probe": True,
        "strict": True, "shard_basis": True, "beta": 0.5, "eps": 0.1, "mu": 0.1, "margin": 0.5, "rtol": 0.5,
        "dampening": 0.5, "differences": "central",
    }  # fmt: skip
    ad_hoc(**{name: values.get(name, 1) for name in OPTIONS})


def test_only_picks_checks_by_name(load: Load, valid: str) -> None:
    assert [check.name for check in load(valid, only=["adam"])] == ["adam"]
    with pytest.raises(UsageError, match=r"no check 'adm'\. Did you mean 'adam'"):
        load(valid, only=["adm"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  steps: 500", "  stpes: 500", "line 9: unknown key 'stpes' in defaults. Did you mean 'steps'"),
        ("margin: 0.8", "margin: 1.5", "line 12: defaults.policy.margin must be above 0 and at most 1, got 1.5"),
        ("rtol: 0.05", "rtol: 5%", "line 11: defaults.curvature.rtol must be a number, got the text '5%'"),
        ("lr: 0.01", "lr: '0.01'", "line 18: .*Remove the quotes"),
        ("lr: 0.01", "lr:", r"line 18: checks\[0\].optimizer.lr must be a number, got nothing"),
        ("name: zo-gd", "name: zo_gd", "Did you mean 'zo-gd'"),
        ("queries: 4", "queries: 2.5", "must be a whole number, got the number 2.5"),
        ("queries: 4", "queries: yes", "must be a whole number, got the boolean true"),
        ("queries: 4", f"queries: 1{'0' * 400}", "must be from 1 to 1000000, got an integer of"),
        ("name: adam", "name: plain", "line 19: the name 'plain' is used twice, first in line 15"),
        ('params: "layer', 'params: "(layer', "is not a regular expression"),
        ("betas: [0.9, 0.99]", "betas: 0.9", "must be a list of two values"),
        ("betas: [0.9, 0.99]", "betas: [0.9, 1.0]", r"betas\[1\] must be at least 0 and below 1"),
        ("set: {width: 32", "set: {wid-th: 32", "'wid-th', which is not a Python argument name"),
        ("device: cpu", "device: gpu", "must match auto|cpu"),
        ("peak: 0.05, ", "", "lacks 'peak'"),
        ("- name: plain", "- nam: plain", r"unknown key 'nam' in checks\[0\]. Did you mean 'name'"),
        ("name: plain", r'name: "a\ud800"', "has a line break or control character"),
        ("name: plain", r'name: "a\nb"', "has a line break or control character"),
        ("problem: model.py", "problem: [a]", "line 6: problem must be text, got a list"),
        ("checks:", "cheks:", "unknown key 'cheks'. Did you mean 'checks'"),
    ],
)
def test_a_mistake_is_named_with_its_line(load: Load, valid: str, old: str, new: str, words: str) -> None:
    assert old in valid
    with pytest.raises(ConfigError, match=words) as caught:
        load(valid.replace(old, new, 1))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("zoscope.yaml")


def test_all_mistakes_are_reported_at_once(load: Load, valid: str) -> None:
    broken = valid.replace("steps: 500", "steps: -1").replace("lr: 0.01", "lr: x").replace("beta: 0.5", "beta: 2")
    with pytest.raises(ConfigError, match=r"zoscope\.yaml has 3 errors. Line 9: .* Line 18: .* Line 30: ") as caught:
        load(broken)
    assert [issue.line for issue in caught.value.issues] == [9, 18, 30]


def test_a_check_without_what_it_needs_says_how_to_give_it(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"line 1: the check 'a' has no optimizer\.lr; give it here, in defaults"):
        load("checks: [{name: a, spec: m.py, optimizer: {name: gd}}]")


def test_environment_variables_are_not_expanded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTH", "7")
    (check,) = load("checks: [{name: $HOME, spec: m.py, set: {w: '${WIDTH}'}, optimizer: {name: gd, lr: 1}}]")
    assert (check.name, check.settings) == ("$HOME", {"w": "${WIDTH}"})


def test_the_yaml_file_of_a_folder_goes_before_its_pyproject(tmp_path: Path) -> None:
    assert find_config(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert find_config(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text("[tool.zoscope]\nproblem = 'm.py'\n")
    assert find_config(tmp_path) == tmp_path / "pyproject.toml"
    (tmp_path / "zoscope.yaml").write_text("problem: m.py\n")
    assert find_config(tmp_path) == tmp_path / "zoscope.yaml"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"caf\xe9: 1"])
def test_a_file_that_is_not_text_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zoscope.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="UTF-8"):
        load_document(tmp_path / "zoscope.yaml")


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_document(tmp_path / "zoscope.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "zoscope.yaml").write_bytes(b"\xef\xbb\xbfproblem: m.py\n")
    assert load_document(tmp_path / "zoscope.yaml").problem == "m.py"
