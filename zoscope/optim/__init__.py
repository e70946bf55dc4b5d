"""Optimizers, zeroth- and first-order: directions, estimates, update rules, and replicas of a run."""

from zoscope.optim.optimizers import *  # noqa: F403 - the optimizers for users' own loops, by its __all__
