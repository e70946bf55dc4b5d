"""A run of `ZOTrainer`; as a program, one rank of a job: ``zo_trainer_job.py FOLDER``."""

import sys
from pathlib import Path

import torch
import transformers

from zoscope.integrations.zo_trainer import ZOTrainer, ZOTrainingArguments


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def examples() -> list[dict]:
    return [{"input_ids": [n % 30, 3 * n % 30, 5], "labels": int(n % 30 > 14)} for n in range(64)]


def trainer(folder: Path, model: torch.nn.Module | None = None, kind=ZOTrainer, **arguments) -> ZOTrainer:
    given = {"max_steps": 40, "per_device_train_batch_size": 16, "save_strategy": "no", "logging_steps": 10}
    args = ZOTrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **{**given, **arguments}
    )
    return kind(network() if model is None else model, args, train_dataset=examples(), eval_dataset=examples())


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


if __name__ == "__main__":
    place = Path(sys.argv[1])
    training = trainer(place, per_device_train_batch_size=8, max_steps=20, learning_rate=1e-3)
    training.train()
    if training.args.process_index == 0:
        torch.save(flat(training.model), place / "end.pt")
