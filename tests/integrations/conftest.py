"""Small random models of three families, and examples for them."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

VOCABULARY, CLASSES = 40, 3
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MAKERS = {
    "causal-lm": lambda more: transformers.OPTForCausalLM(
        transformers.OPTConfig(**{**SMALL, **more}, word_embed_proj_dim=16, ffn_dim=32, activation_function="gelu")
    ),
    "masked-lm": lambda more: transformers.BertForMaskedLM(
        transformers.BertConfig(**{**SMALL, **more}, intermediate_size=32)
    ),
    "sequence-classification": lambda more: transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**SMALL, **more}, intermediate_size=32, num_labels=CLASSES)
    ),
}


def small_model(task: str, **more: Any) -> nn.Module:
    """As ``from_config`` leaves it: in train mode, with dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = MAKERS[task](more)
        with torch.no_grad():
            for parameter in model.parameters():  # larger than at birth, for losses that differ between examples
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.train()


def small_examples(task: str) -> list[dict[str, Any]]:
    """Seven of different lengths; of token-level ones only some tokens count, none of them in the fourth."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length in (5, 9, 3, 6, 12, 4, 7):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        if task == "sequence-classification":
            examples.append({"input_ids": ids, "label": length % CLASSES, "text": "left out"})
        else:
            counted = 0 if length == 6 else length // 2
            labels = [-100] * (length - counted) + ids[length - counted :]
            examples.append({"input_ids": ids, "labels": labels, "text": "left out"})
    return examples


@pytest.fixture(params=sorted(MAKERS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)
