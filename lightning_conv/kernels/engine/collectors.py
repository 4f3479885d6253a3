"""``Collector``: gathers what the factors of a site need, tile by tile, while the samples go through the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_conv.kernels.engine.factors import Factor, OuterFactor, RowsFactor, TokenFactor
from lightning_conv.kernels.engine.formed_factor import FormedFactor, Piece, Workspace
from lightning_conv.kernels.engine.tied_factor import TiedFactor
from lightning_conv.kernels.planning.costs import Contribution
from lightning_conv.kernels.planning.sizes import WIDE_ENOUGH
from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sites import (
    Prepared,
    Site,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    tied_uses,
    token_gradients,
)

Gradients: TypeAlias = Sequence[Mapping[int, Tensor]]  # B by output, then by call


class Store:
    """A tensor of n rows that is filled piece by piece; a piece that has all rows is kept without a copy."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tensor: Tensor | None = None

    def put(self, rows: slice, piece: Tensor) -> None:
        """Fill these rows with ``piece``."""
        if len(piece) == self.rows:
            self.tensor = piece
        else:
            self.room(piece)[rows] = piece

    def room(self, like: Tensor, *shape: int) -> Tensor:
        """Return the whole tensor; the first call allocates it, with rows like those of ``like`` or of ``shape``."""
        if self.tensor is None:
            self.tensor = like.new_empty(self.rows, *(shape or like.shape[1:]))
        return self.tensor

    @property
    def whole(self) -> Tensor:
        """The filled tensor."""
        assert self.tensor is not None
        return self.tensor


class Collector(ABC):
    """Gathers one factor of a block of samples.

    Args:
        site: the site that the factor belongs to.
        samples: n, the number of samples in the block.
        outputs: K, the number of outputs.
        trace: whether the kernel is summed over the outputs.
    """

    def __init__(self, site: Site, samples: int, outputs: int, *, trace: bool) -> None:
        self.site, self.samples, self.outputs, self.trace = site, samples, outputs, trace

    @abstractmethod
    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Store what does not depend on the outputs; called first for each tile."""

    @abstractmethod
    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """Store what follows from B of the outputs ``first``, ``first + 1``, ..."""

    @abstractmethod
    def factor(self) -> Factor:
        """Return the factor, once all tiles have been added."""


class RowsCollector(Collector):
    """Gathers per-sample derivatives by one parameter.

    For the trace each group of outputs has its own tensor, since contiguous rows are written and read faster than
    pieces of rows that lie far apart.
    """

    def __init__(self, site: Site, name: str, samples: int, outputs: int, *, trace: bool) -> None:
        super().__init__(site, samples, outputs, trace=trace)
        self.name = name
        self.formed = name == site.weight and site.positions > 0 and not site.tokens and not site.tied
        self.stores: dict[int, Store] = {}
        self._inputs: Tensor | None = None
        self._prepared: list[Prepared] = []

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Compute A of this tile, or whatever else the rule needs, once for all outputs."""
        count = rows.stop - rows.start
        if self.formed:
            self._inputs = site_inputs(self.site, calls, count)
        else:
            self._prepared = prepare(self.site, calls, count)

    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """Form the rows of these outputs."""
        count = rows.stop - rows.start
        like = next(iter(gradients[0].values()))
        room = self._room(rows, first, len(gradients), like)
        if self._inputs is None:
            for k, of in enumerate(gradients):
                (room[:, k] if self.trace else room[k])[:] = site_rows(self._prepared, self.name, of, count)
            return
        outer = [site_gradients(self.site, calls, of, count) for of in gradients]
        if self.trace:
            per_sample_products(self._inputs, outer, room)
        else:
            for k, one in enumerate(outer):
                per_sample_products(self._inputs, [one], room[k][:, None])

    def _room(self, rows: slice, first: int, outputs: int, like: Tensor) -> Tensor:
        """Return the memory for these rows of these outputs: (t, k, P) for the trace, else (k, t, P)."""
        size = self.site.sizes[self.name]
        if self.trace:
            return self.stores.setdefault(first, Store(self.samples)).room(like, outputs, size)[rows]
        whole = self.stores.setdefault(0, Store(self.outputs)).room(like, self.samples, size)
        return whole[first : first + outputs, rows]

    def factor(self) -> Factor:
        """Return a ``RowsFactor``."""
        return RowsFactor([store.whole for store in self.stores.values()], trace=self.trace)


def per_sample_products(inputs: Tensor, outer: Sequence[Tensor], out: Tensor) -> None:
    """Write out[i, k] = sum_r b_ikrg a_irg^T for each sample i and output k.

    Args:
        inputs: A, (n, R, groups, in).
        outer: B of each output, (n, R, groups, out).
        out: (n, K, groups out in), usually rows of a larger tensor.
    """
    count, _, groups, width = inputs.shape
    k, o = len(outer), outer[0].shape[3]
    if groups == 1 and (k == 1 or o >= WIDE_ENOUGH):
        for index, each in enumerate(outer):
            torch.bmm(each[:, :, 0].transpose(1, 2), inputs[:, :, 0], out=torch.unflatten(out[:, index], 1, (o, width)))
    elif groups == 1:
        side_by_side = torch.stack([each[:, :, 0] for each in outer], 2).flatten(2)  # (n, R, K out)
        torch.bmm(side_by_side.transpose(1, 2), inputs[:, :, 0], out=out.view(count, k * o, width))
    else:
        stacked = torch.stack(tuple(outer), 3).movedim(2, 1).flatten(0, 1).flatten(2)  # (n g, R, K out)
        found = torch.bmm(stacked.transpose(1, 2), inputs.movedim(2, 1).flatten(0, 1))
        out.copy_(found.view(count, groups, k, o, width).movedim(1, 2).flatten(2))


