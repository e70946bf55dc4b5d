"""Optimizers, zeroth- and first-order: directions, estimates, update rules, and replicas of a run."""

from zoscope.optim.optimizers import ZOGD, ZOGDM, ZOAdam

__all__ = ["ZOGD", "ZOGDM", "ZOAdam"]
