"""Checkpoints: a state dict from a file, checked against the model before anything is written."""

import difflib
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoscope import runtime
from zoscope.errors import SpecError, UsageError
from zoscope.problem.model import some, unwrapped
from zoscope.problem.objective import Notice

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_IN_FOLDERS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin", "checkpoint.pt"),
)
"""Weights in the folders that transformers, peft and zoscope write."""
_NESTED = ("state_dict", "model_state_dict", "model", "module", "params")
_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(model: nn.Module, path: Path) -> tuple[Notice, ...]:
    """Load a state dict into a model, whole or not at all.

    Args:
        model: May be wrapped; the names are those without wrappers.
        path: ``.pt``, ``.pth``, ``.bin`` or Lightning's ``.ckpt`` (read with ``weights_only=True``), ``.safetensors``,
            a file of ``peft`` with an adapter for a model that has one, or the folder of a ``Trainer``'s checkpoint.

    Returns:
        What a reader should know of how the names fit.

    Raises:
        UsageError: If the file does not exist or has another suffix.
        SpecError: If it cannot be read, or its names or shapes are not the model's.
    """
    path = _in_folder(path)
    state = _plain(_read(path), path)
    with unwrapped(model) as bare:
        own = bare.state_dict(keep_vars=True)
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        adapted = _of_adapter(bare, state, tensors, path)
        if adapted is not None:
            state, tensors = adapted
            remarks: list[str] = []
        else:
            state, remarks = _with_names_of(_without_prefix(state, tensors), tensors, path)
        _check(state, tensors, path)
        try:
            bare.load_state_dict(state, strict=False)
        except Exception as error:
            raise SpecError(f"--checkpoint {path} cannot be loaded into the model ({error}).") from error
    return tuple(Notice("checkpoint", f"--checkpoint {path.name}: {remark}.") for remark in remarks)


def _in_folder(path: Path) -> Path:
    """The file with the weights, where a folder is given."""
    if not path.is_dir():
        return path
    found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
    if found is None:
        raise UsageError(
            f"--checkpoint {path} is a folder without weights: expected one of {', '.join(_IN_FOLDERS)} in it. It has "
            f"{some(sorted(entry.name for entry in path.iterdir()), most=6) or 'nothing'}."
        )
    return found


def _read(path: Path) -> Any:
    if not path.is_file():
        names = [p.name for p in sorted(path.parent.iterdir())] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise UsageError(f"--checkpoint {path} is not a file that exists.{hint}")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if suffix not in _PICKLED:
        raise UsageError(f"--checkpoint {path}: expected a state dict as {', '.join(_PICKLED)} or .safetensors.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SpecError(
            f"--checkpoint {path} holds more than tensors, or is no checkpoint at all, and is not opened because "
            "unpickling could run code (torch.load with weights_only=True refuses it). Save the weights alone: "
            "torch.save(model.state_dict(), path)."
        ) from error
    except Exception as error:
        if runtime.is_out_of_memory(error):
            raise
        first = str(error).strip().split("\n")[0]
        raise SpecError(
            f"--checkpoint {path} cannot be read ({type(error).__name__}: {first}): expected a file written by "
            "torch.save(model.state_dict(), path)."
        ) from error


def _read_parts(index: Path) -> Any:
    """A state dict in several files, by the index that names them."""
    try:
        names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            f"--checkpoint {index} is not a readable index ({type(error).__name__}): expected the names of files under "
            "weight_map, as transformers writes them."
        ) from error
    found: dict[str, Tensor] = {}
    for name in names:
        part = index.parent / Path(name).name  # beside the index, whatever it says
        found.update(_plain(_read(part), part))
    return found


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise SpecError(
            f"--checkpoint {path} needs the package safetensors, which is not installed: pip install 'zoscope[hf]'"
        ) from error
    try:
        return load_file(path)
    except Exception as error:
        if runtime.is_out_of_memory(error):
            raise
        raise SpecError(f"--checkpoint {path} is not a readable safetensors file ({error}). Write it again.") from error


