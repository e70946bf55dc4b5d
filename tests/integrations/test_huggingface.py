import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import zoscope
import zoscope.integrations
from tests.integrations.conftest import VOCABULARY, small_examples, small_model
from zoscope.curvature.operators import HessianOperator
from zoscope.integrations.huggingface import Weighting, problem_from_transformers


def objective_value(problem: zoscope.Problem, **options: Any) -> float:
    with problem.prepare(device="cpu", **options) as objective:
        return objective.value()


def product(problem: zoscope.Problem) -> torch.Tensor:
    with problem.prepare(device="cpu", dtype="float64") as objective:
        vector = torch.randn(objective.num_params, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return HessianOperator(objective).matmat(vector[None])[0]


def mean_by_hand(model: nn.Module, task: str) -> float:
    """The mean over everything that counts, one example at a time: no padding, no batches."""
    model.eval()
    total, count = 0.0, 0
    for example in small_examples(task):
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits.double()
        if task == "sequence-classification":
            targets = torch.tensor([example["label"]])
        else:
            labels = torch.tensor(example["labels"])
            logits, targets = (logits[0, :-1], labels[1:]) if task == "causal-lm" else (logits[0], labels)
        total += float(functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100))
        count += int(targets.ne(-100).sum())
    return total / count


@pytest.mark.parametrize("batch_size", [2, 7])
def test_the_loss_is_the_mean_over_what_counts_however_it_is_batched(task: str, batch_size: int) -> None:
    model = small_model(task)
    problem = problem_from_transformers(model, small_examples(task), batch_size=batch_size)
    assert objective_value(problem) == pytest.approx(mean_by_hand(model, task), rel=1e-5)


@pytest.mark.parametrize("weighting", ["tokens", "examples"])
def test_examples_are_counted_as_examples_whatever_they_weigh(task: str, weighting: Weighting) -> None:
    problem = problem_from_transformers(small_model(task), small_examples(task), batch_size=4, weighting=weighting)
    assert problem.num_examples == len(small_examples(task))
    with problem.prepare(device="cpu", micro_batch=2) as objective:
        assert objective.num_examples == problem.num_examples
        assert sum(shard.weight for shard in objective.shards) == pytest.approx(1.0)


def test_micro_batches_make_no_difference(task: str) -> None:
    problem = problem_from_transformers(small_model(task), small_examples(task), batch_size=7)
    assert objective_value(problem, micro_batch=1) == pytest.approx(objective_value(problem), rel=1e-5)


def test_batches_can_weigh_by_examples() -> None:
    model = small_model("causal-lm")
    problem = problem_from_transformers(model, small_examples("causal-lm"), batch_size=4, weighting="examples")
    model.eval()
    losses = [float(problem.loss(model, batch).detach()) for batch in problem.batches]
    assert problem.counts == [4, 3]
    assert objective_value(problem) == pytest.approx((4 * losses[0] + 3 * losses[1]) / 7, rel=1e-5)


def test_a_causal_model_without_labels_predicts_its_input() -> None:
    model = small_model("causal-lm")
    examples = [{"input_ids": example["input_ids"]} for example in small_examples("causal-lm")]
    problem = problem_from_transformers(model, examples, batch_size=7)
    assert problem.counts == [sum(len(example["input_ids"]) - 1 for example in examples)]
    labelled = [{**example, "labels": example["input_ids"]} for example in examples]
    again = problem_from_transformers(model, labelled, batch_size=3)
    assert objective_value(problem) == pytest.approx(objective_value(again), rel=1e-5)


