"""Generators: spawned for zoscope, preserved for the user."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def spawn_generators(seed: int, n: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Make ``n`` independent generators on ``device``; the same ``seed`` gives the same streams.

    Raises:
        ValueError: If ``seed`` is negative (from numpy).
    """
    states = [child.generate_state(1, np.uint64)[0] for child in np.random.SeedSequence(seed).spawn(n)]
    return [torch.Generator(device=device).manual_seed(int(state) >> 1) for state in states]


def _cuda_in_use() -> bool:
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized())


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Give the global generators of torch (CPU, CUDA), numpy and Python back as they were.

    Args:
        device: CUDA device that will be used, whose generator counts even where CUDA has not been started yet.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - user code may draw from it
    starting = device is not None and device.type == "cuda"
    devices = list(range(torch.cuda.device_count())) if starting or _cuda_in_use() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def rng_fingerprint() -> tuple[bytes, ...]:
    """The state of the global generators, comparable with ``==``: tells whether a call drew random numbers."""
    states = [torch.get_rng_state()]
    if _cuda_in_use():
        states += torch.cuda.get_rng_state_all()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    other = repr(hash(random.getstate())) + repr(numpy_state[2]) + str(hash(numpy_state[1].tobytes()))
    return (*(bytes(state.numpy()) for state in states), other.encode())
