"""The animals, one file for several families."""

from importlib import import_module

from case import CASES

FILES = (
    "batches",
    "calls",
    "several_calls",
    "shapes",
    "ragged",
    "generative",
    "seq2seq",
    "optimizers",
    "feeds",
    "generators",
    "losses",
    "own_losses",
    "layers",
    "side_effects",
    "options",
    "demos",
    "vision",
    "language",
)

for each in FILES:
    import_module(f"cases.{each}")

__all__ = ["CASES"]
