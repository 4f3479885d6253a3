"""``Sketches``: sketches in memory, and ``SketchedKernel``: the kernel that is estimated from them, with standard errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from lightning_conv.sketches.layout import Layout


@dataclass(frozen=True)
class Sketches:
    """The sketches of n samples, in float64.

    Attributes:
        values: (n, K).
        layout: which numbers belong to which parameters and group.
        identity: digest of the settings of the store; sketches of different stores cannot be compared.
        rounding: unit roundoff of the type in which the numbers were stored.
    """

    values: Tensor
    layout: Layout
    identity: str
    rounding: float

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class SketchedKernel:
    r"""An estimate of the kernel of per-sample gradients, :math:`K_{ij} = \langle g_i, g_j \rangle`.

    All entries come from the same projections, so their errors are not independent of each other.

    Attributes:
        matrix: the estimate, (n, m) in float64; unbiased.
        standard_error: of each entry, (n, m), from the spread of the groups; it is uncertain itself, by about
            :math:`1 / \sqrt{2 (G - 1)}`.
        groups: number G of independent pairs of projections.
        rounding: bound of the error by the storage in float16 or float32, relative to :math:`|S_i| |S_j|`, the norms of the sketches.
    """

    matrix: Tensor
    standard_error: Tensor
    groups: int
    rounding: float

    @property
    def lambda_min(self) -> NoReturn:
        """Refuse: see ``refuse_lambda_min``.

        Raises:
            ValueError: always.
        """
        refuse_lambda_min()


def refuse_lambda_min() -> NoReturn:
    """Say why the smallest eigenvalue is not estimated from sketches.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "lambda_min: not estimated from sketches, because the kernel of K numbers per sample has the eigenvalue 0 for more than K samples, "
        "and the errors of the entries move small eigenvalues by more than they are; use kernel_spectrum(ntk_gram(...)) or lambda_min_bound"
    )


def decoded(
    rows: np.ndarray[tuple[int, int], np.dtype[np.floating]], exponents: np.ndarray[tuple[int], np.dtype[np.int16]]
) -> Tensor:
    """Return sketches in float64 from the numbers on disk, (m, K), and their exponents (m,)."""
    return torch.from_numpy(np.ldexp(np.asarray(rows, np.float64), np.asarray(exponents, np.int32)[:, None]))


def group_kernels(layout: Layout, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield the kernel that each group of projections gives, (n, m); they are independent of each other given the gradients.

    Args:
        layout: of the sketches.
        x: (n, K).
        y: (m, K).
    """
    exact = x[:, : layout.exact_size] @ y[:, : layout.exact_size].T
    for number in range(layout.groups):
        group = layout.group(number)
        yield exact + x[:, group] @ y[:, group].T


def kernel_estimate(layout: Layout, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the mean of the kernels of the groups and its standard error, both (n, m).

    .. math:: \hat K = \frac1G \sum_g K_g, \qquad
        \mathrm{se}_{ij}^2 = \frac{1}{G (G - 1)} \sum_g (K_{g,ij} - \hat K_{ij})^2

    Args:
        layout: of the sketches.
        x: (n, K) in float64.
        y: (m, K).

    Cost: 2 n m K flops.
    """
    return weighted_estimate(layout, [(1.0, x, y)])


def weighted_estimate(layout: Layout, parts: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""Return the estimate of a weighted sum of kernels :math:`\sum_t w_t K_t` and its standard error, both (n, m).

    All sketches of a store have the same projections, so the errors of its checkpoints go together: the spread is that of the sums of
    the groups, and not a sum of spreads.

    Args:
        layout: of the sketches.
        parts: for each t the weight, (n, K) and (m, K) in float64.

    Cost: 2 n m K flops for each t.
    """
    _, x, y = parts[0]
    mean, squares = x.new_zeros(len(x), len(y)), x.new_zeros(len(x), len(y))
    if layout.group_size == 0:
        return sum((weight * (x @ y.T) for weight, x, y in parts), mean), squares
    weights = [weight for weight, _, _ in parts]
    groups = zip(*(group_kernels(layout, x, y) for _, x, y in parts), strict=True)
    for number, kernels in enumerate(groups, 1):
        each = sum((weight * kernel for weight, kernel in zip(weights, kernels, strict=True)), torch.zeros_like(mean))
        apart = each - mean
        mean += apart / number
        squares += apart * (each - mean)  # Welford's sum: nothing cancels
    return mean, (squares / (layout.groups * (layout.groups - 1))).sqrt_()
