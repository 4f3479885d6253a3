"""Sketches of per-sample gradients on disk: random projections from which kernels and influences are estimated."""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = ["Neighbours", "SketchStore", "SketchedKernel", "Sketches"]

if TYPE_CHECKING:
    from lightning_conv.sketches.estimates import SketchedKernel, Sketches
    from lightning_conv.sketches.neighbours import Neighbours
    from lightning_conv.sketches.store import SketchStore
else:
    __getattr__, __dir__ = lazy(__name__)
