"""The threshold in the logs of a real ``transformers`` ``Trainer``."""

import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from zoscope.integrations.trainer import watch_trainer  # noqa: E402


def trainer(tmp_path: Path, **arguments):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    examples = [{"input_ids": [n % 30, 3 * n % 30, 5], "labels": n % 2} for n in range(16)]
    return transformers.Trainer(
        model=transformers.BertForSequenceClassification(config),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=2,
            **arguments,
        ),
        train_dataset=examples,
    )


@pytest.mark.parametrize(("optimizer", "operator"), [(None, "preconditioned_hessian"), ("zo-gd", "hessian")])
def test_threshold_and_ratio_are_in_the_trainers_history(tmp_path: Path, optimizer: str | None, operator: str) -> None:
    training = trainer(tmp_path, learning_rate=1e-3)
    callback = watch_trainer(training, every=3, examples=4, optimizer=optimizer, max_hvps=25, rtol=0.5)
    training.train()
    logged = [entry for entry in training.state.log_history if "zoscope/ratio" in entry]
    assert [entry["step"] for entry in logged] == [0, 3, 6]
    assert [record.operator for record in callback.records] == [operator] * 3
    for entry, record in zip(logged, callback.records, strict=True):
        assert math.isclose(entry["zoscope/exact"], record.exact)
        assert entry["zoscope/ratio"] > 0


def test_measuring_does_not_change_the_training(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    plain.train()
    watched = trainer(tmp_path)
    watch_trainer(watched, every=3, examples=4, max_hvps=25, rtol=0.5)
    watched.train()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [[e["loss"] for e in training.state.log_history if "loss" in e] for training in (plain, watched)]
    assert losses[0] == losses[1]


def test_labels_are_smoothed_as_the_trainer_is_told(tmp_path: Path) -> None:
    training = trainer(tmp_path, label_smoothing_factor=0.2, max_grad_norm=0)
    model = training.model.eval()
    batch = training.data_collator([training.train_dataset[n] for n in range(4)])
    expected = float(training.compute_loss(model, dict(batch)))
    callback = watch_trainer(training, every=3, examples=4, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    training.train()
    assert callback.records[0].loss == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_the_trainers_own_needs_a_problem(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    training.compute_loss_func = lambda outputs, labels, **_: outputs["logits"].sum()
    with pytest.raises(ValueError, match="compute_loss_func: pass the problem"):
        watch_trainer(training)
