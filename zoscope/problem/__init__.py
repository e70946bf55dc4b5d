"""What is measured: a model, its batches and a loss, seen as one function of a flat parameter vector."""

from zoscope.problem.core import Problem
from zoscope.problem.objective import Notice, Objective, Shard

__all__ = ["Notice", "Objective", "Problem", "Shard"]
