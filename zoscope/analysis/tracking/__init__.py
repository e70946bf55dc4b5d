"""Parts of ``zoscope.track``: training, measuring on the way, and the folder that a run leaves."""
