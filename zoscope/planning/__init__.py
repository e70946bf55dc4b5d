"""Which step size for a planned run: the run is rehearsed, coarsely or as it is, and step sizes are searched."""
