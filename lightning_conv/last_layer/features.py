"""``HeadFeatures``: the last hidden features of a training set as a linear map of the last layer, in memory or streamed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import require_features
from lightning_conv.expressivity.stream import FeatureRows, HeldRows, ScaledRows, read_rows
from lightning_conv.linalg.eigenvalues.symmetric import SAFE_EXPONENT
from lightning_conv.linalg.rounding import gamma, ldexp, require_moderate
from lightning_conv.machine.memory import allowed_memory, blocks, mebibytes
from lightning_conv.networks.precision import in_float64

WORD = 8  # bytes of a float64


def feature_rows(features: Tensor | FeatureRows) -> FeatureRows:
    """Return features as rows in float64; float32 numbers are converted exactly.

    Args:
        features: h, (n, m_H).

    Raises:
        ValueError: they are not a finite matrix.
        TypeError: they are integers.
    """
    if not isinstance(features, Tensor):
        return features
    require_features(features)
    if not features.is_floating_point():
        raise TypeError(f"features: {features.dtype}; need floating point numbers")
    return HeldRows(in_float64(features))


class HeadFeatures:
    """The rows [h_i, 1] of n samples: the linear map W -> [h, 1] W of a last layer W, (D, C).

    Features that fit into half of ``max_memory`` are held in memory. Others are computed again in strips for every pass.

    Args:
        rows: h, from ``feature_rows``.
        bias: whether the column of ones is there.
        max_memory: bytes that may be used (default a quarter of the free memory).

    Attributes:
        samples: n.
        width: m_H.
        bias: whether the column of ones is there.
        held: whether the features are in memory.
        device: that of the features, the CPU where they are streamed.
        strips: the samples of each strip, from ``cut_into_strips``.

    Raises:
        ValueError: ``max_memory`` is not a finite number of at least one byte.
    """

    def __init__(self, rows: FeatureRows, *, bias: bool, max_memory: float | None) -> None:
        self.samples, self.width, self.bias = rows.samples, rows.width, bias
        self.allowed = allowed_memory(max_memory, torch.device("cpu"))
        self.source = self._take(rows)
        self.held = isinstance(self.source, HeldRows)
        self.device = self.source.features.device if isinstance(self.source, HeldRows) else torch.device("cpu")
        self.strips = [slice(0, self.samples)]

    def _take(self, source: FeatureRows) -> FeatureRows:
        if isinstance(source, HeldRows) or 2 * WORD * self.samples * self.width > self.allowed:
            return source
        held = torch.empty(self.samples, self.width, dtype=torch.float64)
        for rows in blocks(self.samples, max(1, self.allowed // (4 * WORD * self.width))):
            held[rows] = read_rows(source, rows)
        return HeldRows(held)

    def cut_into_strips(self, outputs: int) -> None:
        """Cut streamed features into strips that fit into the memory with their outputs.

        Args:
            outputs: C.

        Raises:
            MemoryError: one row and its result do not fit.
        """
        if self.held:
            return
        fixed = WORD * self.columns * outputs * 4
        row = 2 * WORD * (self.width + 4 * outputs)
        if fixed + row > self.allowed:
            raise MemoryError(
                f"max_memory: the last layer and one row of features take {mebibytes(fixed + row)} of the allowed "
                f"{mebibytes(self.allowed)}; allow more"
            )
        self.strips = blocks(self.samples, (self.allowed - fixed) // row)

    @property
    def columns(self) -> int:
        """Number of columns of [h, 1]: D = m_H + 1, or m_H without a trained bias."""
        return self.width + self.bias

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over strips of h with their rows; this is one pass over the features."""
        for strip in self.strips:
            yield strip, self.source.features if isinstance(self.source, HeldRows) else read_rows(self.source, strip)

    def times(self, h: Tensor, w: Tensor) -> Tensor:
        """Compute [h, 1] W for m rows, without the fixed bias. Cost: 2 m D C flops."""
        # W^T h^T with a contiguous W^T, because h W with few columns is two to three times as slow.
        product = (w[: self.width].T.contiguous() @ h.T).T.contiguous()
        return product.add_(w[self.width]) if self.bias else product

    def transposed(self, h: Tensor, a: Tensor) -> Tensor:
        """Compute [h, 1]^T A for m rows. Cost: 2 m D C flops."""
        product = (a.T.contiguous() @ h).T.contiguous()  # h^T A is five times as slow
        return torch.cat([product, a.sum(0, keepdim=True)]) if self.bias else product

    def adjoint(self, a: Tensor) -> Tensor:
        """Compute [h, 1]^T A, (D, C), for A (n, C), in one pass."""
        return sum(
            (self.transposed(h, a[strip]) for strip, h in self.rows()), start=a.new_zeros(self.columns, a.shape[1])
        )

    def product(self, w: Tensor) -> Tensor:
        """Compute [h, 1] W, (n, C), without the fixed bias, in one pass."""
        return torch.cat([self.times(h, w) for _, h in self.rows()])

    @cached_property
    def row_norms(self) -> Tensor:
        """Upper bounds of |[h_i, 1]|_2, (n,), which determine the smoothness and the rounding of one sample."""
        found = []
        for strip, h in self.rows():
            exponent = math.frexp(float(h.abs().max()))[1] if h.numel() else 0
            if abs(exponent) <= SAFE_EXPONENT:
                norms = h.norm(dim=1)
                if not bool(torch.isfinite(norms).all()):
                    require_features(h, first=strip.start)
                found.append((norms.square() + self.bias).sqrt())
            else:  # the squares would vanish or overflow
                require_features(h, first=strip.start)
                found.append(torch.hypot(ldexp(ldexp(h, -exponent).norm(dim=1), exponent), h.new_tensor(self.bias)))
        return torch.cat(found) * (1 + gamma(self.columns + 4, torch.float64))

    def require_moderate(self) -> None:
        """Refuse features whose Gram matrix cannot be solved with.

        Raises:
            ValueError: they are all zero and the bias is not trained, or their products vanish or overflow.
        """
        if not bool(self.row_norms.any()):
            raise ValueError(
                "features: all zero without a trained bias, so no last layer changes the outputs; check the trunk"
            )
        require_moderate(self.row_norms, "features")

    def scaled(self) -> tuple[Self, int]:
        """Return a copy with features of moderate size and the exponent k, where these features are 2^k times the scaled ones.

        Only the features are scaled, so the copy has the singular values of 2^-k h, but another loss. Without a trained bias any
        size is brought to about 1. With one the column of ones keeps [h, 1] from being tiny.

        Raises:
            ValueError: the features are larger than 2^200 and the bias is trained.
        """
        exponent = math.frexp(float(self.row_norms.max()))[1]
        if abs(exponent) <= SAFE_EXPONENT:
            return self, 0
        if self.bias:
            raise ValueError(
                f"features: of norm up to {float(self.row_norms.max()):.1e}, whose products overflow; divide the features by a constant"
            )
        other = copy.copy(self)
        other.__dict__.pop("row_norms")
        other.source = (
            HeldRows(ldexp(self.source.features, -exponent))
            if isinstance(self.source, HeldRows)
            else ScaledRows(self.source, -exponent)
        )
        return other, exponent
