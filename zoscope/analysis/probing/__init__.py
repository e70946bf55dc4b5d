"""The parts of ``zoscope.probe``: what is asked, what is predicted, the runs, the edge, the result."""
