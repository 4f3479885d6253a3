"""``Layout``: which numbers of a sketch belong to which parameters and to which group of projections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from lightning_conv.sketches.projections import kept_sizes, relative_variance


@dataclass(frozen=True)
class Block:
    """A parameter, or a weight with the bias of its layer, whose gradient is one matrix and is sketched as such.

    The matrix has a row for each index of the first dimension of the weight; the bias is a further column. A parameter of one
    dimension is one row.
    """

    names: tuple[str, ...]  # the weight, and the bias if it is part of the block
    rows: int
    columns: int
    kept_rows: int  # p; ``rows``: this side is not projected
    kept_columns: int  # q

    @property
    def exact(self) -> bool:
        """Whether the gradient is stored as it is."""
        return (self.kept_rows, self.kept_columns) == (self.rows, self.columns)

    @property
    def size(self) -> int:
        """Numbers of one sketch, p q."""
        return self.kept_rows * self.kept_columns

    @property
    def variance(self) -> float:
        """Bound of the relative variance of one pair of projections, see ``relative_variance``."""
        return relative_variance(self.rows, self.columns, self.kept_rows, self.kept_columns)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the matrix as which the gradient of a parameter is sketched.

    Args:
        shape: of the parameter.

    Example:
        >>> matrix_shape((8, 3, 3, 3)), matrix_shape((5,)), matrix_shape(())
        ((8, 27), (1, 5), (1, 1))
    """
    return (int(shape[0]), prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def make_block(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], size: int, groups: int, *, once: bool
) -> Block:
    """Return the block of a parameter, or of a weight and a bias, with as many numbers as it may have.

    Args:
        names: the weight, and the bias if there is one.
        shapes: of all parameters.
        size: numbers of all groups together.
        groups: number of independent pairs of projections.
        once: whether a gradient that is not projected is stored once for all groups.
    """
    rows, columns = matrix_shape(shapes[names[0]])
    columns += len(names) - 1
    whole = once and rows * columns <= size
    kept = (rows, columns) if whole else kept_sizes(rows, columns, size // groups)
    return Block(tuple(names), rows, columns, *kept)


@dataclass(frozen=True)
class Layout:
    """The K numbers of a sketch in order: gradients that are stored as they are, then one part for each group.

    Attributes:
        blocks: parameters in the order of their sketches.
        groups: number G of independent pairs of projections.
        once: whether gradients that are not projected are stored once rather than in every group.
    """

    blocks: tuple[Block, ...]
    groups: int
    once: bool

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where each block is: in the first part, or in the part of every group."""
        found, exact, grouped = [], 0, 0
        for block in self.blocks:
            if self.is_shared(block):
                found.append(slice(exact, exact + block.size))
                exact += block.size
            else:
                found.append(slice(grouped, grouped + block.size))
                grouped += block.size
        return tuple(found)

    def is_shared(self, block: Block) -> bool:
        """Return whether a block is stored once for all groups."""
        return self.once and block.exact

    @cached_property
    def exact_size(self) -> int:
        """Numbers that are stored once."""
        return sum(block.size for block in self.blocks if self.is_shared(block))

    @cached_property
    def group_size(self) -> int:
        """Numbers of each group."""
        return sum(block.size for block in self.blocks if not self.is_shared(block))

    @property
    def size(self) -> int:
        """Number K of numbers in a sketch."""
        return self.exact_size + self.groups * self.group_size

    def group(self, number: int) -> slice:
        """Return where the numbers of one group are."""
        start = self.exact_size + number * self.group_size
        return slice(start, start + self.group_size)

    @property
    def relative_error(self) -> float:
        r"""Bound c of the standard error of an entry: at most :math:`c \sqrt{K_{ii} K_{jj}}`.

        With independent projections the variances of the layers add up, and
        :math:`\sum_l |G_l|^2 |G'_l|^2 \le \sum_l |G_l|^2 \sum_l |G'_l|^2`; so c^2 is the largest variance of a layer over G. Many
        layers of similar size do better by the root of their number.
        """
        return math.sqrt(max((block.variance for block in self.blocks), default=0.0) / self.groups)

    def as_json(self) -> dict[str, Any]:
        """Return the layout in plain types."""
        blocks = [
            {"names": list(b.names), "shape": [b.rows, b.columns], "kept": [b.kept_rows, b.kept_columns]}
            for b in self.blocks
        ]
        return {"blocks": blocks, "groups": self.groups, "once": self.once}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Return the layout that ``as_json`` wrote."""
        blocks = tuple(Block(tuple(b["names"]), *map(int, b["shape"]), *map(int, b["kept"])) for b in data["blocks"])
        return cls(blocks, int(data["groups"]), bool(data["once"]))
