"""``FormedFactor``: per-sample gradients that are formed while they are multiplied, and not kept.

If a layer has many parameters and few positions, A and B are far smaller than the gradients that are formed from them.
The gradients are formed in a workspace that stays in the cache and is reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.engine.factors import Factor, RowsFactor
from lightning_conv.kernels.products.precision import Precision, product_gamma
from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sites import Site, own_arguments, site_inputs
from lightning_conv.linalg.rounding import gamma as gamma_k


class Workspace:
    """Memory for the gradients that are being multiplied, which is allocated once and reused.

    Args:
        limit: number of bytes that a piece should not exceed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pieces: dict[tuple[int, torch.dtype], Tensor] = {}

    def piece(self, number: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a tensor of ``shape`` with arbitrary contents; it overwrites the last piece of the same ``number``."""
        size = int(torch.Size(shape).numel())
        key = number, like.dtype
        if key not in self._pieces or self._pieces[key].numel() < size:
            self._pieces[key] = like.new_empty(size)
        return self._pieces[key][:size].view(*shape)


@dataclass(frozen=True)
class Piece:
    """The calls of a site on one tile of samples; with ``own`` that of other samples, or with ``given`` their A, (t, R, in)."""

    rows: slice
    calls: Mapping[int, LayerCall]
    own: Sequence[Tensor] | None = None
    given: Tensor | None = None

    @property
    def count(self) -> int:
        """The number t of samples."""
        return int(self.rows.stop - self.rows.start)

    def inputs(self, site: Site) -> Tensor:
        """Return A, (t, R, in)."""
        return site_inputs(site, self.calls, self.count, self.own)[:, :, 0] if self.given is None else self.given

    def arguments(self, site: Site) -> Sequence[Tensor]:
        """Return the arguments from which A follows, (t, ...) each."""
        return own_arguments(site, self.calls, self.count) if self.own is None else self.own


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))


class FormedFactor(Factor):
    """Factor that keeps the recorded calls (for A) and B, and forms the gradients B^T A by blocks of output channels.

    Args:
        site: the site that the factor belongs to: a weight of outer products with one group.
        pieces: the recorded calls, tile by tile.
        gradients: B, (n, R, K, out) for the trace, else (n, K, R, out).
        workspace: memory in which gradients are formed.
        trace: see ``Factor``.
    """

    def __init__(
        self, site: Site, pieces: Sequence[Piece], gradients: Tensor, workspace: Workspace, *, trace: bool
    ) -> None:
        super().__init__(gradients.shape[0], gradients.shape[2 if trace else 1], trace=trace)
        self.site, self.pieces, self.gradients, self.workspace = site, tuple(pieces), gradients, workspace
        self.channels = gradients.shape[3]
        each = self.samples * self.outputs * site.inputs * gradients.element_size()
        # Blocks of equal size, since a narrow last block would be formed at a lower rate.
        count = -(-self.channels // max(1, workspace.limit // each))
        self.step = -(-self.channels // count)

    @property
    def tight(self) -> bool:
        """True, since m_i = |g_i|."""
        return True

    @property
    def _by_arguments(self) -> bool:
        """Whether the layer's inputs are smaller than A, as nearly always, and are sent to other processes in its place."""
        first = self.pieces[0]
        if first.given is not None:
            return False
        arguments = first.arguments(self.site)
        numbers = sum(each.numel() for each in arguments)
        return bool(arguments) and numbers <= first.count * self.site.positions * self.site.inputs

    def tensors(self) -> list[Tensor]:
        """Return the layer's inputs, from which A follows, or A itself, and B."""
        if self._by_arguments:
            found = zip(*(piece.arguments(self.site) for piece in self.pieces), strict=True)
            return [*map(_joined, found), self.gradients]
        return [_joined([piece.inputs(self.site) for piece in self.pieces]), self.gradients]

    def of_tensors(self, tensors: Sequence[Tensor]) -> FormedFactor:
        """See ``Factor``."""
        return self.joined([tensors])

    def of_channels(self, channels: slice) -> list[Tensor]:
        """Return what ``tensors`` does, with some of the output channels of B only."""
        *inputs, gradients = self.tensors()
        return [*inputs, gradients[..., channels]]

    def joined(self, parts: Sequence[Sequence[Tensor]]) -> FormedFactor:
        """Return a factor of the same site on the samples of all ``parts``, one after the other.

        Args:
            parts: what ``of_channels`` returns for factors of this site, for the same channels, of which there is one or more.
        """
        calls, by_arguments = self.pieces[0].calls, self._by_arguments
        pieces: list[Piece] = []
        start = 0
        for *inputs, gradients in parts:
            rows = slice(start, start + len(gradients))
            pieces.append(Piece(rows, calls, own=inputs) if by_arguments else Piece(rows, calls, given=inputs[0]))
            start = rows.stop
        return FormedFactor(self.site, pieces, _joined([part[-1] for part in parts]), self.workspace, trace=self.trace)

    def form(self, first: int, number: int) -> RowsFactor:
        """Form the gradients of channels ``first`` to ``first + step`` for all samples."""
        last = min(first + self.step, self.channels)
        width, k = self.site.inputs, self.outputs
        size = (last - first) * width
        shape = (self.samples, k, size) if self.trace else (k, self.samples, size)
        rows = self.workspace.piece(number, shape, self.gradients)
        for piece in self.pieces:
            count = piece.rows.stop - piece.rows.start
            inputs = piece.inputs(self.site)
            outer = self.gradients[piece.rows][..., first:last]
            if self.trace:
                target = rows[piece.rows].view(count, k * (last - first), width)
                torch.bmm(outer.flatten(2).transpose(1, 2), inputs, out=target)
                continue
            for index in range(k):
                target = rows[index, piece.rows].view(count, last - first, width)
                torch.bmm(outer[:, index].transpose(1, 2), inputs, out=target)
        return RowsFactor([rows], trace=self.trace)

    def add_gram(self, other: Factor, target: Tensor, precision: Precision) -> None:
        """See ``Factor.add_gram``."""
        assert isinstance(other, FormedFactor)
        step = min(self.step, other.step)
        # Both keep the step that was used, because ``gamma`` is the bound for products of blocks of this size.
        self.step = other.step = step
        for first in range(0, self.channels, step):
            left = self.form(first, 0)
            left.add_gram(left if other is self else other.form(first, 1), target, precision)

    def gamma(self, precision: Precision) -> float:
        """Return the bound for the products of a block and for the sum over blocks."""
        terms = self.step * self.site.inputs * (self.outputs if self.trace else 1)
        of_products = product_gamma(terms, self.gradients.dtype, precision)
        # The blocks are added to the matrix one by one, with at most one rounding each.
        return (1 + of_products) * (1 + gamma_k(self.channels, torch.float64)) - 1

    def magnitudes(self) -> Tensor:
        """Return |g_i|, for which the gradients are formed once more."""
        squares = [self.form(first, 0).magnitudes().square() for first in range(0, self.channels, self.step)]
        return torch.stack(squares).sum(0).sqrt()
