"""What is kept of the samples for one site, and the Gram blocks that follow from it.

Three forms, with (i, k) sample and output, r and s positions:

- rows           g_ik = du_ik/dtheta as it is:        G[(i,k),(j,l)] = g_ik . g_jl
- outer products g_ik = sum_r b_ikr a_ir^T:           G[(i,k),(j,l)] = sum_rs (a_ir . a_js) (b_ikr . b_jls)
  (one position: the Hadamard rule; several: the patch Gram)
- tokens         the same with a one-hot: a_ir . a_js = [the words at r and s are the same]

Every form adds its blocks to a float64 matrix tile by tile, small enough to stay in a cache, and bounds their rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.products.precision import Precision, product, product_gamma
from lightning_conv.linalg.rounding import gamma as gamma_k

TILE = 256
"""Rows of a tile of products: large enough for the rate of a matrix product, small enough for the symmetric half of a few
hundred samples to be left out."""


class Factor(ABC):
    """One site's part of the Jacobian of a block of samples, in a form that gives Gram blocks.

    Args:
        samples: n, rows of the block.
        outputs: K.
        trace: whether the K outputs are summed over (rows n) or kept apart (rows n K).
    """

    def __init__(self, samples: int, outputs: int, *, trace: bool) -> None:
        self.samples, self.outputs, self.trace = samples, outputs, trace

    @property
    def stride(self) -> int:
        """Rows of the kernel for one sample."""
        return 1 if self.trace else self.outputs

    @property
    @abstractmethod
    def rows_per_sample(self) -> int:
        """Rows of the products for one sample."""

    @abstractmethod
    def block(self, mine: slice, other: Factor, theirs: slice, precision: Precision) -> Tensor:
        """The Gram block of two ranges of samples, float64."""

    @abstractmethod
    def gamma(self, precision: Precision) -> float:
        """Relative rounding of an entry (i, j) of ``block``, with respect to m_i m_j of ``magnitudes``."""

    @abstractmethod
    def magnitudes(self) -> Tensor:
        """m: (n,) or (n K,), float64, with |exact products of absolute values| <= m_i m_j in every entry."""

    @property
    def tight(self) -> bool:
        """Whether m_i^2 is the diagonal itself."""
        return False

    def size(self, diagonal: float | None, precision: Precision) -> float:
        """|m|^2, from the computed diagonal of the block with itself where that is it (it errs by gamma itself)."""
        if self.tight and diagonal is not None:
            rounding = self.gamma(precision)
            return diagonal / (1 - rounding) if rounding < 1 else float("inf")
        return float(self.magnitudes().square().sum())

    def tiles(self) -> Iterator[slice]:
        """Ranges of samples whose products have about ``TILE`` rows."""
        step = max(1, TILE // self.rows_per_sample)
        for start in range(0, self.samples, step):
            yield slice(start, min(start + step, self.samples))

    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """target += the Gram block of all samples; of a block with itself only tiles on and above the diagonal."""
        own = other is self
        for mine in self.tiles():
            for theirs in other.tiles():
                if own and theirs.start < mine.start:
                    continue
                rows = slice(mine.start * self.stride, mine.stop * self.stride)
                columns = slice(theirs.start * self.stride, theirs.stop * self.stride)
                target[rows, columns] += self.block(mine, other, theirs, precision)


class RowsFactor(Factor):
    """Per-sample derivatives, every piece of them contiguous.

    Args:
        rows: for the trace, the outputs in any number of pieces (n, k, P); otherwise one of (K, n, P), the outputs first,
            so that what belongs to one output lies together.
        trace: see ``Factor``.
    """

    def __init__(self, rows: Sequence[Tensor], *, trace: bool) -> None:
        outputs = sum(piece.shape[1] for piece in rows) if trace else rows[0].shape[0]
        super().__init__(rows[0].shape[0 if trace else 1], outputs, trace=trace)
        self.rows = tuple(rows)

    @property
    def rows_per_sample(self) -> int:
        """One, or K."""
        return self.stride

    @property
    def tight(self) -> bool:
        """Yes: |g_i|^2."""
        return True

    def block(self, mine: slice, other: Factor, theirs: slice, precision: Precision) -> Tensor:
        """g_i . g_j, summed over the outputs; of kernels that keep them apart ``add_gram`` does all."""
        assert isinstance(other, RowsFactor)
        assert self.trace
        total: Tensor | None = None
        for left, right in zip(self.rows, other.rows, strict=True):
            part = product(left[mine].flatten(1), right[theirs].flatten(1), precision)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """See ``Factor.add_gram``. Where outputs are kept apart, both triangles are written: rows come outputs first."""
        if self.trace:
            super().add_gram(other, target, precision)
            return
        assert isinstance(other, RowsFactor)
        k = self.outputs
        by_output = target.unflatten(0, (self.samples, k)).unflatten(2, (other.samples, k))  # type: ignore[no-untyped-call]
        mine, theirs = list(self._output_tiles()), list(other._output_tiles())
        for number, (outputs, samples) in enumerate(mine):
            left = self.rows[0][outputs, samples]
            for second, (other_outputs, other_samples) in enumerate(theirs):
                if other is self and second < number:
                    continue
                right = other.rows[0][other_outputs, other_samples]
                part = product(left.flatten(0, 1), right.flatten(0, 1), precision)
                part = part.view(*left.shape[:2], *right.shape[:2])  # (k, i, l, j)
                by_output[samples, outputs, other_samples, other_outputs] += part.permute(1, 0, 3, 2)
                if other is self and second > number:
                    by_output[other_samples, other_outputs, samples, outputs] += part.permute(3, 2, 1, 0)

    def _output_tiles(self) -> Iterator[tuple[slice, slice]]:
        """Contiguous ranges of about ``TILE`` rows: several outputs of all samples, or some samples of one output."""
        outputs, samples = max(1, TILE // self.samples), min(self.samples, TILE)
        for first in range(0, self.outputs, outputs):
            for start in range(0, self.samples, samples):
                yield slice(first, first + outputs), slice(start, start + samples)

    def gamma(self, precision: Precision) -> float:
        """Of scalar products of length k P, and of their sum over the pieces."""
        piece = self.rows[0]
        terms = piece.shape[2] * (max(each.shape[1] for each in self.rows) if self.trace else 1)
        of_products = product_gamma(terms, piece.dtype, precision)
        return (1 + of_products) * (1 + gamma_k(len(self.rows), torch.float64)) - 1

    def magnitudes(self) -> Tensor:
        """|g_i|."""
        if not self.trace:
            return norms_from_above(self.rows[0]).T.flatten()
        return torch.stack([norms_from_above(piece.flatten(1)) for piece in self.rows]).square().sum(0).sqrt()


class OuterFactor(Factor):
    """A and B of a layer that is linear in patches, positions or plain inputs."""

    def __init__(self, inputs: Tensor, gradients: Tensor, outputs: int, *, bias: bool, trace: bool) -> None:
        super().__init__(inputs.shape[0], outputs, trace=trace)
        self.inputs = inputs  # A: (n, R, in)
        self.gradients = gradients  # B: (n, R, K out) for the trace, else (n, K, R, out)
        self.bias = bias  # whether a bias comes along: an input that is always 1

    @property
    def positions(self) -> int:
        """R."""
        return self.inputs.shape[1]

    @property
    def rows_per_sample(self) -> int:
        """R, or K R."""
        return self.positions * self.stride

    @property
    def tight(self) -> bool:
        """With one position: |a|^2 |b|^2."""
        return self.positions == 1

    def overlap(self, mine: slice, other: OuterFactor, theirs: slice, precision: Precision) -> Tensor:
        """a_ir . a_js, and 1 for the bias, (n R, n' R)."""
        found = product(self.inputs[mine].flatten(0, 1), other.inputs[theirs].flatten(0, 1), precision)
        return found.add_(1) if self.bias else found

    def block(self, mine: slice, other: Factor, theirs: slice, precision: Precision) -> Tensor:
        """Products of A times products of B, summed over pairs of positions."""
        assert isinstance(other, OuterFactor)
        left, right = self.gradients[mine], other.gradients[theirs]
        pairs = product(left.flatten(0, -2), right.flatten(0, -2), precision)
        overlap = self.overlap(mine, other, theirs, precision)
        here, there = self.positions, other.positions
        if self.trace:
            pairs *= overlap
            if here == there == 1:
                return pairs
            return pairs.view(len(left), here, len(right), there).sum((1, 3))
        k = self.outputs
        pairs = pairs.view(len(left), k, here, len(right), k, there)
        pairs *= overlap.view(len(left), 1, here, len(right), 1, there)
        return pairs.sum((2, 5)).view(len(left) * k, len(right) * k)

    def gamma(self, precision: Precision) -> float:
        """Of two scalar products, their product, the bias's 1 and the sum over R^2 pairs."""
        terms = self.gradients.shape[-1]
        of_gradients = product_gamma(terms, self.gradients.dtype, precision)
        of_inputs = product_gamma(self.inputs.shape[2], self.inputs.dtype, precision)
        of_sums = gamma_k(2 + self.positions**2, torch.float64)
        return (1 + of_gradients) * (1 + of_inputs) * (1 + of_sums) - 1

    def magnitudes(self) -> Tensor:
        """sum_r |a_ir| |b_ikr|, a bound of |g_ik| that also covers positions that cancel; over k: its norm."""
        inputs = norms_from_above(self.inputs)
        if self.bias:
            inputs = torch.sqrt(inputs**2 + 1)
        sizes = norms_from_above(self._by_output())  # (n, K, R)
        each = (sizes * inputs[:, None]).sum(2)
        return each.square().sum(1).sqrt() if self.trace else each.flatten()

    def _by_output(self) -> Tensor:
        """B as (n, K, R, out)."""
        return torch.unflatten(self.gradients, 2, (self.outputs, -1)).transpose(1, 2) if self.trace else self.gradients


def norms_from_above(values: Tensor) -> Tensor:
    """Norms along the last dimension, float64, not below the true ones: computed in the type at hand, and its rounding added."""
    slack = gamma_k(values.shape[-1] + 4, values.dtype)
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.double() * (1 + slack)


class TokenFactor(OuterFactor):
    """An embedding: A is one-hot, known by its words."""

    def __init__(self, words: Tensor, gradients: Tensor, outputs: int, *, trace: bool) -> None:
        # An overlap of words is exact: the inputs carry no rounding and no bias.
        super().__init__(words[:, :, None], gradients, outputs, bias=False, trace=trace)
        self.words = words  # (n, R), -1: padding

    def overlap(self, mine: slice, other: OuterFactor, theirs: slice, precision: Precision) -> Tensor:
        """1 where both positions hold the same word, 0 elsewhere and at padding."""
        del precision
        assert isinstance(other, TokenFactor)
        left, right = self.words[mine].flatten(), other.words[theirs].flatten()
        return ((left[:, None] == right[None]) & (left[:, None] >= 0)).double()

    def gamma(self, precision: Precision) -> float:
        """Of one scalar product and the sum over pairs."""
        terms = self.gradients.shape[-1]
        of_sums = gamma_k(self.positions**2, torch.float64)
        return (1 + product_gamma(terms, self.gradients.dtype, precision)) * (1 + of_sums) - 1

    def magnitudes(self) -> Tensor:
        """sum_r |b_ikr| over the positions that hold a word."""
        sizes = norms_from_above(self._by_output())
        each = (sizes * (self.words >= 0)[:, None]).sum(2)
        return each.square().sum(1).sqrt() if self.trace else each.flatten()
