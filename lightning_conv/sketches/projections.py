r"""The random projections of the two sides of a gradient matrix: how they are drawn, how many rows they have, and their variance.

The gradient of one sample by a weight is a matrix G (out x in). Its sketch is

.. math:: S = P G Q^\top, \qquad P \in \mathbb{R}^{p \times \text{out}}, \; Q \in \mathbb{R}^{q \times \text{in}},

with independent entries :math:`\pm 1 / \sqrt{p}` and :math:`\pm 1 / \sqrt{q}`. Since :math:`E P^\top P = I` and :math:`E Q^\top Q = I`,

.. math:: E \langle S, S' \rangle = \langle G, G' \rangle .
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def sign_matrix(seed: int, label: str, rows: int, columns: int) -> Tensor:
    """Return independent random signs, (rows, columns) in int8.

    They are raw bits of the counter-based generator Philox, whose stream NumPy keeps the same on every machine and in every version
    (NEP 19). So they are made again when they are needed, and not stored.

    Args:
        seed: of the whole store.
        label: what the signs are for; each label has a stream of its own.
        rows: number of rows.
        columns: number of columns.

    Example:
        >>> sign_matrix(0, "head.weight/left", 2, 4).dtype
        torch.int8
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{label}".encode()).digest()[:16], "little")
    count = rows * columns
    words = np.random.Philox(key=key).random_raw(-(-count // 64))
    bits = np.unpackbits(np.asarray(words).astype("<u8").view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(2 * bits.astype(np.int8) - 1).reshape(rows, columns)


def relative_variance(rows: int, columns: int, kept_rows: int, kept_columns: int) -> float:
    r"""Return a bound of the variance of <S, S'> relative to |G|_F^2 |G'|_F^2, for one pair of projections.

    For normal entries the variance is exactly

    .. math::

        \frac{|G'^\top G|_F^2 + \mathrm{tr} (G'^\top G)^2}{q} + \frac{|G G'^\top|_F^2 + \mathrm{tr} (G G'^\top)^2}{p}
        + \frac{|G|_F^2 |G'|_F^2 + |G G'^\top|_F^2 + \langle G G^\top, G' G'^\top \rangle + \langle G, G' \rangle^2}{p q} ,

    from the second moments of the Wishart matrices :math:`P^\top P` and :math:`Q^\top Q`, taken one after the other. For signs every
    term is at most as large. No numerator exceeds 2, 2 and 4 times :math:`|G|_F^2 |G'|_F^2`, and both sides of a rank-one
    gradient attain this. A side that is not projected contributes nothing.

    Args:
        rows: number of rows of G, out.
        columns: number of columns of G, in.
        kept_rows: p; where it is ``rows``, the side is not projected.
        kept_columns: q; likewise.

    Example:
        >>> relative_variance(100, 100, 8, 8)
        0.5625
        >>> relative_variance(8, 100, 8, 8)
        0.25
    """
    left = 0.0 if kept_rows >= rows else 2 / kept_rows
    right = 0.0 if kept_columns >= columns else 2 / kept_columns
    return left + right + left * right


def kept_sizes(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """Return p and q with p q <= budget for which ``relative_variance`` is smallest.

    Args:
        rows: number of rows of the gradient.
        columns: its number of columns.
        budget: numbers that its sketch may have.

    Returns:
        p and q; ``rows`` and ``columns`` themselves, without a projection, where the budget allows it.

    Example:
        >>> kept_sizes(512, 512, 64), kept_sizes(10, 512, 64), kept_sizes(4, 8, 64)
        ((8, 8), (10, 6), (4, 8))
    """
    if rows * columns <= budget:
        return rows, columns
    pairs = ((kept, min(columns, budget // kept)) for kept in range(1, min(rows, budget) + 1))
    return min(pairs, key=lambda pair: relative_variance(rows, columns, *pair))
