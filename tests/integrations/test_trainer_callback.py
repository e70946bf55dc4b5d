"""The threshold in the logs of a real ``transformers`` ``Trainer``."""

import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import zoscope  # noqa: E402
from zoscope.integrations.trainer import watch_trainer  # noqa: E402


def trainer(tmp_path: Path, kind=transformers.Trainer, **arguments):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    examples = [{"input_ids": [n % 30, 3 * n % 30, 5], "labels": n % 2} for n in range(16)]
    return kind(
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
        assert math.isclose(entry["zoscope/max_lr"], record.exact)
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


WEIGHTS = torch.tensor([1.0, 20.0])


def weighted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (each * WEIGHTS[labels]).mean()


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = weighted(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("way", ["class", "function", "assigned"])
def test_a_loss_of_the_trainers_own_is_measured(tmp_path: Path, way: str) -> None:
    training = trainer(tmp_path, kind=OwnLoss if way == "class" else transformers.Trainer)
    if way == "function":
        training.compute_loss_func = lambda outputs, labels, **_: weighted(outputs["logits"], labels)
    elif way == "assigned":
        training.compute_loss = OwnLoss.compute_loss.__get__(training)
    callback = watch_trainer(training, every=6, examples=8, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    model = training.model.eval()
    batches = [training.data_collator(training.train_dataset[start : start + 4]) for start in (0, 4)]
    truth = zoscope.Problem(model, batches, lambda m, b: weighted(m(input_ids=b["input_ids"]).logits, b["labels"]))
    expected = zoscope.StabilityMonitor(truth, "zo-gd", steps=6, max_hvps=25, rtol=0.5).step(lr=5e-5)
    training.train()
    assert callback.records[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert callback.records[0].exact == pytest.approx(expected.exact, rel=1e-3)
    assert not [notice for notice in callback.warnings if notice.code == "other-loss"]


class CountedLoss(transformers.Trainer):
    """Divides by the count that the trainer hands over, as losses of language models do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def test_a_loss_gets_the_count_of_what_it_is_the_mean_over(tmp_path: Path) -> None:
    plain, own = trainer(tmp_path), trainer(tmp_path, kind=CountedLoss)
    found = []
    for training in (plain, own):
        callback = watch_trainer(training, every=6, examples=8, optimizer="zo-gd", max_hvps=25, rtol=0.5)
        training.train()
        found.append(callback.records[-1])
        assert not [notice for notice in callback.warnings if notice.code == "other-loss"]
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-5)
    assert found[1].exact == pytest.approx(found[0].exact, rel=0.02)  # rounding ends its few products elsewhere


def test_a_model_that_the_training_makes_anew_is_the_one_that_is_measured(tmp_path: Path) -> None:
    plain = trainer(tmp_path, learning_rate=1e-2)
    training = transformers.Trainer(
        model_init=lambda: type(plain.model)(plain.model.config),
        args=plain.args,
        train_dataset=plain.train_dataset,
    )
    callback = watch_trainer(training, every=6, examples=8, max_hvps=25, rtol=0.5)
    training.train()
    first, last = callback.records
    assert last.loss != first.loss
    assert "other-parameters" not in [notice.code for notice in callback.warnings]


class OwnStep(transformers.Trainer):
    """Adds a term where no one sees it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        return loss + 3 * loss.abs()


def test_a_step_that_adds_to_the_loss_is_found_out(tmp_path: Path) -> None:
    training = trainer(tmp_path, kind=OwnStep)
    callback = watch_trainer(training, every=6, examples=8, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    training.train()
    assert "other-loss" in [notice.code for notice in callback.warnings]
    assert "training_step" not in vars(training)  # the trainer is as it was


class LargerStep(transformers.Trainer):
    """By less than what the first losses have to differ by on average."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = 1.9 * model(**inputs).loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


def test_accumulated_losses_of_the_first_step_are_compared(tmp_path: Path) -> None:
    training = trainer(tmp_path, kind=LargerStep, gradient_accumulation_steps=4)
    callback = watch_trainer(training, every=6, examples=8, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    training.train()
    (found,) = [notice for notice in callback.warnings if notice.code == "other-loss"]
    assert "On its first step" in found.message


@pytest.mark.parametrize("counted", [True, False])
def test_accumulated_losses_of_a_plain_trainer_are_the_problems(tmp_path: Path, counted: bool) -> None:
    """Averaged by tokens, where the model is told their number, or evenly."""
    from tests.integrations.conftest import small_model

    texts = [[5 + (n * k) % 30 for k in range(12)] for n in range(16)]
    kept = [1 if n % 2 else 11 for n in range(16)]
    rows = [{"input_ids": t, "labels": [-100] * (12 - k) + t[12 - k :]} for t, k in zip(texts, kept, strict=True)]
    args = trainer(tmp_path, gradient_accumulation_steps=8, max_grad_norm=0).args
    args.per_device_train_batch_size, args.max_steps = 1, 1
    training = transformers.Trainer(model=small_model("causal-lm", dropout=0.0), args=args, train_dataset=rows)
    training.model_accepts_loss_kwargs = counted
    callback = watch_trainer(training, every=6, examples=2, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    training.train()
    assert len([expected for expected in callback._first if expected is not None]) == 8
    assert not [notice for notice in callback.warnings if notice.code == "other-loss"]


@pytest.mark.parametrize(("found", "other"), [(4.6, False), (3.0, False), (1.9 * 4.6, True), (1.0, True)])
def test_a_mean_over_a_step_is_even_or_by_what_counts(tmp_path: Path, found: float, other: bool) -> None:
    callback = watch_trainer(trainer(tmp_path), examples=8)
    callback._first = [(1.0, 1), (5.0, 9)]
    callback._compare(found)
    assert [notice.code for notice in callback.warnings] == (["other-loss"] if other else [])


class OwnLoader(transformers.Trainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


def test_batches_come_from_the_trainers_own_loader(tmp_path: Path) -> None:
    training = trainer(tmp_path, kind=OwnLoader)
    kept = training.data_collator
    training.data_collator = lambda examples: kept([{**e, "input_ids": [7, 7, 7]} for e in examples])
    callback = watch_trainer(training, every=6, examples=8, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    seen = torch.cat([batch["input_ids"] for batch in callback._problem.batches])
    assert seen.shape == (8, 3)
    assert (seen == 7).all()
    training.train()
    assert len(callback.records) == 2


def test_columns_are_dropped_before_collating_as_the_trainer_does(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    training.train_dataset = [{**example, "text": "a b"} for example in training.train_dataset]
    kept = training.data_collator

    def strict(examples):
        assert all("text" not in example for example in examples)
        return kept(examples)

    training.data_collator = strict
    callback = watch_trainer(training, every=6, examples=8, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    training.train()
    assert len(callback.records) == 2


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        for n in range(40):
            yield {"input_ids": [n % 30, 2, 5], "labels": n % 2}


def test_the_first_examples_of_a_stream_are_measured_and_said(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    training.train_dataset = Stream()
    callback = watch_trainer(training, every=6, examples=12, optimizer="zo-gd", max_hvps=25, rtol=0.5)
    training.train()
    assert callback._problem.num_examples == 12
    assert "first 12 examples" in next(n.message for n in callback.warnings if n.code == "streaming")
    training.train_dataset = iter([])
    with pytest.raises(ValueError, match="each example comes once"):
        watch_trainer(training)


def test_notices_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = trainer(tmp_path, max_grad_norm=1e-6)
    watch_trainer(training, every=2, examples=8, max_hvps=25, rtol=0.5)
    with caplog.at_level("WARNING", logger="zoscope"):
        training.train()
    assert sum("[clipped]" in record.message for record in caplog.records) == 1
