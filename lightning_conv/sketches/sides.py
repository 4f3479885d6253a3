"""``Sides``: the projections of one block, and the sketches of its gradient from factors or from rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.sketches.layout import Block
from lightning_conv.sketches.projections import sign_matrix


@dataclass(frozen=True)
class Sides:
    """The projections of one block for all groups.

    Attributes:
        left: P, (G, p, out); None: this side is not projected.
        right: Q, (G, q, in); likewise.
    """

    left: Tensor | None
    right: Tensor | None

    @classmethod
    def draw(cls, block: Block, seed: int, groups: int, like: Tensor) -> Sides:
        """Draw the projections of a block, in the type and on the device of ``like``."""

        def side(which: str, kept: int, width: int) -> Tensor | None:
            if kept >= width:
                return None
            signs = sign_matrix(seed, f"{block.names[0]}/{which}", groups * kept, width)
            return torch.reshape(signs.to(like.device, like.dtype) / kept**0.5, (groups, kept, width))

        return cls(side("left", block.kept_rows, block.rows), side("right", block.kept_columns, block.columns))

    def of_groups(self, groups: slice) -> Sides:
        """Return the projections of some groups."""
        return Sides(*(None if each is None else each[groups] for each in (self.left, self.right)))


def outer_sketch(gradients: Tensor, inputs: Tensor, sides: Sides) -> Tensor:
    r"""Return :math:`\sum_r (P b_r) (Q a_r)^\top` for each sample and group, without the gradient itself.

    Args:
        gradients: b, (n, R, out).
        inputs: a, (n, R, in); one column fewer than Q where the last one belongs to a bias, whose input is 1.
        sides: P and Q.

    Returns:
        (n, G, p, q), or (n, 1, out, in) where neither side is projected.

    Cost: 2 n R G (p out + q in + p q) flops.
    """
    left = gradients[:, :, None] if sides.left is None else projected(gradients, sides.left)
    right = inputs[:, :, None] if sides.right is None else projected(inputs, sides.right)
    if left.shape[1] == 1:
        return left[:, 0, :, :, None] * right[:, 0, :, None, :]
    return left.permute(0, 2, 3, 1) @ right.transpose(1, 2)


def projected(values: Tensor, side: Tensor) -> Tensor:
    """Return (n, R, G, k) from (n, R, width) and (G, k, width)."""
    found: Tensor = torch.unflatten(values @ side.flatten(0, 1).T, -1, side.shape[:2])
    return found


def rows_sketch(rows: Tensor, sides: Sides) -> Tensor:
    """Return P G Q^T of gradients that were formed, (n, out, in): (n, G, p, q), or (n, 1, out, in) as they are."""
    found = rows[:, None]
    if sides.right is not None:
        found = projected(rows, sides.right).permute(0, 2, 1, 3)
    return found if sides.left is None else sides.left @ found
