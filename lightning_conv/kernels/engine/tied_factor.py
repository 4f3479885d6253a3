r"""``TiedFactor``: the factor of a table of words that is also the weight of a head, as in most language models.

With a_r and b_kr input and output gradient of the head at position r (b over the V words), w_s the word at position s and c_ks the output
gradient of the embedding there, the derivative of output k by the weight is :math:`\sum_r b_{kr} a_r^\top + \sum_s e_{w_s} c_{ks}^\top`.
It has V d numbers, and is never formed: the products of the first terms are those of a linear layer, the products of the second ones those
of an embedding, and those between the two are

.. math:: \sum_{k, r, s} b_{ikr}[w_{js}] \; (a_{ir} \cdot c_{jks}) .
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.engine.factors import Factor, OuterFactor, TokenFactor
from lightning_conv.kernels.products.precision import Precision, product, product_gamma
from lightning_conv.linalg.rounding import gamma as gamma_k

AT_ONCE = 2**21
"""Numbers of b at the words of other samples that are in memory at once."""


class TiedFactor(Factor):
    """Both uses of one weight, for kernels that are summed over the outputs.

    Args:
        linear: the factor of the head.
        words: the factor of the embedding.
    """

    def __init__(self, linear: OuterFactor, words: TokenFactor) -> None:
        super().__init__(linear.samples, linear.outputs, trace=True)
        self.linear, self.words = linear, words

    def tensors(self) -> list[Tensor]:
        """Return those of both uses."""
        return [*self.linear.tensors(), *self.words.tensors()]

    def of_tensors(self, tensors: Sequence[Tensor]) -> TiedFactor:
        """See ``Factor``."""
        own = len(self.linear.tensors())
        return TiedFactor(self.linear.of_tensors(tensors[:own]), self.words.of_tensors(tensors[own:]))

    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """See ``Factor.add_gram``."""
        assert isinstance(other, TiedFactor)
        self.linear.add_gram(other.linear, target, precision)
        self.words.add_gram(other.words, target, precision)
        for i, columns, block in self._between(other, precision):
            target[i, columns] += block
            if other is self:
                target[columns, i] += block
        if other is not self:
            for j, rows, block in other._between(self, precision):
                target[rows, j] += block

    def _between(self, other: TiedFactor, precision: Precision) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the products of one sample's head with the embeddings of some samples of ``other``."""
        positions = other.words.words.shape[1]
        step = max(1, AT_ONCE // (self.linear.positions * self.outputs * positions))
        for start in range(0, other.samples, step):
            block = slice(start, min(start + step, other.samples))
            words = other.words.words[block]
            there = words.clamp(min=0).flatten()
            present = (words >= 0).flatten()
            gradients = other._of_words(block)
            for i in range(self.samples):
                yield i, block, self._of_sample(i, there, present, gradients, len(words), precision)

    def _of_words(self, block: slice) -> Tensor:
        """Return c of some samples, (K, n S, d)."""
        found = torch.unflatten(self.words.gradients[block], 2, (self.outputs, -1))  # (n, S, K, d)
        return found.permute(2, 0, 1, 3).flatten(1, 2)

    def _of_sample(
        self, i: int, there: Tensor, present: Tensor, gradients: Tensor, samples: int, precision: Precision
    ) -> Tensor:
        """Return the sums over k, r and s for each sample, (n,)."""
        inputs = self.linear.inputs[i]  # (R, d)
        outer = torch.unflatten(self.linear.gradients[i], 1, (self.outputs, -1))  # (R, K, V)
        total = inputs.new_zeros(len(there), dtype=torch.float64)
        for k, of_output in enumerate(gradients):
            at_words = outer[:, k].index_select(1, there)  # (R, n S)
            total += (at_words * product(inputs, of_output, precision)).sum(0)
        return (total * present).view(samples, -1).sum(1)

    def gamma(self, precision: Precision) -> float:
        """Return the bound for the larger of the products, for those between the two, and for the sum of four terms."""
        inputs = self.linear.inputs
        terms = self.linear.positions * self.words.words.shape[1] * self.outputs
        between = (1 + product_gamma(inputs.shape[2], inputs.dtype, precision)) * (
            1 + gamma_k(terms + 2, torch.float64)
        )
        largest = max(self.linear.gamma(precision), self.words.gamma(precision), between - 1)
        return (1 + largest) * (1 + gamma_k(4, torch.float64)) - 1

    def magnitudes(self) -> Tensor:
        """Return the sum of those of both uses: products between them are bounded by m_i of the one times m_j of the other."""
        return self.linear.magnitudes() + self.words.magnitudes()
