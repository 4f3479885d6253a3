"""The samples of a run, read without touching it."""
