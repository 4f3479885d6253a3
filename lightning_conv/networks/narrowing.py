"""``Narrowing``: a place at which an evaluation in float64 is rounded to a narrower type; ``NarrowWatch`` finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.rounding import unit_roundoff


@dataclass(frozen=True)
class Narrowing:
    """A place at which an evaluation is not one in float64, or changes by more than the rounding of float64."""

    module: str  # in words: the module's name, or the backward pass
    what: str
    operator: str
    dtype: torch.dtype | None  # the narrow type; None: not known
    size: float | None = None  # the relative change, where it was measured

    @property
    def unit(self) -> float:
        """The measured change, or the unit roundoff of the narrow type; 1 where neither is known."""
        if self.size is not None:
            return self.size
        known = self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)
        return unit_roundoff(self.dtype) if known and self.dtype is not None else 1.0

    def __str__(self) -> str:
        """Return the text for messages, such as ``'norm' computes in torch.float32 (aten::_to_copy)``."""
        return f"{self.module} {self.what} ({self.operator})"


class NarrowedError(TypeError):
    """Features that were asked for in float64 are rounded to a narrower type by a cast inside the network.

    Args:
        features: the features, in float64 by their type.
        narrowing: the place of the cast.
    """

    def __init__(self, features: Tensor, narrowing: Narrowing) -> None:
        super().__init__(
            f"features: asked for in float64, but {narrowing}, so they are rounded and a rank or a bound from them would be false; "
            "remove the cast inside forward, or compute in the type of the input there"
        )
        self.features, self.narrowing = features, narrowing


def coarser(one: torch.dtype | None, other: torch.dtype | None) -> torch.dtype | None:
    """Return the floating type with the larger unit roundoff; None: neither is known."""
    known = [each for each in (one, other) if each is not None and (each.is_floating_point or each.is_complex)]
    return max(known, key=unit_roundoff, default=None)


def coarsest(found: Sequence[Narrowing | None]) -> Narrowing | None:
    """Return the finding with the coarsest type, the first of several; None: there is none."""
    return max((each for each in found if each is not None), key=lambda each: each.unit, default=None)