def _plain(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself, also where training code has put it under a key of a larger dict."""
    for candidate in (content, *(content.get(key) for key in _NESTED if isinstance(content, Mapping))):
        if isinstance(candidate, Mapping) and candidate:
            tensors = {str(key): value for key, value in candidate.items() if isinstance(value, Tensor)}
            if len(tensors) == len(candidate):
                return tensors
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        found = f"a dict with the keys {some([str(key) for key in content], most=5)}" if content else "an empty dict"
    raise SpecError(
        f"--checkpoint {path} holds {found}: expected a state dict, tensors by name. Write it with "
        "torch.save(model.state_dict(), path)."
    )


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what a DistributedDataParallel or torch.compile wrapper has put in front of every name."""
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                changed = True
    return state


def _of_adapter(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """The tensors of a ``peft`` adapter by the model's names, and those of the model that they are for.

    ``None`` where the file holds another thing. Files leave the name of the adapter out.
    """
    adapters = list(getattr(model, "peft_config", None) or {})
    if not adapters:
        if any(".lora_" in name for name in state) and not any(".lora_" in name for name in own):
            raise SpecError(
                f"--checkpoint {path} holds an adapter of peft, and the model has none: expected the model that the "
                "adapter was made for. Wrap it in the spec, get_peft_model(model, config) or PeftModel.from_pretrained."
            )
        return None
    part = re.compile(rf"\.(?:modules_to_save\.|original_module\.)?(?:{'|'.join(map(re.escape, adapters))})(?=\.|$)")
    places = {part.sub("", name): name for name in own if part.search(name)}
    prompt = [name for name in places if name.startswith("prompt_encoder")]
    if len(prompt) == 1:
        places["prompt_embeddings"] = places.pop(prompt[0])
    if not places or not set(state) <= set(places):
        return None
    return {places[name]: tensor for name, tensor in state.items()}, {name: own[name] for name in places.values()}


def _with_names_of(
    state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out, or put in, what stands in front of all names: that of an attribute which holds the model.

    Raises:
        SpecError: If the model is there under several names, such as its own and that of an average.
    """
    if set(own) <= set(state):
        return state, []
    outer = [front for front in _fronts(own, state) if _covers({f"{front}{name}" for name in own}, state, own, front)]
    if len(outer) > 1:
        raise SpecError(
            f"--checkpoint {path} holds the model {len(outer)} times, under names that begin with "
            f"{' and '.join(map(repr, outer))}: expected it once. Save the one to measure by itself."
        )
    if outer:
        front = outer[0]
        kept = {name.removeprefix(front): t for name, t in state.items() if name.startswith(front)}
        others = [name for name in state if not name.startswith(front)]
        rest = f"; {some(others)} left out" if others else ""
        return kept, [f"its names begin with {front!r}, which the model's do not{rest}"]
    inner = [front for front in _fronts(state, own) if all(f"{front}{name}" in own for name in state)]
    if len(inner) == 1:
        return {f"{inner[0]}{name}": t for name, t in state.items()}, [
            f"the model's names begin with {inner[0]!r}, which those in the file do not"
        ]
    return state, []


def _fronts(names: Iterable[str], longer: Iterable[str]) -> list[str]:
    """What stands in some longer names in front of one of the names."""
    first = next(iter(names), None)
    if first is None:
        return []
    return sorted({name.removesuffix(first) for name in longer if name.endswith(f".{first}")})


def _covers(wanted: set[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor], front: str) -> bool:
    """Whether all wanted names are there; of tied weights one is enough."""
    there = {own[name.removeprefix(front)].data_ptr() for name in wanted if name in state}
    return all(name in state or own[name.removeprefix(front)].data_ptr() in there for name in wanted)


def _check(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    # Files without shared tensors (safetensors) name tied weights once; the other names are filled along with them.
    filled = {tensor.data_ptr() for name, tensor in own.items() if name in state and tensor.numel()}
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in filled]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    lossy = [n for n, tensor in own.items() if n in state and state[n].is_complex() and not tensor.is_complex()]
    said = [f"shapes differ ({some(shapes)})"] if shapes else []
    said += [f"{some(lossy)} is complex in the file and real in the model"] if lossy else []
    said += [f"the file lacks {some(missing)}"] if missing else []
    said += [f"the model has no {some(unexpected)}"] if unexpected else []
    if said:
        raise SpecError(
            f"--checkpoint {path} does not fit the model: {'; '.join(said)}. Nothing was loaded. Use a checkpoint of "
            "this architecture, or change the model in the spec (settings go through --set)."
        )
