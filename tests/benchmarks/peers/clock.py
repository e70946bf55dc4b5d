"""The clock of all timings: wall clock, or processor time of this process where others share the machine."""

import time

import torch

_clock = time.perf_counter


def use_processor_time() -> None:
    """Count what this process computes; the same as wall clock on an idle machine with one thread."""
    global _clock
    _clock = time.process_time


def now() -> float:
    """Seconds since some moment; on a GPU when everything that was asked of it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return _clock()
