"""Allen-Zhu, Li & Song 2019 in a run: separated data, hidden states around the start, semi-smoothness of the loss."""

from lightning_conv.callbacks.criteria.papers.allen_zhu.tracker import AllenZhuTracker

__all__ = ["AllenZhuTracker"]
