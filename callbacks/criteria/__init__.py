"""``ConvergenceCriteria``: the inequalities of the theorems, judged during a run."""

from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria

__all__ = ["ConvergenceCriteria"]