def test_dropout_and_caches_are_off_and_the_model_comes_back_as_it_was(task: str) -> None:
    model = small_model(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem = problem_from_transformers(model, small_examples(task))
    with problem.prepare(device="cpu") as objective:
        assert objective.value() == objective.value()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_embeddings_count_once() -> None:
    model = small_model("causal-lm")
    problem = problem_from_transformers(model, small_examples("causal-lm"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert problem.num_params == model.num_parameters()


def test_parameters_are_selected_by_name() -> None:
    model = small_model("sequence-classification")
    problem = problem_from_transformers(model, small_examples("sequence-classification"), params="classifier")
    assert problem.num_params == sum(p.numel() for p in model.classifier.parameters())


def test_fused_attention_is_differentiated_twice(task: str) -> None:
    fused, plain = (
        product(problem_from_transformers(small_model(task, attn_implementation=kind), small_examples(task)))
        for kind in ("sdpa", "eager")
    )
    assert torch.allclose(fused, plain, rtol=1e-4, atol=1e-5)  # OPT's plain softmax is in float32 whatever it is given


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(task: str, reentrant: bool) -> None:
    model = small_model(task)
    expected = product(problem_from_transformers(model, small_examples(task)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert torch.allclose(product(problem_from_transformers(model, small_examples(task))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_a_loss_in_float32(task: str, dtype: torch.dtype) -> None:
    expected = mean_by_hand(small_model(task), task)
    problem = problem_from_transformers(small_model(task).to(dtype), small_examples(task), batch_size=7)
    assert problem.loss(problem.model, problem.batches[0]).dtype == torch.float32
    value = objective_value(problem, dtype="own", differentiable=False)
    assert value == pytest.approx(expected, rel=10 * torch.finfo(dtype).eps)


def test_half_precision_weights_are_measured_by_forward_passes(task: str) -> None:
    problem = problem_from_transformers(small_model(task).to(torch.bfloat16), small_examples(task), batch_size=7)
    result = zoscope.bounds(problem, curvature="forward", optimizers=["gd"], max_hvps=60)
    assert result.dtype == "bfloat16"
    assert result.forward is not None


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"num_labels": 1}, [0.5, -1.0, 2.0, 0.0, 1.0, 0.3, -0.2]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[1.0, 0.0, 1.0]] * 7),
    ],
)
def test_regression_and_several_labels_have_the_loss_that_transformers_gives_them(
    more: dict[str, Any], labels: list[Any]
) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **more
    )
    model = transformers.BertForSequenceClassification(config).eval()
    examples = [
        {"input_ids": example["input_ids"], "labels": label}
        for example, label in zip(small_examples("sequence-classification"), labels, strict=True)
    ]
    problem = problem_from_transformers(model, examples, batch_size=7)
    (batch,) = problem.batches
    expected = float(model(**batch).loss.detach())
    assert float(problem.loss(model, batch).detach()) == pytest.approx(expected)
    half = problem.loss(model.to(torch.bfloat16), batch)
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_labels_are_smoothed_as_by_the_trainer(task: str, dtype: torch.dtype, rel: float) -> None:
    model = small_model(task).eval()
    (batch,) = problem_from_transformers(model, small_examples(task), batch_size=7).batches
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    with torch.no_grad():
        expected = float(smoother(model(**batch), batch["labels"], shift_labels=task == "causal-lm"))
    smoothed = problem_from_transformers(model.to(dtype), small_examples(task), batch_size=3, label_smoothing=0.1)
    assert objective_value(smoothed, dtype="own", differentiable=False) == pytest.approx(expected, rel=rel)


def test_only_classes_can_be_smoothed() -> None:
    model = small_model("sequence-classification", problem_type="regression")
    examples = [{"input_ids": [5, 6], "labels": [0.1, 0.2, 0.3]}]
    with pytest.raises(zoscope.SpecError, match="labels that are classes; here: regression"):
        objective_value(problem_from_transformers(model, examples, label_smoothing=0.1))
    with pytest.raises(zoscope.SpecError, match="pass task=, one of"):
        problem_from_transformers(small_model("masked-lm").bert, examples, label_smoothing=0.1)


def random_masks(examples: list[Any]) -> dict[str, torch.Tensor]:
    """What ``DataCollatorForLanguageModeling`` does, in short."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(e["input_ids"]) for e in examples], batch_first=True)
    masked = (torch.rand(ids.shape) < 0.3) & (ids != 0)
    return {
        "input_ids": ids.masked_fill(masked, 4),
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(~masked, -100),
    }


def test_random_masks_are_drawn_once_and_by_the_seed() -> None:
    model, examples = small_model("masked-lm"), small_examples("masked-lm")
    state = torch.get_rng_state()
    first, again, other = (
        problem_from_transformers(model, examples, collator=random_masks, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert objective_value(first) == objective_value(again)
    assert objective_value(first) != objective_value(other)


def test_the_batches_of_a_loader_are_taken_as_they_are() -> None:
    batches = [random_masks(small_examples("masked-lm")[start : start + 3]) for start in (0, 3)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    problem = problem_from_transformers(small_model("masked-lm"), loader)
    assert all(
        torch.equal(ours["labels"], theirs["labels"]) for ours, theirs in zip(problem.batches, batches, strict=True)
    )


NOT_COUNTED = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: problem_from_transformers(nn.Linear(2, 2), []), "expected a transformers model"),
        (lambda: problem_from_transformers(small_model("causal-lm"), [{"text": "abc"}]), "tokenise it first"),
        (lambda: problem_from_transformers(small_model("causal-lm"), ["abc"]), "expected a mapping with input_ids"),
        (lambda: problem_from_transformers(small_model("causal-lm"), iter([])), "islice"),
        (lambda: problem_from_transformers(small_model("causal-lm"), []), "dataset is empty"),
        (lambda: problem_from_transformers(small_model("causal-lm"), NOT_COUNTED), "All labels"),
        (lambda: problem_from_transformers(small_model("masked-lm"), [{"input_ids": [5]}]), "DataCollatorForLanguage"),
        (lambda: problem_from_transformers(small_model("sequence-classification"), [{"input_ids": [5]}]), "'labels'"),
        (
            lambda: objective_value(
                problem_from_transformers(small_model("masked-lm").bert, [{"input_ids": [5, 6]}], task="other")
            ),
            "returned no loss",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_one_paragraph(make: Any, words: str) -> None:
    with pytest.raises(zoscope.SpecError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"task": "qa"}, {"weighting": "words"}, {"batch_size": 0}, {"label_smoothing": 1.0}])
def test_an_argument_out_of_range_is_a_value_error(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        problem_from_transformers(small_model("causal-lm"), small_examples("causal-lm"), **bad)


def test_neither_library_is_imported() -> None:
    for file in Path(zoscope.integrations.__file__).parent.glob("h*.py"):
        assert not re.search(r"^\s*(import|from) (transformers|peft)", file.read_text(), re.MULTILINE)
