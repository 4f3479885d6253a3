"""``FlatWeights``: named weights as one vector, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatWeights:
    """Order in which named tensors make up a vector x of P numbers."""

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> FlatWeights:
        """Return the correspondence for these tensors, in their order."""
        return cls({name: value.shape for name, value in weights.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights, in order."""
        return tuple(self.shapes)

    @property
    def size(self) -> int:
        """Number P of weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return x, (P,), from the tensors by name."""
        return torch.cat([weights[name].flatten() for name in self.shapes])

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """Return the tensors by name, as views of x."""
        parts = torch.split(x, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
