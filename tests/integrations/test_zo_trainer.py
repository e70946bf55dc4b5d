"""`ZOTrainer` beside a loop by hand, stopped and resumed, and on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from zoscope import ZOGD, UsageError
from zoscope.integrations.trainer import ZOTrainer, ZOTrainingArguments

from .conftest import small_model
from .zo_trainer_job import examples, flat, network, trainer

JOB = Path(__file__).parent / "zo_trainer_job.py"


def losses(training: ZOTrainer) -> list[float]:
    return [float(entry["loss"]) for entry in training.state.log_history if "loss" in entry]


def test_a_step_is_that_of_a_loop_by_hand(tmp_path: Path) -> None:
    training = trainer(
        tmp_path, learning_rate=1e-3, lr_scheduler_type="constant", max_steps=4, train_sampling_strategy="sequential"
    )
    training.train()
    model = network().eval()
    optimizer = ZOGD(model.parameters(), lr=1e-3, seed=42)
    for step in range(4):
        rows = [examples()[i] for i in range(16 * step, 16 * step + 16)]
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
        optimizer.step(lambda batch=batch: model(**batch).loss.detach())
    assert torch.allclose(flat(training.model), flat(model), rtol=0, atol=1e-6)
    assert not torch.equal(flat(training.model), flat(network()))


@pytest.mark.parametrize("kind", ["zo", "zo_sgd_mmt", "zo_adam", "zo_sign_opt", "zo-normalized"])
def test_every_optimizer_trains_without_being_told_a_step_size(kind: str, tmp_path: Path) -> None:
    training = trainer(tmp_path, trainer=kind, max_steps=60, lr_scheduler_type="constant")
    training.train()
    assert training.auto_lr is not None
    assert training.auto_lr.lr > 0
    logged = [entry for entry in training.state.log_history if "zo_trace" in entry]
    assert {"zo_edge", "zo_lr_over_edge", "zo_rollbacks", "learning_rate"} <= set(logged[-1])
    assert float(logged[-1]["learning_rate"]) == pytest.approx(training.auto_lr.lr)


@pytest.mark.parametrize("arguments", [{"learning_rate": "auto"}, {"learning_rate": 1e-3}])
def test_a_run_that_is_resumed_equals_one_that_was_not(arguments: dict, tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=20, **arguments)
    whole.train()
    resumed = trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert torch.equal(flat(whole.model), flat(resumed.model))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    options = {"learning_rate": 1e-3, "max_steps": 3, "train_sampling_strategy": "sequential"}
    once = trainer(tmp_path, **options)
    once.train()
    twice = trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, **options)
    twice.train()
    assert torch.allclose(flat(once.model), flat(twice.model), rtol=0, atol=1e-6)
    assert losses(once) == pytest.approx(losses(twice), rel=1e-5)


class Pops(ZOTrainer):
    """As transformers documents it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels)


class Divides(ZOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum") / num_items_in_batch


class DividesAtOnce(Divides):
    """Of the whole step, as it declares."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.heard = num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("own", [Pops, Divides, DividesAtOnce, "function", "smoothed"])
def test_every_evaluation_of_a_step_sees_the_whole_batch(own: object, tmp_path: Path) -> None:
    """Of two batches with different numbers of labels, against one batch of both."""
    options = {"learning_rate": 1e-3, "max_steps": 3, "train_sampling_strategy": "sequential"}
    more = {"label_smoothing_factor": 0.3} if own == "smoothed" else {}
    once = trainer(tmp_path, **options, **more)
    twice = trainer(
        tmp_path,
        kind=own if isinstance(own, type) else ZOTrainer,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        **options,
        **more,
    )
    if own == "function":
        twice.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
            torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
        )
    rows = [{**row, "labels": -100} if n % 16 < 5 else row for n, row in enumerate(examples())]
    for training in (once, twice):
        training.train_dataset = rows
        training.train()
    assert losses(once) == pytest.approx(losses(twice), rel=1e-5)
    assert torch.allclose(flat(once.model), flat(twice.model), rtol=0, atol=1e-6)
    if own is DividesAtOnce:
        assert int(twice.heard) == 11


def test_accumulated_texts_weigh_what_is_predicted_of_them(tmp_path: Path) -> None:
    """The first token is not."""
    rows = []
    for length in (2, 9):
        ids, filler = list(range(5, 5 + length)), 9 - length
        rows.append(
            {
                "input_ids": ids + [0] * filler,
                "attention_mask": [1] * length + [0] * filler,
                "labels": ids + [-100] * filler,
            }
        )
    found = []
    for size in (2, 1):
        training = trainer(
            tmp_path,
            small_model("causal-lm"),
            learning_rate=1e-9,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2 // size,
            logging_steps=1,
        )
        training.train_dataset = rows
        training.train()
        found += losses(training)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    training = trainer(one, max_steps=20, learning_rate=1e-3)
    training.train()
    two.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(JOB), str(two)]
    found = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    end = torch.load(two / "end.pt", weights_only=True)
    start = flat(network())
    # Batches of 8 round otherwise than those of 16: by 6e-8 of the loss, over 2μ, of slopes of about 0.1.
    assert (end - flat(training.model)).norm() <= 2e-3 * (end - start).norm()


def test_weight_decay_spares_what_the_trainer_spares(tmp_path: Path) -> None:
    training = trainer(tmp_path, learning_rate=1e-9, weight_decay=1e7, max_steps=1)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    training.train()
    shrunk = [
        name for name, p in training.model.named_parameters() if float(p.detach().norm()) < 0.995 * before[name].norm()
    ]
    assert shrunk
    assert not any("bias" in name or "LayerNorm" in name for name in shrunk)


def test_wrong_arguments_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a number, or auto"):
        ZOTrainingArguments(output_dir=str(tmp_path), learning_rate="fast")
    with pytest.raises(ValueError, match="two_side, one_side"):
        ZOTrainingArguments(output_dir=str(tmp_path), perturbation_mode="both")
    with pytest.raises(UsageError, match="zo_sgd_mmt"):
        trainer(tmp_path, trainer="lion", max_steps=1).train()
    with pytest.raises(UsageError, match="linear"):
        trainer(tmp_path, lr_scheduler_type="polynomial", max_steps=1).train()
    from transformers import TrainingArguments

    with pytest.raises(UsageError, match="ZOTrainingArguments"):
        ZOTrainer(network(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
