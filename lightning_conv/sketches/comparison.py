r"""Alignment and drift of the kernels of two checkpoints, from the products of the kernels of different groups.

With :math:`K^g` the estimate of a kernel K from group g alone, and independent groups, :math:`E \langle K^g, M^h \rangle_F = \langle K, M
\rangle_F` for :math:`g \ne h`, while the product of one group with itself is too large by its variance. So

.. math:: U(K, M) = \frac{1}{G (G - 1)} \sum_{g \ne h} \langle K^g, M^h \rangle_F

is unbiased. Standard errors of functions of such numbers are by the jackknife, which leaves out one group at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.estimates import Estimate
from lightning_conv.machine.memory import blocks
from lightning_conv.sketches.estimates import group_kernels
from lightning_conv.sketches.layout import Layout

TILE = 256
"""Rows and columns of the kernels that are formed at once."""


@dataclass(frozen=True)
class Products:
    """Frobenius products of the kernels of all pairs of groups, (G, G), at two checkpoints a and b."""

    aa: Tensor
    ab: Tensor
    bb: Tensor

    def without(self, group: int) -> Products:
        """Return the products without one group."""
        kept = [each for each in range(len(self.aa)) if each != group]
        return Products(*(each[kept][:, kept] for each in (self.aa, self.ab, self.bb)))

    def means(self) -> tuple[float, float, float]:
        """Return U(a, a), U(a, b) and U(b, b)."""
        count = len(self.aa)
        return tuple(float(each.sum() - each.trace()) / (count * (count - 1)) for each in (self.aa, self.ab, self.bb))  # type: ignore[return-value]


def products_of(layout: Layout, samples: int, read: Callable[[str, slice], Tensor], *, centred: bool) -> Products:
    """Compute the products of the kernels of all pairs of groups, tile by tile.

    Args:
        layout: of the sketches.
        samples: number n of samples at both checkpoints.
        read: returns the sketches of ``"a"`` or ``"b"`` of some samples, in float64.
        centred: whether the kernels are centred, H K H with H = I - 11^T / n.

    Cost: 2 n^2 (K + 2 G^2) flops, n / 256 readings of both checkpoints, and the memory of 2 G tiles.
    """
    zero = torch.zeros(layout.size, dtype=torch.float64)
    means = {"a": zero, "b": zero}
    if centred:
        # To centre a kernel X X^T is to subtract the mean row from X.
        for which in means:
            total = sum((read(which, rows).sum(0) for rows in blocks(samples, TILE)), zero)
            means[which] = total / samples
    found = {pair: torch.zeros(layout.groups, layout.groups, dtype=torch.float64) for pair in ("aa", "ab", "bb")}
    tiles = blocks(samples, TILE)
    for first, rows in enumerate(tiles):
        left = {which: read(which, rows) - means[which] for which in means}
        for columns in tiles[first:]:
            own = columns == rows
            kernels = {}
            for which in means:
                right = left[which] if own else read(which, columns) - means[which]
                kernels[which] = torch.stack([each.flatten() for each in group_kernels(layout, left[which], right)])
            for pair, total in found.items():
                total += (1 if own else 2) * kernels[pair[0]] @ kernels[pair[1]].T
    return Products(**found)


def alignment_of(products: Products) -> Estimate:
    """Return U(a, b) / sqrt(U(a, a) U(b, b)); NaN where a kernel is zero as far as the groups tell."""
    value = _alignment(products)
    return Estimate(value, _jackknife(products, _alignment), len(products.aa), "different groups of projections")


def drift_of(products: Products) -> Estimate:
    """Return |K_a - K_b|_F / |K_b|_F, the root of an estimate of its square; 0 where that is negative."""
    square, error = _squared_drift(products), _jackknife(products, _squared_drift)
    value = math.sqrt(max(square, 0.0)) if square == square else math.nan
    # By the delta method; near zero the root of the error of the square is what the value may be.
    error = error / (2 * value) if value**2 > error else math.sqrt(error) if error == error else math.nan
    return Estimate(value, error, len(products.aa), "root of a square from different groups of projections")


def _alignment(products: Products) -> float:
    aa, ab, bb = products.means()
    return ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else math.nan


def _squared_drift(products: Products) -> float:
    aa, ab, bb = products.means()
    return (aa - 2 * ab + bb) / bb if bb > 0 else math.nan


def _jackknife(products: Products, function: Callable[[Products], float]) -> float:
    count = len(products.aa)
    values = torch.tensor([function(products.without(group)) for group in range(count)], dtype=torch.float64)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt())
