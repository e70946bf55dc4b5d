"""Checkpoints: a state dict from a file, checked against the model before anything is written."""

import difflib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoscope import runtime
from zoscope.errors import SpecError, UsageError
from zoscope.problem.model import some, unwrapped

_PICKLED = (".pt", ".pth", ".bin")
_NESTED = ("state_dict", "model_state_dict", "model", "module", "params")
_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, whole or not at all.

    Args:
        model: May be wrapped; the names are those without wrappers.
        path: ``.pt``, ``.pth`` or ``.bin`` (read with ``weights_only=True``), or ``.safetensors``.

    Raises:
        UsageError: If the file does not exist or has another suffix.
        SpecError: If it cannot be read, or its names or shapes are not the model's.
    """
    state = _plain(_read(path), path)
    with unwrapped(model) as bare:
        own = bare.state_dict(keep_vars=True)
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        state = _without_prefix(state, tensors)
        _check(state, tensors, path)
        try:
            bare.load_state_dict(state, strict=False)
        except Exception as error:
            raise SpecError(f"--checkpoint {path} cannot be loaded into the model ({error}).") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        names = [p.name for p in sorted(path.parent.iterdir())] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise UsageError(f"--checkpoint {path} is not a file that exists.{hint}")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
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
    said = [f"shapes differ ({some(shapes)})"] if shapes else []
    said += [f"the file lacks {some(missing)}"] if missing else []
    said += [f"the model has no {some(unexpected)}"] if unexpected else []
    if said:
        raise SpecError(
            f"--checkpoint {path} does not fit the model: {'; '.join(said)}. Nothing was loaded. Use a checkpoint of "
            "this architecture, or change the model in the spec (settings go through --set)."
        )
