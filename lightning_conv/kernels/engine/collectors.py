"""Gather what the factors of a site need, tile by tile, as the samples go through the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_conv.kernels.engine.factors import Factor, OuterFactor, RowsFactor, TokenFactor
from lightning_conv.kernels.engine.formed_factor import WIDE_ENOUGH, FormedFactor, Piece, Workspace
from lightning_conv.kernels.planning.costs import Contribution
from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sites import (
    Prepared,
    Site,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    site_tokens,
    token_gradients,
)

Gradients: TypeAlias = Sequence[Mapping[int, Tensor]]  # B by output, then by call


class Store:
    """A tensor of n rows that is filled piece by piece; a piece that is everything is kept as it is."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tensor: Tensor | None = None

    def put(self, rows: slice, piece: Tensor) -> None:
        """Fill some rows."""
        if len(piece) == self.rows:
            self.tensor = piece
        else:
            self.room(piece)[rows] = piece

    def room(self, like: Tensor, *shape: int) -> Tensor:
        """The whole tensor, made at the first call with rows like ``like`` or of ``shape``."""
        if self.tensor is None:
            self.tensor = like.new_empty(self.rows, *(shape or like.shape[1:]))
        return self.tensor

    @property
    def whole(self) -> Tensor:
        """All of it."""
        assert self.tensor is not None
        return self.tensor


