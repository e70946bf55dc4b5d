"""Stability theory of first- and zeroth-order optimizers: numpy and scipy only, no torch."""
