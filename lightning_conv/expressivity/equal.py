"""Samples with equal features, which make rank n impossible for every width of the layer: the search for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_conv.expressivity.closest import distance_of
from lightning_conv.expressivity.stream import FeatureRows, gram_relative, read_rows
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.linalg.rounding import gamma

SameInputs = Callable[[int, int], bool]
READ = 16
"""Number of pairs whose features are computed once more to get their distance."""


@dataclass(frozen=True)
class Pair:
    """Two samples and the distance of their features."""

    first: int
    second: int
    distance: float

    def refutes(self, feature_error: float, same_inputs: SameInputs | None) -> Coincidence | None:
        """Return how the two samples make rank n impossible, or None if they do not.

        Equal inputs have equal features whatever the weights. Equal features of other inputs, or of inputs that cannot be
        compared, are a fact about the present weights only.

        Args:
            feature_error: see ``certify_expressivity``.
            same_inputs: see ``certify_expressivity``.
        """
        who, exact = f"samples {self.first} and {self.second}", self.distance == 0 and feature_error == 0
        # The features of equal inputs may differ a little, because rounding depends on the size of the batch.
        if not (exact or self.distance <= 2 * feature_error):
            return None
        same = None if same_inputs is None else same_inputs(self.first, self.second)
        if same:
            return Coincidence(f"{who} are equal", "remove duplicate samples", at_these_weights=False)
        if not exact:
            return None
        hint = (
            "other weights may separate them"
            if same is False
            else "other weights may separate them unless they are equal"
        )
        return Coincidence(f"{who} have equal features at these weights", hint, at_these_weights=True)


@dataclass(frozen=True)
class Coincidence:
    """Two samples that make rank n impossible."""

    what: str
    hint: str
    at_these_weights: bool  # whether other weights may separate them

    def reason(self, consequence: str) -> str:
        """Return the reason of a certificate, such as "samples 0 and 1 are equal, so ...; remove duplicate samples"."""
        return f"{self.what}, so {consequence}; {self.hint}"


def closest_pair(source: FeatureRows, gram: Tiles) -> Pair:
    r"""Find the closest two samples, up to the rounding of :math:`G_{ii} + G_{jj} - 2 G_{ij} = |h_i - h_j|^2`.

    Equal samples are certain to be found if this rounding leaves at most 16 pairs open.

    Args:
        source: last hidden features h of the n samples.
        gram: h h^T, with or without the ones of a bias, which cancel.

    Cost: reads n^2 numbers, and computes the features of at most 32 samples.
    """
    if gram.size < 2:
        return Pair(0, 0, math.inf)
    diagonal = gram.diagonal()
    norms = diagonal.clamp_min(0).sqrt()
    relative = gram_relative(source.width) + gamma(4, torch.float64)
    found: list[tuple[float, int, int]] = []
    for i in range(gram.count):
        for j in range(i + 1):
            mine, theirs = gram.rows(i), gram.rows(j)
            squares = torch.add(diagonal[mine, None] + diagonal[None, theirs], gram[i, j], alpha=-2)
            # A lower bound of the squared distance, so that pairs that may be equal come first.
            squares -= relative * (norms[mine, None] + norms[None, theirs]).square()
            if i == j:
                squares[torch.ones_like(squares, dtype=torch.bool).triu()] = math.inf
            lowest = squares.flatten().topk(min(READ, squares.numel()), largest=False)
            pairs = zip(lowest.values.tolist(), lowest.indices.tolist(), strict=True)
            width = squares.shape[1]
            found += [(s, mine.start + at // width, theirs.start + at % width) for s, at in pairs if s < math.inf]
        found = sorted(found)[:READ]
    return min((_read(source, i, j) for _, j, i in found), key=lambda pair: pair.distance)


def _read(source: FeatureRows, first: int, second: int) -> Pair:
    rows = (read_rows(source, slice(k, k + 1)) for k in (first, second))
    return Pair(first, second, float(distance_of(*rows)))
