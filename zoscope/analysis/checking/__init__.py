"""The parts of ``zoscope.check``: thresholds, the gate, the baseline and the cache."""