class Collector(ABC):
    """Gathers one factor of a block of samples.

    Args:
        site: whose.
        samples: n, rows of the block.
        outputs: K.
        trace: whether the kernel is summed over the outputs.
    """

    def __init__(self, site: Site, samples: int, outputs: int, *, trace: bool) -> None:
        self.site, self.samples, self.outputs, self.trace = site, samples, outputs, trace

    @abstractmethod
    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Take what does not depend on the outputs; called first for every tile."""

    @abstractmethod
    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """Take B of the outputs ``first``, ``first + 1``, ..."""

    @abstractmethod
    def factor(self) -> Factor:
        """The factor, once all tiles are in."""


class RowsCollector(Collector):
    """Per-sample derivatives of one parameter.

    For the trace every group of outputs has a tensor of its own: rows that lie close together are written and read
    faster than pieces of rows that are far apart.
    """

    def __init__(self, site: Site, name: str, samples: int, outputs: int, *, trace: bool) -> None:
        super().__init__(site, samples, outputs, trace=trace)
        self.name = name
        self.formed = name == site.weight and site.positions > 0 and not site.tokens
        self.stores: dict[int, Store] = {}
        self._inputs: Tensor | None = None
        self._prepared: list[Prepared] = []

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """A of this tile, or whatever else the rule needs, for all outputs."""
        count = rows.stop - rows.start
        if self.formed:
            self._inputs = site_inputs(self.site, calls, count)
        else:
            self._prepared = prepare(self.site, calls, count)

    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """Form the rows."""
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
        """Where these rows of these outputs are kept: (t, k, P) for the trace, else (k, t, P)."""
        size = self.site.sizes[self.name]
        if self.trace:
            return self.stores.setdefault(first, Store(self.samples)).room(like, outputs, size)[rows]
        whole = self.stores.setdefault(0, Store(self.outputs)).room(like, self.samples, size)
        return whole[first : first + outputs, rows]

    def factor(self) -> Factor:
        """See ``RowsFactor``."""
        return RowsFactor([store.whole for store in self.stores.values()], trace=self.trace)


def per_sample_products(inputs: Tensor, outer: Sequence[Tensor], out: Tensor) -> None:
    """out[i, k] = sum_r b_ikrg a_irg^T for every sample i and output k.

    Args:
        inputs: A, (n, R, groups, in).
        outer: B of each output, (n, R, groups, out).
        out: (n, K, groups out in), rows of a larger tensor as a rule.
    """
    count, _, groups, width = inputs.shape
    k, o = len(outer), outer[0].shape[3]
    if groups == 1 and (k == 1 or o >= WIDE_ENOUGH):
        for index, each in enumerate(outer):
            torch.bmm(each[:, :, 0].transpose(1, 2), inputs[:, :, 0], out=torch.unflatten(out[:, index], 1, (o, width)))
    elif groups == 1:
        side_by_side = torch.stack([each[:, :, 0] for each in outer], 2).flatten(2)  # (n, R, K out)
        torch.bmm(side_by_side.transpose(1, 2), inputs[:, :, 0], out=out.reshape(count, k * o, width))
    else:
        stacked = torch.stack(tuple(outer), 3).movedim(2, 1).flatten(0, 1).flatten(2)  # (n g, R, K out)
        found = torch.bmm(stacked.transpose(1, 2), inputs.movedim(2, 1).flatten(0, 1))
        out.copy_(found.view(count, groups, k, o, width).movedim(1, 2).flatten(2))


class OuterCollector(Collector):
    """A and B as they are."""

    def __init__(self, site: Site, samples: int, outputs: int, *, trace: bool) -> None:
        super().__init__(site, samples, outputs, trace=trace)
        self.inputs, self.gradients = Store(samples), Store(samples)

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """A: (n, R, in)."""
        self.inputs.put(rows, site_inputs(self.site, calls, rows.stop - rows.start)[:, :, 0])

    def _of_output(self, calls: Sequence[LayerCall], of: Mapping[int, Tensor], count: int) -> Tensor:
        return site_gradients(self.site, calls, of, count)[:, :, 0]

    def add_gradients(self, rows: slice, first: int, calls: Sequence[LayerCall], gradients: Gradients) -> None:
        """B: (n, R, K, out) for the trace, so that (K, out) is one vector; else (n, K, R, out)."""
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
        """See ``OuterFactor``."""
        bias = self.site.bias is not None and self.site.bias_in_product
        return OuterFactor(self.inputs.whole, self._gradients(), self.outputs, bias=bias, trace=self.trace)


class FormedCollector(OuterCollector):
    """B, and the calls from which A can be had again."""

    def __init__(self, site: Site, samples: int, outputs: int, workspace: Workspace, *, trace: bool) -> None:
        super().__init__(site, samples, outputs, trace=trace)
        self.workspace = workspace
        self.pieces: list[Piece] = []

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """Keep the calls, without their place in the graph, which would keep all of it."""
        used = {use.call: replace(calls[use.call], edge=None) for use in self.site.uses}
        self.pieces.append(Piece(rows, used))

    def factor(self) -> Factor:
        """See ``FormedFactor``."""
        return FormedFactor(self.site, self.pieces, self.gradients.whole, self.workspace, trace=self.trace)


class TokenCollector(OuterCollector):
    """Words and B."""

    def add_inputs(self, rows: slice, calls: Sequence[LayerCall]) -> None:
        """(n, R) words."""
        self.inputs.put(rows, site_tokens(self.site, calls, rows.stop - rows.start))

    def _of_output(self, calls: Sequence[LayerCall], of: Mapping[int, Tensor], count: int) -> Tensor:
        return token_gradients(self.site, calls, of, count)

    def factor(self) -> Factor:
        """See ``TokenFactor``."""
        return TokenFactor(self.inputs.whole, self._gradients(), self.outputs, trace=self.trace)


def collectors_of(
    site: Site, contribution: Contribution, samples: int, outputs: int, workspace: Workspace, *, trace: bool
) -> list[Collector]:
    """The collectors of a site in the form that was planned for it."""
    if contribution.formed_late:
        formed: list[Collector] = [FormedCollector(site, samples, outputs, workspace, trace=trace)]
        return formed + ([RowsCollector(site, site.bias, samples, outputs, trace=trace)] if site.bias else [])
    if contribution.way == "per-sample gradients":
        return [RowsCollector(site, name, samples, outputs, trace=trace) for name in site.names]
    if contribution.way == "token Gram":
        return [TokenCollector(site, samples, outputs, trace=trace)]
    collectors: list[Collector] = [OuterCollector(site, samples, outputs, trace=trace)]
    if site.bias is not None and not site.bias_in_product:
        collectors.append(RowsCollector(site, site.bias, samples, outputs, trace=trace))
    return collectors
