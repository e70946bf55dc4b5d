"""Hugging Face ``TrainingArguments`` files, with the names that zeroth-order trainers add to them.

A dump of ``TrainingArguments`` has over a hundred keys, so unknown ones are passed over; those that matter here are
translated to the names of ``zoscope.yaml``.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoscope.config.located import ConfigError, InvalidError, Issue, Located, nearest
from zoscope.config.yaml_reader import read_yaml
from zoscope.errors import UsageError

SCHEDULERS = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "reduce_lr_on_plateau": "constant",
    "inverse_sqrt": "linear",
    "linear": "linear",
    "polynomial": "linear",
    "warmup_stable_decay": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
}
"""``lr_scheduler_type`` and the shape that stands for it: all of them peak at ``learning_rate``."""

TRAINERS = {"zo": "zo-gd", "zo_sgd": "zo-gd", "zo_sgd_mmt": "zo-gdm", "zo_adam": "zo-adam"}
ADAMW = ("torch", "torch_fused", "torch_xla", "torch_npu_fused", "anyprecision", "hf")
FO_OPTIMIZERS = {"sgd": "gd", "adam": "adam", "adamw": "adam"} | {f"adamw_{name}": "adam" for name in ADAMW}
DEFAULT_BATCH = 8.0
"""``per_device_train_batch_size`` of ``TrainingArguments``."""

MODES = ("two_side", "one_side")


@dataclass(frozen=True)
class HfArguments:
    """What an arguments file says, as a piece of configuration.

    Args:
        tree: Overrides for a check.
        notices: What the file asks for and the theory has to say something about.
    """

    tree: Located
    notices: tuple[str, ...] = ()


def load_hf_args(file: Path) -> HfArguments:
    """Read ``learning_rate``, ``zo_eps``, ``lr_scheduler_type``, ``perturbation_mode``, ``q`` and their kin.

    A batch is what one step of the optimizer sees on one device: ``gradient_accumulation_steps`` of them make one.

    Raises:
        ConfigError: With every value that cannot be used and its line.
        UsageError: If the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--hf-args: cannot read {file} ({reason}). Expected a JSON or YAML file.") from None
    try:
        tree = _read_json(text) if file.suffix == ".json" else read_yaml(text)
        if not isinstance(tree.value, Mapping):
            raise InvalidError.at(tree, f"expected a mapping of training arguments, got {tree.described}.")
        return _Translator(tree.value).translate()
    except InvalidError as error:
        raise ConfigError(str(file), error.issues) from None


def _read_json(text: str) -> Located:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
        raise InvalidError([Issue(line, f"not valid JSON: {reason}.")]) from None
    if not isinstance(data, dict):
        return Located(data if not isinstance(data, list) else tuple(data), 1)
    return Located({key: Located(value, _json_line(text, key)) for key, value in data.items()}, 1)


