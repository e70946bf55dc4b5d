"""The command line. Importing it, and every command module, leaves torch unloaded."""

from zoscope.cli.app import main

__all__ = ["main"]
