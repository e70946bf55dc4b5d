"""Adapters and prefixes of peft: what is trained is what is varied."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import zoscope
from tests.integrations.conftest import small_examples, small_model
from zoscope.curvature.operators import HessianOperator
from zoscope.integrations.huggingface import problem_from_transformers
from zoscope.problem.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

KINDS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
ATTENTION = {"causal-lm": ["q_proj", "v_proj"], "sequence-classification": ["query", "value"]}
PREFIX = 3


def adapted(task: str, tuning: str, **more: Any) -> nn.Module:
    """A small model with a LoRA or a prefix, and the head of a classifier, at random values."""
    import peft

    headless = (task, tuning) == ("sequence-classification", "prefix")  # see `adapted` of examples/llm/mezo.py
    kind = "FEATURE_EXTRACTION" if headless else KINDS[task]
    config: Any = (
        peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=ATTENTION[task], task_type=kind)
        if tuning == "lora"
        else peft.PrefixTuningConfig(num_virtual_tokens=PREFIX, task_type=kind)
    )
    base = small_model(task, **more)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        model: nn.Module = peft.get_peft_model(base, config)
        if headless:
            base.classifier.requires_grad_(True)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # a LoRA begins at zero, where half of it has no effect
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tuning", ["lora", "prefix"])
@pytest.mark.parametrize("task", KINDS)
def test_what_peft_trains_is_varied_and_nothing_else(task: str, tuning: str) -> None:
    model = adapted(task, tuning)
    problem = problem_from_transformers(model, small_examples(task), batch_size=7)
    assert problem.num_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert problem.num_params < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tuning", ["lora", "prefix"])
@pytest.mark.parametrize("task", KINDS)
def test_products_are_differences_of_gradients(task: str, tuning: str) -> None:
    problem = problem_from_transformers(adapted(task, tuning), small_examples(task), batch_size=7)
    with problem.prepare(device="cpu", dtype="float64") as objective:
        generator = torch.Generator().manual_seed(2)
        vector = torch.randn(objective.num_params, generator=generator, dtype=torch.float64)
        found, start, h = HessianOperator(objective).matmat(vector[None])[0], objective.read(), 1e-4

        def gradient(at: torch.Tensor) -> torch.Tensor:
            objective.write(at)
            (shard,) = objective.shards
            grads = torch.autograd.grad(objective.loss(shard), objective.params, allow_unused=True)
            return objective.flatten(grads)

        expected = (gradient(start + h * vector) - gradient(start - h * vector)) / (2 * h)
        objective.write(start)
    # Parts of these models are in float32 whatever they are given.
    assert torch.allclose(found, expected, rtol=1e-3, atol=2e-3 * float(found.abs().max()))


@pytest.mark.parametrize("tuning", ["lora", "prefix"])
def test_a_prefix_and_a_lora_have_bounds_and_come_back_as_they_were(tuning: str) -> None:
    model = adapted("causal-lm", tuning)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem = problem_from_transformers(model, small_examples("causal-lm"), batch_size=7)
    result = zoscope.bounds(problem, optimizers=["gd"], steps=100, max_hvps=40)
    assert result.optimizers["gd"].binding is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_labels_are_smoothed_behind_a_prompt_that_is_tuned() -> None:
    import peft

    base = small_model("causal-lm")
    with torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    plain, smoothed = (
        problem_from_transformers(model, small_examples("causal-lm"), batch_size=7, label_smoothing=part)
        for part in (0.0, 1e-9)
    )
    (batch,) = plain.batches
    with torch.no_grad():
        assert float(smoothed.loss(model, batch)) == pytest.approx(float(plain.loss(model, batch)), rel=1e-6)


@pytest.mark.parametrize(("kind", "counted"), [("prompt", 8), ("p-tuning", 8), ("prefix", 5)])
def test_batches_weigh_the_tokens_that_are_predicted_behind_a_prompt(kind: str, counted: int) -> None:
    """A prompt predicts first tokens, so that a text of one counts; a prefix in the cache does not."""
    import peft

    options: dict[str, Any] = {"num_virtual_tokens": PREFIX, "task_type": "CAUSAL_LM"}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**options),
        "p-tuning": lambda: peft.PromptEncoderConfig(**options, encoder_hidden_size=8),
        "prefix": lambda: peft.PrefixTuningConfig(**options),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(small_model("causal-lm"), config)
    examples = [{"input_ids": list(range(5, 5 + length))} for length in (1, 2, 5)]
    whole = problem_from_transformers(model, examples, batch_size=3)
    each = problem_from_transformers(model, examples, batch_size=1)
    with torch.no_grad():
        expected = float(whole.loss(model, whole.batches[0]))
        parts = [count * float(each.loss(model, b)) for count, b in zip(each.counts, each.batches, strict=True)]
    assert sum(whole.counts) == sum(each.counts) == counted
    assert sum(parts) / counted == pytest.approx(expected, rel=1e-5)


def test_a_prefix_is_the_keys_and_values_of_tokens_in_front() -> None:
    """In one layer it can be made of real tokens: those then count as if they had been part of the text."""
    model = adapted("sequence-classification", "prefix", num_hidden_layers=1).eval()
    base = model.get_base_model()
    front = torch.arange(6, 6 + PREFIX)
    problem = problem_from_transformers(model, small_examples("sequence-classification"), batch_size=7)
    (batch,) = problem.batches
    with torch.no_grad():
        attention = base.bert.encoder.layer[0].attention.self
        hidden = base.bert.embeddings(front[None])[0]
        kept = torch.cat([attention.key(hidden), attention.value(hidden)], dim=1)
        model.prompt_encoder["default"].embedding.weight.copy_(kept)
        found = float(problem.loss(model, batch))
        count = len(batch["labels"])
        states = base.bert(
            input_ids=torch.cat([front.expand(count, -1), batch["input_ids"]], dim=1),
            attention_mask=torch.cat([torch.ones(count, PREFIX), batch["attention_mask"]], dim=1),
        ).last_hidden_state
        logits = base.classifier(base.bert.pooler(states[:, PREFIX:]))
    assert found == pytest.approx(float(functional.cross_entropy(logits, batch["labels"])), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "with a head", "prompt"])
def test_adapters_are_loaded_into_the_model_that_they_were_made_for(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    configs = {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
        "with a head": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, modules_to_save=["fc1"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }

    def wrapped() -> nn.Module:
        return peft.get_peft_model(small_model("causal-lm"), configs[kind])

    trained, fresh = wrapped(), wrapped()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "checkpoint-10")
    load_checkpoint(fresh, tmp_path / "checkpoint-10")
    for (name, a), b in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
    if kind == "lora":
        with pytest.raises(zoscope.SpecError, match="holds an adapter of peft, and the model has none"):
            load_checkpoint(small_model("causal-lm"), tmp_path / "checkpoint-10")
