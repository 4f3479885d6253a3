"""The training step, run once more on a copy of the module: which network it calls, and what it minimises."""
