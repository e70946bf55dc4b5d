"""Few-shot fine-tuning as MeZO does it: which learning rate, and which eps, for the model, a LoRA or a prefix?

    zoscope bounds examples/llm/mezo.py                                       # a small random OPT
    zoscope bounds examples/llm/mezo.py --set model=roberta --set tuning=lora
    zoscope bounds examples/llm/mezo.py --set model=minilm --steps 100        # a real pretrained encoder
    zoscope bounds examples/llm/mezo.py --set model=/data/opt-125m --set steps=0 --steps 20000

Decoders answer a prompt with the name of the class, masked language models fill it in, and only that word counts in the
loss; encoders without such a head get one for classification.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

import zoscope
from zoscope.integrations.huggingface import problem_from_transformers

try:
    import transformers
except ImportError:
    raise zoscope.SpecError("This example needs transformers: pip install 'zoscope[hf]'.") from None

import models
from texts import SOURCES, few_shot

Tuning = Literal["full", "lora", "prefix"]

PROMPT = "{text} It was about"
STEPS = {"opt": 40, "gpt2": 40, "roberta": 40, "minilm": 25}
RATES = {"full": 5e-5, "lora": 1e-3, "prefix": 1e-2}
"""What a model is trained by Adam beforehand; all of a small random one at twenty times the rate."""

SMOOTHING = {"minilm": 0.1}
"""Of labels. A new head separates so few texts: without it there is no minimum near, and the loss has no scale."""


def problem(
    model: str = "opt",
    tuning: Tuning = "full",
    steps: int | None = None,
    lr: float | None = None,
    smoothing: float | None = None,
    shots: int = 8,
    length: int = 48,
    batch_size: int = 32,
    seed: int = 0,
) -> zoscope.Problem:
    """Classification of one-sentence texts about math, text, files and the network.

    Args:
        model: ``opt``, ``gpt2`` or ``roberta`` (small, random), ``minilm``, or the folder of a checkpoint.
        tuning: What is trained: everything, a LoRA of the queries and values, or a prefix of five positions.
        steps: Steps of Adam on the examples before anything is measured; none for a checkpoint.
        lr: Their learning rate.
        smoothing: Of the labels; 0.1 for ``minilm``, 0 for the others.
        shots: Examples of each class.
        length: Most tokens of an example.
        batch_size: Examples per forward pass.
        seed: Of everything that is random.
    """
    texts, classes = few_shot(shots)
    known = [PROMPT.format(text=text) for text in texts] + list(SOURCES)
    network, tokenizer = models.load(model, texts=known, classes=len(SOURCES), seed=seed)
    examples = [_example(network, tokenizer, *pair, length=length) for pair in zip(texts, classes, strict=True)]
    network = adapted(network, tuning, seed=seed)
    smoothing = SMOOTHING.get(model, 0.0) if smoothing is None else smoothing
    found = problem_from_transformers(network, examples, batch_size=batch_size, label_smoothing=smoothing)
    rate = RATES[tuning] * (20 if tuning == "full" and model in models.SMALL else 1)
    train(found, steps=STEPS.get(model, 0) if steps is None else steps, lr=lr or rate)
    return found


def _example(network: nn.Module, tokenizer: Any, text: str, name: str, *, length: int) -> Mapping[str, Any]:
    """One example, tokenised, with the labels that the model's head takes."""
    if type(network).__name__.endswith("ForSequenceClassification"):
        tokens = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        return {"input_ids": tokens, "labels": list(SOURCES).index(name)}
    masked = type(network).__name__.endswith("ForMaskedLM")
    answer = tokenizer(" " + name, add_special_tokens=False)["input_ids"]
    hidden = [tokenizer.mask_token_id] * len(answer) if masked else answer
    prompt = tokenizer(PROMPT.format(text=text), truncation=True, max_length=length - len(answer))["input_ids"]
    end = prompt[-1:] if masked and prompt[-1] == tokenizer.sep_token_id else []
    prompt = prompt[: len(prompt) - len(end)]
    labels = [-100] * len(prompt) + answer + [-100] * len(end)
    return {"input_ids": prompt + hidden + end, "labels": labels}


def adapted(network: nn.Module, tuning: Tuning, *, seed: int) -> nn.Module:
    """The model itself, or with a LoRA or a prefix around it, as in MeZO's experiments."""
    if tuning == "full":
        return network
    try:
        import peft
    except ImportError:
        raise zoscope.SpecError(f"tuning={tuning} needs peft: pip install peft.") from None
    kinds = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForMaskedLM": "FEATURE_EXTRACTION"}
    task = next((kind for suffix, kind in kinds.items() if type(network).__name__.endswith(suffix)), None)
    classifier = task == "SEQ_CLS"
    if tuning == "lora":
        config: Any = peft.LoraConfig(r=8, lora_alpha=16, task_type=task, target_modules=_attention(network))
    elif tuning == "prefix":
        # Around a classifier peft 0.21 looks for an argument of the encoder that transformers 5.24 has renamed; around
        # a feature extractor it just passes the prefix on. The head is trained all the same.
        task = "FEATURE_EXTRACTION" if classifier else task
        config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=task)
    else:
        raise zoscope.SpecError(f"tuning={tuning}: expected full, lora or prefix.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(network, config).eval()
    if classifier and tuning == "prefix":
        head: nn.Module = network.classifier if hasattr(network, "classifier") else network.score
        head.requires_grad_(True)
    return model


def _attention(network: nn.Module) -> list[str]:
    """Names of the layers that make queries and values."""
    names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    return [name for name in ("q_proj", "v_proj", "query", "value", "c_attn", "qkv_proj") if name in names]


def train(found: zoscope.Problem, *, steps: int, lr: float) -> None:
    """Some steps of Adam on all batches, in place, without dropout."""
    optimizer = torch.optim.Adam([p for p in found.model.parameters() if p.requires_grad], lr=lr)
    total = sum(found.counts)
    for _ in range(steps):
        optimizer.zero_grad()
        for batch, count in zip(found.batches, found.counts, strict=True):
            (found.loss(found.model, batch) * (count / total)).backward()
        optimizer.step()
    optimizer.zero_grad()


transformers.utils.logging.set_verbosity_error()  # the report on a head that is new, and a progress bar
transformers.utils.logging.disable_progress_bar()
