"""One module for each way of computing an empirical NTK that the benchmark compares, and the process that runs it."""
