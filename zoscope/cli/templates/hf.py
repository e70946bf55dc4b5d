"""What zoscope should look at: a language model, the texts that fine-tune it, and what of it is trained.

    zoscope bounds model.py --optimizer zo-gd                  how large may the step be?
    zoscope plan model.py --hf-args training_args.json         which one for the run of that file?
    zoscope check --spec model.py --hf-args training_args.json

Arguments of problem() are set with --set: model=FOLDER takes what save_pretrained has written and needs no network,
tuning=lora trains low-rank matrices. These start where half of their curvature is negative: train them a little first.
training_args.json is for transformers.HfArgumentParser, too. Replace the three parts below by your own.
"""

import logging
import warnings

import torch

import zoscope
from zoscope.integrations.huggingface import problem_from_transformers

try:
    import peft
    import transformers
except ImportError as error:
    raise zoscope.SpecError(f"{error.name} is not installed: pip install 'zoscope[hf]' peft") from None

# 1. Texts and what the model should answer.
EXAMPLES = [
    ("a moving and clever film", "great"),
    ("two hours that I want back", "terrible"),
    ("the actors carry every scene", "great"),
    ("dull from the first minute on", "terrible"),
    ("warm, funny and beautifully shot", "great"),
    ("a plot that makes no sense at all", "terrible"),
    ("I would watch it again tomorrow", "great"),
    ("loud, long and empty", "terrible"),
    ("a small wonder, told with care", "great"),
    ("the jokes fall flat", "terrible"),
    ("her best role in years", "great"),
    ("I left before the end", "terrible"),
    ("gripping from start to finish", "great"),
    ("a waste of a good cast", "terrible"),
    ("sharp writing and real feeling", "great"),
    ("it could not have been slower", "terrible"),
]
ANSWERS = ["great", "terrible"]
PROMPT = "{text} It was"
DECODERS = ("ForCausalLM", "LMHeadModel")


def problem(
    model: str = "facebook/opt-125m", tuning: str = "full", batch_size: int = 8, length: int = 64, seed: int = 0
) -> zoscope.Problem:
    """Called by zoscope.

    Args:
        model: Folder of a model, or its name on the hub: a decoder, or an encoder, which gets a head of its own.
        tuning: What is trained: ``full``, all parameters, or ``lora``.
        batch_size: Examples per forward pass; it changes no result.
        length: Most tokens of an example.
        seed: Of the parts of the model that are new.
    """
    # 2. The model and its tokenizer.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, tokenizer = load(model)
        decoder = network.config.architectures[0].endswith(DECODERS)
        if tuning == "lora":
            task = "CAUSAL_LM" if decoder else "SEQ_CLS"  # SEQ_CLS trains the head of an encoder, too
            network = peft.get_peft_model(network, peft.LoraConfig(task, r=8, target_modules="all-linear"))
        elif tuning != "full":
            raise zoscope.SpecError(f"tuning={tuning}: expected full or lora.")

    # 3. The examples as tokens. zoscope puts the model into eval mode and pads the batches.
    def tokens(text: str, answer: str) -> dict[str, object]:
        if not decoder:
            return {**tokenizer(text, truncation=True, max_length=length), "labels": ANSWERS.index(answer)}
        prompt = tokenizer(PROMPT.format(text=text), truncation=True, max_length=length)["input_ids"]
        answered = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        return {"input_ids": prompt + answered, "labels": [-100] * len(prompt) + answered}  # the answer alone counts

    return problem_from_transformers(network, [tokens(*pair) for pair in EXAMPLES], batch_size=batch_size)


def load(name: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A decoder as it is, or an encoder with a head that classifies; and the tokenizer."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if (config.architectures or [""])[0].endswith(DECODERS):
            network = transformers.AutoModelForCausalLM.from_pretrained(name)
        else:
            kind = transformers.AutoModelForSequenceClassification
            network = kind.from_pretrained(name, num_labels=len(ANSWERS))
        return network, transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise zoscope.SpecError(
            f"The model {name!r} cannot be loaded ({type(error).__name__}: {reason}). Expected the folder of a model, "
            "as save_pretrained writes it, or its name on the hub and a network: --set model=FOLDER."
        ) from error


# No reports on a new head, progress, what will be renamed, and every try to reach the hub.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