def _json_line(text: str, key: str) -> int | None:
    found = re.search(re.escape(json.dumps(key)) + r"\s*:", text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


class _Translator:
    def __init__(self, entries: Mapping[str, Located]) -> None:
        self._entries = entries
        self._issues: list[Issue] = []
        self._notices: list[str] = []

    def translate(self) -> HfArguments:
        tree: dict[str, Any] = {
            "optimizer": {
                "name": self._optimizer(),
                "lr": self._lr(),
                "beta": self._momentum(),
                "betas": self._betas(),
                "eps": self._number("adam_epsilon"),
            },
            "estimator": {
                "queries": self._number("q", "zo_sample"),
                "mu": self._number("zo_eps"),
                "batch_size": self._batch_size(),
            },
            "steps": self._steps(),
        }
        self._mode()
        if self._issues:
            raise InvalidError(self._issues)
        pruned = _prune(tree)
        return HfArguments(pruned if isinstance(pruned, Located) else Located({}, None), tuple(self._notices))

    def _text(self, name: str) -> tuple[str, Located] | None:
        node = self._entries.get(name)
        return None if node is None or not isinstance(node.value, str) else (node.value, node)

    def _number(self, *names: str) -> Located | None:
        """The first of ``names`` that is there; numbers in quotes count, as command-line dumps have them."""
        for name in names:
            node = self._entries.get(name)
            if node is None or node.value is None:
                continue
            value = node.value
            if isinstance(value, str):
                with contextlib.suppress(ValueError):
                    value = float(value)
            if isinstance(value, bool) or not isinstance(value, int | float):
                self._issues.append(Issue(node.line, f"{name} must be a number, got {node.described}."))
                return None
            return Located(value, node.line)
        return None

    def _batch_size(self) -> Located | None:
        """Examples of one step of the optimizer on one device; how many devices there are no such file says."""
        size, pieces = self._number("per_device_train_batch_size"), self._number("gradient_accumulation_steps")
        if pieces is None or _as_float(pieces) == 1:
            return size
        if not (_as_float(pieces) >= 1 and _as_float(pieces).is_integer()):
            self._issues.append(
                Issue(pieces.line, f"gradient_accumulation_steps must be a whole number ≥ 1, got {pieces.described}.")
            )
            return None
        each = DEFAULT_BATCH if size is None else _as_float(size)
        if not each.is_integer():
            return size  # what a batch size must be is said where it is checked
        both = f"{each:,.0f} examples{' (the default)' if size is None else ''}"
        self._notices.append(
            f"A step sees gradient_accumulation_steps × {both} = {_as_float(pieces) * each:,.0f} on each device."
        )
        return Located(int(_as_float(pieces) * each), pieces.line)

    def _steps(self) -> Located | None:
        node = self._number("max_steps")
        return node if node is not None and _as_float(node) > 0 else None  # -1: by epochs

    def _momentum(self) -> Located | None:
        node = self._number("momentum")
        return node if node is not None and _as_float(node) != 0 else None

    def _betas(self) -> Located | None:
        first, second = self._number("adam_beta1"), self._number("adam_beta2")
        return None if first is None or second is None else Located((first, second), first.line)

    def _lr(self) -> Located | None:
        rate = self._number("learning_rate")
        found = self._text("lr_scheduler_type")
        if rate is None:
            return None
        warmup = self._warmup()
        if found is None and warmup is None:
            return rate
        kind = "linear" if found is None else SCHEDULERS.get(found[0])
        if kind is None and found is not None:
            self._unknown("lr_scheduler_type", found, tuple(SCHEDULERS))
            return None
        line = rate.line if found is None else found[1].line
        schedule = {"schedule": Located(kind, line), "peak": rate}
        return Located(schedule | ({"warmup": warmup} if warmup is not None else {}), rate.line)

    def _warmup(self) -> Located | None:
        for name in ("warmup_steps", "warmup_ratio"):
            node = self._number(name)
            if node is not None and _as_float(node) > 0:
                return node
        return None

    def _optimizer(self) -> Located | None:
        found = self._text("trainer")
        if found is None or found[0] == "none":
            return None
        trainer, node = found
        if trainer == "regular":
            return self._first_order(node)
        if trainer not in TRAINERS:
            self._unknown("trainer", found, (*TRAINERS, "regular"))
            return None
        name = TRAINERS[trainer]
        return Located("zo-gdm" if name == "zo-gd" and self._momentum() is not None else name, node.line)

    def _first_order(self, trainer: Located) -> Located | None:
        found = self._text("optimizer") or self._text("optim") or ("adamw", trainer)
        if found[0] not in FO_OPTIMIZERS:
            self._unknown("optim", found, tuple(FO_OPTIMIZERS))
            return None
        name = FO_OPTIMIZERS[found[0]]
        return Located("gdm" if name == "gd" and self._momentum() is not None else name, found[1].line)

    def _mode(self) -> None:
        found = self._text("perturbation_mode")
        if found is None:
            return
        if found[0] not in MODES:
            self._unknown("perturbation_mode", found, MODES)
        elif found[0] == "one_side":
            self._notices.append(
                "perturbation_mode is one_side: the estimate f(x+μu) − f(x) adds a noise of order μ that the two-sided "
                "theory leaves out; the threshold holds for small zo_eps."
            )

    def _unknown(self, name: str, found: tuple[str, Located], options: tuple[str, ...]) -> None:
        match = nearest(found[0], options)
        hint = f"Did you mean {match!r}?" if match else f"Known: {', '.join(options)}."
        self._issues.append(Issue(found[1].line, f"{name} {found[1].described} has no stability theory here. {hint}"))


def _as_float(node: Located) -> float:
    return float(node.value) if isinstance(node.value, int | float) else math.nan


def _prune(tree: object) -> Located | None:
    """Nested plain mappings to ``Located`` ones, without what is ``None``."""
    if isinstance(tree, Located) or tree is None:
        return tree
    if not isinstance(tree, Mapping):
        return Located(tree, None)
    kept = {name: node for name, item in tree.items() if (node := _prune(item)) is not None}
    return Located(kept, None) if kept else None