class OuterCollector(Collector):
    """Gathers the inputs A and the output gradients B as they are."""

    def __init__(self, site: Site, samples: int, outputs: int, *, trace: bool) -> None:
        super().__init__(site, samples, outputs, trace=trace)
        self.inputs, self.gradients = Store(samples), Store(samples)

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Store A, (n, R, in)."""
        self.inputs.put(rows, site_inputs(self.site, calls, rows.stop - rows.start)[:, :, 0])

    def _of_output(self, calls: Sequence[LayerCall], of: Mapping[int, Tensor], count: int) -> Tensor:
        return site_gradients(self.site, calls, of, count)[:, :, 0]

    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """Store B, (n, R, K, out) for the trace, so that (K, out) is one vector; else (n, K, R, out)."""
        count = rows.stop - rows.start
        for k, of in enumerate(gradients, first):
            piece = self._of_output(calls, of, count)
            if self.outputs == 1 and count == self.samples:
                self.gradients.put(rows, piece.unsqueeze(2 if self.trace else 1))
                continue
            positions, width = piece.shape[1:]
            if self.trace:
                self.gradients.room(piece, positions, self.outputs, width)[rows, :, k] = piece
            else:
                self.gradients.room(piece, self.outputs, positions, width)[rows, k] = piece

    def _gradients(self) -> Tensor:
        return self.gradients.whole.flatten(2) if self.trace else self.gradients.whole

    def factor(self) -> Factor:
        """Return an ``OuterFactor``."""
        bias = self.site.bias is not None and self.site.bias_in_product
        return OuterFactor(self.inputs.whole, self._gradients(), self.outputs, bias=bias, trace=self.trace)


class FormedCollector(OuterCollector):
    """Gathers B, and the calls from which A can be recomputed."""

    def __init__(self, site: Site, samples: int, outputs: int, workspace: Workspace, *, trace: bool) -> None:
        super().__init__(site, samples, outputs, trace=trace)
        self.workspace = workspace
        self.pieces: list[Piece] = []

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Store the calls without their edges, which would keep the whole graph alive."""
        used = {use.call: replace(calls[use.call], edge=None) for use in self.site.uses}
        self.pieces.append(Piece(rows, used))

    def factor(self) -> Factor:
        """Return a ``FormedFactor``."""
        return FormedFactor(self.site, self.pieces, self.gradients.whole, self.workspace, trace=self.trace)


class TokenCollector(OuterCollector):
    """Gathers words and B of an embedding."""

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Store the words, (n, R)."""
        self.inputs.put(rows, site_inputs(self.site, calls, rows.stop - rows.start))

    def _of_output(self, calls: Sequence[LayerCall], of: Mapping[int, Tensor], count: int) -> Tensor:
        return token_gradients(self.site, calls, of, count)

    def factor(self) -> Factor:
        """Return a ``TokenFactor``."""
        return TokenFactor(self.inputs.whole, self._gradients(), self.outputs, trace=self.trace)


class TiedCollector(Collector):
    """Gathers both uses of a weight: A and B of the linear layer, words and B of the embedding."""

    def __init__(self, site: Site, samples: int, outputs: int) -> None:
        super().__init__(site, samples, outputs, trace=True)
        self._of: tuple[OuterCollector, TokenCollector] | None = None

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Store A and the words."""
        if self._of is None:
            uses = tied_uses(self.site, calls)
            assert uses is not None
            self._of = (
                OuterCollector(uses[0], self.samples, self.outputs, trace=True),
                TokenCollector(uses[1], self.samples, self.outputs, trace=True),
            )
        for each in self._of:
            each.add_inputs(rows, calls)

    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """Store both B."""
        assert self._of is not None
        for each in self._of:
            each.add_gradients(rows, first, calls, gradients)

    def factor(self) -> Factor:
        """Return a ``TiedFactor``."""
        assert self._of is not None
        linear, words = (each.factor() for each in self._of)
        assert isinstance(linear, OuterFactor)
        assert isinstance(words, TokenFactor)
        return TiedFactor(linear, words)


def collectors_of(
    site: Site, contribution: Contribution, samples: int, outputs: int, workspace: Workspace, *, trace: bool
) -> list[Collector]:
    """Return the collectors of a site, in the form that was planned for it."""
    if contribution.way == "tied Gram":
        return [TiedCollector(site, samples, outputs)]
    if contribution.way == "token Gram":
        return [TokenCollector(site, samples, outputs, trace=trace)]
    if contribution.way == "per-sample gradients" and not contribution.formed_late:
        return [RowsCollector(site, name, samples, outputs, trace=trace) for name in site.names]
    late = contribution.formed_late
    collectors: list[Collector] = [
        FormedCollector(site, samples, outputs, workspace, trace=trace)
        if late
        else OuterCollector(site, samples, outputs, trace=trace)
    ]
    if site.bias is not None and (late or not site.bias_in_product):
        collectors.append(RowsCollector(site, site.bias, samples, outputs, trace=trace))
    return collectors
