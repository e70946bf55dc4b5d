"""Devices, precision, generators, memory, ranks: the only room that knows about CUDA and other processes."""

from zoscope.runtime.autograd_errors import explain_autograd_error
from zoscope.runtime.collective import Twin, collective, serve
from zoscope.runtime.devices import (
    HALF,
    full_precision,
    preserved_rng,
    resolve_device,
    resolve_dtype,
    rng_fingerprint,
    second_order_mode,
    spawn_generators,
    threads_for,
    widest_dtype,
    without_autocast,
)
from zoscope.runtime.memory import (
    available_memory,
    held_memory,
    is_limited,
    is_out_of_memory,
    kept_memory,
    memory_limit,
    peak_bytes,
    release_memory,
)
from zoscope.runtime.process_group import (
    ALONE,
    DroppedError,
    Ranks,
    current_ranks,
    joined,
    joined_ranks,
)

__all__ = [
    "ALONE",
    "HALF",
    "DroppedError",
    "Ranks",
    "Twin",
    "available_memory",
    "collective",
    "current_ranks",
    "explain_autograd_error",
    "full_precision",
    "held_memory",
    "is_limited",
    "is_out_of_memory",
    "joined",
    "joined_ranks",
    "kept_memory",
    "memory_limit",
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
