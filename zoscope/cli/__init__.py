"""The command line. Importing it, and every command module, leaves torch unloaded."""

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. An interruption is one line also while its modules load."""
    try:
        from zoscope.cli.app import main as run

        run(args)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
