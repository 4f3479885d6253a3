"""Eigenvalues of symmetric matrices and operators, each with bounds and the name of the method that gives them."""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = ["Bounded", "RitzBounds", "largest_eigenvalue", "ritz_bounds", "smallest_eigenvalue"]

if TYPE_CHECKING:
    from lightning_conv.linalg.eigenvalues.bounded import Bounded
    from lightning_conv.linalg.eigenvalues.largest import largest_eigenvalue
    from lightning_conv.linalg.eigenvalues.ritz import RitzBounds, ritz_bounds
    from lightning_conv.linalg.eigenvalues.smallest import smallest_eigenvalue
else:
    __getattr__, __dir__ = lazy(__name__)
