"""Language models in bfloat16 have the curvature of their float32 copies."""

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zoscope
from tests.integrations.conftest import VOCABULARY, small_examples, small_model
from zoscope.integrations.huggingface import problem_from_transformers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
        adapted: nn.Module = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def prefix(model: nn.Module) -> nn.Module:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def gpt2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
        )
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


MODELS: dict[str, Any] = {
    "opt": lambda: small_model("causal-lm"),
    "opt with a lora": lambda: lora(small_model("causal-lm"), ["q_proj", "v_proj"]),
    "opt with a prefix": lambda: prefix(small_model("causal-lm")),
    "gpt-2 with a lora": lambda: lora(gpt2(), ["c_attn"]),
}


@pytest.mark.parametrize("dtype", [pytest.param("auto", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_bounds_of_a_bfloat16_model_are_those_of_its_copy(name: str, dtype: str) -> None:
    narrow = MODELS[name]().to(torch.bfloat16)
    wide = MODELS[name]().to(torch.bfloat16).float()

    def measured(model: nn.Module, dtype: str) -> Any:
        problem = problem_from_transformers(model, small_examples("causal-lm"), batch_size=7)
        result = zoscope.bounds(problem, optimizers=["gd"], steps=100, max_hvps=60, dtype=dtype)
        return result, result.curvature["hessian"]

    result, found = measured(narrow, dtype)
    _, expected = measured(wide, "float32")
    for key in ("trace", "frobenius_sq", "trace_positive"):
        ours, theirs = getattr(found, key), getattr(expected, key)
        # The same probes through the same weights: what differs is the rounding of float32.
        assert ours.value == pytest.approx(theirs.value, abs=0.05 * theirs.half_width + 1e-3 * abs(theirs.value))
    assert result.dtype == "float32"
    codes = {notice.code for notice in result.warnings}
    assert ("half-precision" if dtype == "bfloat16" else "upcast") in codes
