"""Kernels of modules whose parameters are divided among processes."""
