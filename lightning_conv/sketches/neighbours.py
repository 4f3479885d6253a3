"""``Neighbours``: the stored samples with the largest influence on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.sketches.estimates import Sketches, weighted_estimate

Order: TypeAlias = Literal["influence", "opposed", "cosine"]
Summed: TypeAlias = Literal["influence", "opposed"]
"""Orders that a sum over checkpoints has."""


@dataclass(frozen=True)
class Neighbours:
    r"""For each of q queries the stored samples that come first, the first one first.

    The influence of sample i on the query is :math:`\langle g_i, g \rangle`: to first order in :math:`\eta`, a step
    :math:`-\eta g_i` on this sample lowers the loss of the query by :math:`\eta` times as much. Over several checkpoints it is the sum
    of :math:`\eta_t \langle g_{ti}, g_t \rangle`, by which the steps on this sample have lowered it.

    Attributes:
        samples: their numbers in the order of the loader, (q, most).
        influence: estimates, (q, most); for ``by="cosine"`` the cosine of the two sketches.
        standard_error: of each, (q, most). Since the largest of many estimates are shown, they are on average too large by a
            part of it.
    """

    samples: Tensor
    influence: Tensor
    standard_error: Tensor


def nearest_of(
    queries: Sequence[tuple[float, Sketches]],
    stored: Callable[[], Iterator[tuple[int, Sequence[Tensor]]]],
    most: int,
    by: Order,
) -> Neighbours:
    """Return the stored samples with the largest influence on the queries, reading the store once.

    Args:
        queries: for each checkpoint its weight and the sketches of the queries there.
        stored: gives the stored sketches of all checkpoints in parts, each with the number of its first sample.
        most: how many are returned for each query.
        by: ``"influence"``; ``"opposed"``: the most negative influence first; ``"cosine"``: influence over the norms of both
            sketches, at one checkpoint.

    Cost: 2 q n K flops and one reading of each checkpoint.
    """
    first = queries[0][1]
    values = first.values
    best: Tensor | None = None  # (3, q, up to most): the key by which it is sorted, the estimate and its error
    which = torch.empty(len(values), 0, dtype=torch.int64)
    for start, rows in stored():
        parts = [(weight, each.values, own) for (weight, each), own in zip(queries, rows, strict=True)]
        estimate, error = weighted_estimate(first.layout, parts)
        if by == "cosine":
            norms = _norms(first, values)[:, None] * _norms(first, rows[0])
            scale = torch.where(norms > 0, norms, 1.0)
            estimate, error = estimate / scale, error / scale
        key = -estimate if by == "opposed" else estimate
        numbers = torch.arange(start, start + len(rows[0])).expand(len(values), -1)
        found = torch.stack([key, estimate, error])
        best = found if best is None else torch.cat([best, found], 2)
        which = torch.cat([which, numbers], 1)
        chosen = best[0].topk(min(most, best.shape[2]), dim=1).indices
        best, which = best.gather(2, chosen.expand(3, -1, -1)), which.gather(1, chosen)
    assert best is not None
    return Neighbours(which, best[1], best[2])


def _norms(sketches: Sketches, rows: Tensor) -> Tensor:
    """Return |S| of each row: the root of the mean over the groups of the squared norm."""
    layout = sketches.layout
    exact, grouped = rows[:, : layout.exact_size], rows[:, layout.exact_size :]
    return (exact.square().sum(1) + grouped.square().sum(1) / layout.groups).sqrt()
