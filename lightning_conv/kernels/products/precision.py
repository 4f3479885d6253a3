"""Matrix products that are summed in float64, and proven bounds on their rounding errors (see ``linalg.rounding``)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.linalg.rounding import gamma
from lightning_conv.machine.gemm import calibrated, gemm_for

Precision: TypeAlias = Literal["fast", "exact", "certified"]
PRECISIONS: tuple[Precision, ...] = ("fast", "exact", "certified")

BLOCK = 512
"""Length of the float32 partial sums of ``"fast"``: long enough for the full rate of a matrix product, short enough for
a small gamma."""

DOUBLE_BLOCK = 4096
"""Number of columns that ``"exact"`` converts to float64 at a time, which avoids a float64 copy of a whole factor."""


def product(x: Tensor, y: Tensor, precision: Precision) -> Tensor:
    """Return x y^T in float64, for x (p, k) and y (q, k) of one dtype.

    ``"fast"`` multiplies blocks of 512 columns in the dtype of the factors and sums them in float64. The other
    precisions do everything in float64. The rounding error of entry (i, j) is at most ``product_gamma(k) * |x_i| *
    |y_j|``.

    Cost: 2 p q k flops.
    """
    if precision == "fast" and x.dtype != torch.float64:
        gemm = gemm_for(x)
        columns = x.shape[1]
        total = gemm(x[:, :BLOCK], y[:, :BLOCK]).double()
        for start in range(BLOCK, columns, BLOCK):
            total += gemm(x[:, start : start + BLOCK], y[:, start : start + BLOCK])
        return total
    if x.dtype == torch.float64:
        return x @ y.T
    total = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], DOUBLE_BLOCK):
        block = slice(start, start + DOUBLE_BLOCK)
        total.addmm_(x[:, block].double(), y[:, block].double().T)
    return total


def product_gamma(terms: int, dtype: torch.dtype, precision: Precision) -> float:
    """Return the error bound of an entry of ``product`` with ``terms`` columns, relative to |x_i||y_j|."""
    if precision != "fast" or dtype == torch.float64:
        return gamma(terms + 1, torch.float64)  # + 1: the accumulator begins with a zero
    short = gamma(min(terms, BLOCK), dtype)
    blocks = -(-terms // BLOCK)
    return short + (1 + short) * gamma(blocks, torch.float64)


def product_rate(device: torch.device, precision: Precision) -> float:
    """Return the flops per second of a product of matrices in the type of a kernel's passes.

    Args:
        device: where.
        precision: of the kernel.
    """
    dtype = torch.float64 if precision == "certified" else torch.float32
    return calibrated(device.type, dtype, torch.get_num_threads())[1]
