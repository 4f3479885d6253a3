"""Convergence theorems, one module or folder per paper."""
