"""One of several processes that torchrun, or a scheduler, has started: rank 0 runs the command, the others help."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import IO, NoReturn

from zoscope.cli.app import EXIT_FAILED, complain, report, run


def is_ranked(environment: Mapping[str, str]) -> bool:
    """Whether the environment names a job of more than one process."""
    size = environment.get("WORLD_SIZE", "1")
    return "RANK" in environment and size.isdigit() and int(size) > 1


def run_ranked(args: Sequence[str]) -> int:
    """Run the command line on rank 0 with the help of the others; every rank returns the same exit code."""
    rank = int(os.environ["RANK"])
    speaker = sys.stderr if rank == 0 else _silenced()
    from zoscope import runtime  # late: it takes torch

    ends = _Ends(rank, speaker)
    try:
        with runtime.joined(on_lost=ends.lost, on_stop=ends.stopped) as ranks:
            if not ranks.leads:
                return runtime.serve(ranks)
            code = run(args)
            ranks.stop(code)
            return code
    except BaseException as error:
        return report(error)


class _Ends:
    """How a process ends that another one is gone from under; called on a thread, while the main one is busy."""

    def __init__(self, rank: int, speaker: IO[str]) -> None:
        self._rank, self._speaker = rank, speaker

    def lost(self, rank: int) -> NoReturn:
        """A process has gone: rank 0 says so and ends the others; rank 1 speaks where rank 0 is the one."""
        if self._rank <= 1:
            complain(
                f"The process of rank {rank} has gone, so this job ends: it was killed (out of memory, a time limit) "
                "or crashed outside of Python. Look at the system's log and at what torchrun says, then start again.",
                file=self._speaker,
            )
        from zoscope.runtime import current_ranks

        ranks = current_ranks()
        if ranks is not None and ranks.watch is not None:
            ranks.watch.send(EXIT_FAILED)
        self.stopped(EXIT_FAILED)

    def stopped(self, code: int) -> NoReturn:
        """End at once: the main thread may wait in an operation that will never be over."""
        sys.stdout.flush()
        os._exit(code)


def _silenced() -> IO[str]:
    """Send whatever this process prints nowhere, since rank 0 prints it already; what is left to speak with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interruption means
    speaker = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    return speaker
