"""``Factor``: what is kept of the samples for one site, and the Gram blocks that follow from it.

A site is a layer at one place of the forward. a_ir is its input at position r of sample i (A collects them), and b_ikr the
gradient of output k with respect to its output there (B). There are three forms:

- rows           g_ik = du_ik/dtheta as it is:        G[(i,k),(j,l)] = g_ik . g_jl
- outer products g_ik = sum_r b_ikr a_ir^T:           G[(i,k),(j,l)] = sum_rs (a_ir . a_js) (b_ikr . b_jls)
  (one position: the Hadamard rule; several: the patch Gram)
- tokens         the same with a one-hot: a_ir . a_js = [the words at r and s are the same]

Each form adds its blocks to a float64 matrix in tiles that stay in the cache, and bounds their rounding errors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.planning.sizes import TILE
from lightning_conv.kernels.products.precision import Precision, product, product_gamma
from lightning_conv.linalg.rounding import gamma as gamma_k


class Factor(ABC):
    """The part of the Jacobian that belongs to one site and a block of samples, in a form that gives Gram blocks.

    Args:
        samples: n, the number of samples in the block.
        outputs: K, the number of outputs.
        trace: whether the K outputs are summed over (n rows) or kept apart (n K rows).
    """

    def __init__(self, samples: int, outputs: int, *, trace: bool) -> None:
        self.samples, self.outputs, self.trace = samples, outputs, trace

    @property
    def stride(self) -> int:
        """Rows of the kernel per sample."""
        return 1 if self.trace else self.outputs

    @abstractmethod
    def gamma(self, precision: Precision) -> float:
        """Return a bound on the rounding error of entry (i, j) of the block, relative to m_i m_j of ``magnitudes``."""

    @abstractmethod
    def magnitudes(self) -> Tensor:
        """Return m, (n,) or (n K,) in float64, where m_i m_j bounds the products of entry (i, j) in absolute value."""

    @property
    def tight(self) -> bool:
        """Whether m_i^2 is the diagonal itself."""
        return False

    def size(self, diagonal: float | None, precision: Precision, scales: Tensor | None = None) -> float:
        """Return a bound of |m|^2, from the computed ``diagonal`` (the sum of m_i^2 up to rounding) where ``tight``.

        With ``scales`` d the entries of the kernel are multiplied by d_i d_j, and m_i d_i takes the place of m_i.
        """
        if self.tight and diagonal is not None:
            rounding = self.gamma(precision)
            return diagonal / (1 - rounding) if rounding < 1 else float("inf")
        sizes = self.magnitudes() if scales is None else self.magnitudes() * scales
        return float(sizes.square().sum())

    @abstractmethod
    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """Add the Gram block of all samples to ``target``.

        If ``other`` is this factor itself, only tiles on and above the diagonal need to be added.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return what another process needs of it, with the samples along ``sample_axis``."""

    @abstractmethod
    def of_tensors(self, tensors: Sequence[Tensor]) -> Factor:
        """Return a factor of the same site on other samples, from its ``tensors``."""

    @property
    def sample_axis(self) -> int:
        """Dimension of the samples in ``tensors``."""
        return 0

    def part(self, samples: slice) -> Factor:
        """Return the factor of some of the samples."""
        axis = self.sample_axis
        return self.of_tensors(
            [each.narrow(axis, samples.start, samples.stop - samples.start) for each in self.tensors()]
        )


class TiledFactor(Factor):
    """A factor whose Gram block is the same function of any two ranges of samples, and is added tile by tile."""

    @property
    def rows_per_sample(self) -> int:
        """Rows of the products per sample."""
        return self.stride

    @abstractmethod
    def block(self, mine: slice, other: Factor, theirs: slice, precision: Precision) -> Tensor:
        """Return the Gram block of two ranges of samples in float64."""

    def tiles(self) -> Iterator[slice]:
        """Yield ranges of samples whose products have about ``TILE`` rows."""
        step = max(1, TILE // self.rows_per_sample)
        for start in range(0, self.samples, step):
            yield slice(start, min(start + step, self.samples))

    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """See ``Factor.add_gram``."""
        assert isinstance(other, TiledFactor)
        own = other is self
        for mine in self.tiles():
            for theirs in other.tiles():
                if own and theirs.start < mine.start:
                    continue
                rows = slice(mine.start * self.stride, mine.stop * self.stride)
                columns = slice(theirs.start * self.stride, theirs.stop * self.stride)
                target[rows, columns] += self.block(mine, other, theirs, precision)


class RowsFactor(TiledFactor):
    """Per-sample derivatives, in contiguous pieces.

    Args:
        rows: for the trace any number of pieces (n, k, P) that together have all outputs; otherwise one piece (K, n,
            P), so that the rows of an output are contiguous.
        trace: see ``Factor``.
    """

    def __init__(self, rows: Sequence[Tensor], *, trace: bool) -> None:
        outputs = sum(piece.shape[1] for piece in rows) if trace else rows[0].shape[0]
        super().__init__(rows[0].shape[0 if trace else 1], outputs, trace=trace)
        self.rows = tuple(rows)

    @property
    def tight(self) -> bool:
        """True, since m_i = |g_i|."""
        return True

    @property
    def sample_axis(self) -> int:
        """See ``Factor``: pieces (n, k, P) for the trace, else (K, n, P)."""
        return 0 if self.trace else 1

    def tensors(self) -> list[Tensor]:
        """Return the pieces."""
        return list(self.rows)

    def of_tensors(self, tensors: Sequence[Tensor]) -> RowsFactor:
        """See ``Factor``."""
        return RowsFactor(tensors, trace=self.trace)

    def block(self, mine: slice, other: Factor, theirs: slice, precision: Precision) -> Tensor:
        """Return g_i . g_j summed over the outputs; kernels that keep outputs apart use ``add_gram`` only."""
        assert isinstance(other, RowsFactor)
        assert self.trace
        total: Tensor | None = None
        for left, right in zip(self.rows, other.rows, strict=True):
            part = product(left[mine].flatten(1), right[theirs].flatten(1), precision)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """Add the Gram block; see ``Factor.add_gram``.

        If outputs are kept apart, both triangles are written, since rows come outputs first.
        """
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
        """Yield ranges of about ``TILE`` contiguous rows: several outputs, or some samples of one output."""
        outputs, samples = max(1, TILE // self.samples), min(self.samples, TILE)
        for first in range(0, self.outputs, outputs):
            for start in range(0, self.samples, samples):
                yield slice(first, first + outputs), slice(start, start + samples)

    def gamma(self, precision: Precision) -> float:
        """Return the bound for scalar products of length k P and for their sum over the pieces."""
        piece = self.rows[0]
        terms = piece.shape[2] * (max(each.shape[1] for each in self.rows) if self.trace else 1)
        of_products = product_gamma(terms, piece.dtype, precision)
        return (1 + of_products) * (1 + gamma_k(len(self.rows), torch.float64)) - 1

    def magnitudes(self) -> Tensor:
        """Return |g_i|."""
        if not self.trace:
            return norms_from_above(self.rows[0]).T.flatten()
        return torch.stack([norms_from_above(piece.flatten(1)) for piece in self.rows]).square().sum(0).sqrt()


class OuterFactor(TiledFactor):
    """The inputs A and the output gradients B of a layer that is linear in patches, positions or plain inputs."""

    def __init__(self, inputs: Tensor, gradients: Tensor, outputs: int, *, bias: bool, trace: bool) -> None:
        super().__init__(inputs.shape[0], outputs, trace=trace)
        self.inputs = inputs  # A: (n, R, in)
        self.gradients = gradients  # B: (n, R, K out) for the trace, else (n, K, R, out)
        self.bias = bias  # whether there is a bias, which acts as a weight on an input of 1

    @property
    def positions(self) -> int:
        """Number R of positions."""
        return self.inputs.shape[1]

    @property
    def rows_per_sample(self) -> int:
        """R for the trace, else K R."""
        return self.positions * self.stride

    @property
    def tight(self) -> bool:
        """True for one position, where m_i = |a_i| |b_i|."""
        return self.positions == 1

    def tensors(self) -> list[Tensor]:
        """Return A and B."""
        return [self.inputs, self.gradients]

    def of_tensors(self, tensors: Sequence[Tensor]) -> OuterFactor:
        """See ``Factor``."""
        return OuterFactor(tensors[0], tensors[1], self.outputs, bias=self.bias, trace=self.trace)

    def overlap(self, mine: slice, other: OuterFactor, theirs: slice, precision: Precision) -> Tensor:
        """Return a_ir . a_js, plus 1 for a bias, (n R, n' R)."""
        found = product(self.inputs[mine].flatten(0, 1), other.inputs[theirs].flatten(0, 1), precision)
        return found.add_(1) if self.bias else found

    def block(self, mine: slice, other: Factor, theirs: slice, precision: Precision) -> Tensor:
        """Return the products of A times the products of B, summed over pairs of positions."""
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
        """Return the bound for two scalar products, the added 1, their product and the sum over R^2 pairs."""
        terms = self.gradients.shape[-1]
        of_gradients = product_gamma(terms, self.gradients.dtype, precision)
        of_inputs = product_gamma(self.inputs.shape[2], self.inputs.dtype, precision)
        of_sums = gamma_k(2 + self.positions**2, torch.float64)
        return (1 + of_gradients) * (1 + of_inputs) * (1 + of_sums) - 1

    def magnitudes(self) -> Tensor:
        """Return sum_r |a_ir| |b_ikr|, which bounds |g_ik| even if positions cancel; for the trace its norm over k."""
        sizes = norms_from_above(self._by_output())  # (n, K, R)
        each = (sizes * self._input_norms()[:, None]).sum(2)
        return each.square().sum(1).sqrt() if self.trace else each.flatten()

    def _input_norms(self) -> Tensor:
        """Return |a_ir|, (n, R), where a bias adds an input of 1."""
        inputs = norms_from_above(self.inputs)
        return torch.sqrt(inputs**2 + 1) if self.bias else inputs

    def _by_output(self) -> Tensor:
        """Return B as (n, K, R, out)."""
        return torch.unflatten(self.gradients, 2, (self.outputs, -1)).transpose(1, 2) if self.trace else self.gradients


def norms_from_above(values: Tensor) -> Tensor:
    """Return float64 upper bounds of the norms along the last dimension: computed norms plus their rounding."""
    slack = gamma_k(values.shape[-1] + 4, values.dtype)
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.double() * (1 + slack)


class TokenFactor(OuterFactor):
    """Factor of an embedding, whose one-hot A is stored as words."""

    def __init__(self, words: Tensor, gradients: Tensor, outputs: int, *, trace: bool) -> None:
        # The overlap of words is exact, so the inputs have no rounding; an embedding has no bias.
        super().__init__(words[:, :, None], gradients, outputs, bias=False, trace=trace)
        self.words = words  # (n, R), -1: padding

    def tensors(self) -> list[Tensor]:
        """Return the words and B."""
        return [self.words, self.gradients]

    def of_tensors(self, tensors: Sequence[Tensor]) -> TokenFactor:
        """See ``Factor``."""
        return TokenFactor(tensors[0], tensors[1], self.outputs, trace=self.trace)

    def overlap(self, mine: slice, other: OuterFactor, theirs: slice, precision: Precision) -> Tensor:
        """Return 1 where both positions have the same word, and 0 elsewhere and at padding."""
        del precision
        assert isinstance(other, TokenFactor)
        left, right = self.words[mine].flatten(), other.words[theirs].flatten()
        return ((left[:, None] == right[None]) & (left[:, None] >= 0)).double()

    def gamma(self, precision: Precision) -> float:
        """Return the bound for one scalar product and the sum over pairs."""
        terms = self.gradients.shape[-1]
        of_sums = gamma_k(self.positions**2, torch.float64)
        return (1 + product_gamma(terms, self.gradients.dtype, precision)) * (1 + of_sums) - 1

    def _input_norms(self) -> Tensor:
        """Return 1 at the positions that have a word, and 0 at padding."""
        return self.words >= 0
