"""Eigenvalues of symmetric matrices and operators, each with bounds and the name of the method that gives them."""

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.largest import largest_eigenvalue
from lightning_conv.linalg.eigenvalues.ritz import RitzBounds, ritz_bounds
from lightning_conv.linalg.eigenvalues.smallest import smallest_eigenvalue

__all__ = ["Bounded", "RitzBounds", "largest_eigenvalue", "ritz_bounds", "smallest_eigenvalue"]
