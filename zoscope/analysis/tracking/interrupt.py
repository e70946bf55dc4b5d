"""Stop between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether someone wants the run to stop."""

    wanted: bool = False


@contextmanager
def gentle_interrupts() -> Iterator[Stop]:
    """Turn the first interrupt (Ctrl-C, or the TERM that clusters send) into a wish; the second one acts at once.

    Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = True

    for number, old in before.items():
        if old is not signal.SIG_IGN and old is not None:  # ignored on purpose, or set outside of Python
            signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in before.items():
            if old is not None:
                signal.signal(number, _typed(old))


def _typed(handler: Any) -> Any:
    return handler
