"""Devices, precision, generators, memory, ranks: the only room that knows about CUDA and other processes."""

from zoscope.runtime.allocator import kept_memory
from zoscope.runtime.devices import DTYPES, HALF, resolve_device, resolve_dtype, widest_dtype
from zoscope.runtime.failures import DroppedError, LostRankError
from zoscope.runtime.memory import (
    available_memory,
    held_memory,
    is_limited,
    is_out_of_memory,
    memory_limit,
    release_memory,
)
from zoscope.runtime.peak import peak_bytes
from zoscope.runtime.random import preserved_rng, rng_fingerprint, spawn_generators
from zoscope.runtime.ranks import Desk, Ranks, current_ranks, joined, joined_ranks, named, serve
from zoscope.runtime.remedies import explain_autograd_error
from zoscope.runtime.switches import eager_mode, full_precision, second_order_mode, threads_for, without_autocast

__all__ = [
    "DTYPES",
    "HALF",
    "Desk",
    "DroppedError",
    "LostRankError",
    "Ranks",
    "available_memory",
    "current_ranks",
    "eager_mode",
    "explain_autograd_error",
    "full_precision",
    "held_memory",
    "is_limited",
    "is_out_of_memory",
    "joined",
    "joined_ranks",
    "kept_memory",
    "memory_limit",
    "named",
    "peak_bytes",
    "preserved_rng",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "rng_fingerprint",
    "second_order_mode",
    "serve",
    "spawn_generators",
    "threads_for",
    "widest_dtype",
    "without_autocast",
]
