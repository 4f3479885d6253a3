"""Du et al. 2019 in a run: the kernel and the weights against their start and the limit, and the linearisation of the steps."""

from lightning_conv.callbacks.criteria.papers.du.tracker import DuTracker

__all__ = ["DuTracker"]
