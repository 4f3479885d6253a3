"""One module per method of computing an empirical NTK that the benchmark compares, and the process that runs it."""
