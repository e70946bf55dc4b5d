"""What is measured: a model, its batches and a loss, seen as one function of a flat parameter vector."""

from zoscope.problem.core import Problem
from zoscope.problem.derivatives import SecondDerivativesByHand
from zoscope.problem.objective import Notice, Objective, Shard
from zoscope.problem.session import OWN_DTYPE

__all__ = ["OWN_DTYPE", "Notice", "Objective", "Problem", "SecondDerivativesByHand", "Shard"]
