"""Devices, precision, generators, memory: the only room that knows about CUDA."""

from zoscope.runtime.devices import DTYPES, resolve_device, resolve_dtype, widest_dtype
from zoscope.runtime.memory import available_memory, is_out_of_memory, release_memory
from zoscope.runtime.peak import peak_bytes
from zoscope.runtime.random import preserved_rng, rng_fingerprint, spawn_generators
from zoscope.runtime.remedies import explain_autograd_error
from zoscope.runtime.switches import eager_mode, full_precision, second_order_mode, threads_for

__all__ = [
    "DTYPES",
    "available_memory",
    "eager_mode",
    "explain_autograd_error",
    "full_precision",
    "is_out_of_memory",
    "peak_bytes",
    "preserved_rng",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "rng_fingerprint",
    "second_order_mode",
    "spawn_generators",
    "threads_for",
    "widest_dtype",
]
