import json
from pathlib import Path

import pytest

from zoscope import UsageError
from zoscope.config.load import EMPTY, CheckConfig, build_checks, override_tree
from zoscope.config.sources import ConfigError
from zoscope.config.training import SCHEDULERS, load_hf_args

MEZO = {
    "trainer": "zo_sgd",
    "learning_rate": "1e-6",
    "zo_eps": 1e-3,
    "lr_scheduler_type": "constant",
    "perturbation_mode": "two_side",
    "q": 4,
    "max_steps": 20000,
    "per_device_train_batch_size": 16,
    "momentum": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "output_dir": "out",
    "fsdp_config": {"min_num_params": 0},
}


def built(file: Path, **options: object) -> CheckConfig:
    overrides = [(str(file), load_hf_args(file).tree), ("the command line", override_tree({"spec": "m.py", **options}))]
    (check,) = build_checks(EMPTY, overrides=overrides)
    return check


def written(tmp_path: Path, **changes: object) -> Path:
    file = tmp_path / "args.json"
    file.write_text(json.dumps({**MEZO, **changes}, indent=2))
    return file


def test_the_names_of_zeroth_order_trainers_are_read(tmp_path: Path) -> None:
    check = built(written(tmp_path))
    assert (check.optimizer.name, check.optimizer.lr, check.steps) == ("zo-gd", 1e-6, 20000)
    assert (check.estimator.mu, check.estimator.queries, check.estimator.batch_size) == (1e-3, 4, 16)


@pytest.mark.parametrize(("size", "pieces", "expected"), [(16, 4, 64), ("16", "4", 64), (None, 4, 32), (16, 1, 16)])
def test_a_step_sees_all_batches_that_it_accumulates(
    tmp_path: Path, size: object, pieces: object, expected: int
) -> None:
    file = written(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=pieces)
    assert built(file).estimator.batch_size == expected
    notices = load_hf_args(file).notices
    assert [f"= {expected} on each device" in notice for notice in notices] == ([] if pieces == 1 else [True])


def test_momentum_makes_it_gdm(tmp_path: Path) -> None:
    check = built(written(tmp_path, momentum=0.8))
    assert (check.optimizer.name, check.optimizer.beta) == ("zo-gdm", 0.8)


def test_adam_takes_its_constants(tmp_path: Path) -> None:
    check = built(written(tmp_path, trainer="zo_adam"))
    assert (check.optimizer.name, check.optimizer.betas, check.optimizer.eps) == ("zo-adam", (0.9, 0.95), 1e-6)


@pytest.mark.parametrize(("optimizer", "name"), [("sgd", "gd"), ("adamw_torch", "adam")])
def test_a_regular_trainer_is_first_order(tmp_path: Path, optimizer: str, name: str) -> None:
    assert built(written(tmp_path, trainer="regular", optim=optimizer)).optimizer.name == name


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_schedule_is_checked_at_its_peak(tmp_path: Path, kind: str) -> None:
    check = built(written(tmp_path, lr_scheduler_type=kind, warmup_steps=100))
    assert (check.optimizer.lr, check.optimizer.schedule.warmup) == (1e-6, 100)


def test_options_win_over_the_arguments(tmp_path: Path) -> None:
    assert built(written(tmp_path), lr=0.5).optimizer.lr == 0.5


def test_a_yaml_file_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("trainer: zo\nlearning_rate: 1e-6\nmax_steps: -1\n")
    check = built(file)
    assert (check.optimizer.name, check.optimizer.lr, check.steps) == ("zo-gd", 1e-6, 1000)


def test_a_one_sided_estimate_is_noted(tmp_path: Path) -> None:
    (notice,) = load_hf_args(written(tmp_path, perturbation_mode="one_side")).notices
    assert "one_side" in notice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_scheduler_type": "cosin"}, "line 5: lr_scheduler_type .*Did you mean 'cosine'"),
        ({"trainer": "zo_lozo"}, "line 2: trainer the text 'zo_lozo' has no stability theory"),
        ({"learning_rate": "fast"}, "line 3: learning_rate must be a number"),
        ({"perturbation_mode": "three_side"}, "perturbation_mode"),
        ({"q": True}, "q must be a number"),
        ({"gradient_accumulation_steps": 0}, "line 18: gradient_accumulation_steps must be a whole number"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number"),
        ({"per_device_train_batch_size": 0.5, "gradient_accumulation_steps": 2}, "batch_size must be"),
        ({"gradient_accumulation_steps": float("inf")}, "gradient_accumulation_steps must be a whole number"),
        ({"q": 0}, "queries must be from 1"),
        ({"learning_rate": float("nan")}, "optimizer.lr.peak must be above 0"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        built(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": "regular", "max_grad_norm": 0.5}, "max_grad_norm is 0.5"),
        ({"trainer": "regular", "optimizer": "adam", "weight_decay": 0.1}, "weight_decay 0.1 is not in"),
        ({"label_smoothing_factor": 0.2}, "label_smoothing_factor is 0.2"),
        ({"bf16": True}, "bf16 is on"),
        ({"fp16": True}, "fp16 is on"),
    ],
)
def test_what_the_thresholds_leave_out_is_said(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    found = load_hf_args(written(tmp_path, **changes))
    assert any(words in notice for notice in found.notices)
    quiet = {"max_grad_norm": 0, "weight_decay": 0.0, "label_smoothing_factor": 0.0, "bf16": False, "fp16": None}
    assert not load_hf_args(written(tmp_path, **quiet)).notices


def test_weight_decay_of_sgd_is_counted(tmp_path: Path) -> None:
    file = written(tmp_path, trainer="zo_sgd", weight_decay=0.1)
    assert built(file).optimizer.weight_decay == 0.1
    assert not load_hf_args(file).notices


@pytest.mark.parametrize("content", ["", "[1]", "3", "{", "[" * 20000, '{"q": 1' + "0" * 5000 + "}"])
def test_a_broken_file_is_one_paragraph(tmp_path: Path, content: str) -> None:
    file = tmp_path / "args.json"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_hf_args(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--hf-args: cannot read"):
        load_hf_args(tmp_path / "none.json")
