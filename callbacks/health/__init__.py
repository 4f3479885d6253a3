"""``ConvergenceHealth``: what a run is doing, in sentences."""
