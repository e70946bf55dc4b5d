"""The training arguments that transformers itself writes are a configuration of ``zoscope check``."""

import json
from pathlib import Path

import transformers

from zoscope.config.load import EMPTY, CheckConfig, build_checks, override_tree
from zoscope.config.training import FO_OPTIMIZERS, SCHEDULERS, load_hf_args


def dumped(tmp_path: Path, **arguments: object) -> Path:
    file = tmp_path / "training_args.json"
    written = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    file.write_text(written.to_json_string())
    return file


def built(file: Path, **options: object) -> CheckConfig:
    overrides = [(str(file), load_hf_args(file).tree), ("the command line", override_tree({"spec": "m.py", **options}))]
    (check,) = build_checks(EMPTY, overrides=overrides)
    return check


def test_a_dump_says_rate_schedule_steps_and_constants(tmp_path: Path) -> None:
    file = dumped(
        tmp_path,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=20_000,
        adam_beta2=0.95,
        per_device_train_batch_size=16,
    )
    check = built(file, optimizer="zo-adam")
    assert (check.optimizer.name, check.optimizer.lr, check.steps) == ("zo-adam", 1e-6, 20_000)
    assert (check.optimizer.betas, check.estimator.batch_size) == ((0.9, 0.95), 16)


def test_a_warm_up_by_share_and_an_end_by_epochs_are_read(tmp_path: Path) -> None:
    file = dumped(tmp_path, learning_rate=1e-6, lr_scheduler_type="cosine", warmup_steps=0.1, num_train_epochs=3)
    check = built(file, optimizer="zo-gd")
    assert (check.optimizer.schedule.kind, check.optimizer.schedule.warmup) == ("cosine", 0.1)
    assert check.steps == 1000


def test_arguments_with_the_names_of_mezo_are_a_whole_check(tmp_path: Path) -> None:
    file = dumped(tmp_path, learning_rate=1e-6, lr_scheduler_type="constant", max_steps=100)
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainer": "zo", "zo_eps": 1e-3}))
    check = built(file)
    assert (check.optimizer.name, check.optimizer.lr, check.estimator.mu) == ("zo-gd", 1e-6, 1e-3)


def test_a_regular_trainer_has_the_optimizer_that_transformers_takes_by_default(tmp_path: Path) -> None:
    file = dumped(tmp_path, learning_rate=1e-5)
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainer": "regular"}))
    assert built(file).optimizer.name == "adam"


def test_every_schedule_of_transformers_with_a_known_peak_is_known() -> None:
    kinds = {kind.value for kind in transformers.SchedulerType}
    assert kinds - {"greedy"} <= set(SCHEDULERS)


def test_plain_adamw_of_transformers_is_known_by_all_its_names() -> None:
    names = {name.value for name in transformers.training_args.OptimizerNames if name.value.startswith("adamw_torch")}
    assert names - {"adamw_torch_4bit", "adamw_torch_8bit"} <= set(FO_OPTIMIZERS)
