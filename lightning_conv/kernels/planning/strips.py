"""Strips of columns of the Jacobian J: how the kernel of samples that couple is cut, and what its passes cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lightning_conv.kernels.planning.costs import Contribution, Problem
from lightning_conv.kernels.planning.pass_cost import PassCost
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.reading.anatomy import Anatomy


@dataclass(frozen=True)
class Strip:
    """Columns of J that are formed together: those of whole parameters, or a range of one parameter."""

    names: tuple[str, ...]
    start: int  # in the concatenation of these parameters
    stop: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


def strips(sizes: Sequence[tuple[str, int]], limit: int) -> Iterator[Strip]:
    """Cut the columns of J into strips of at most ``limit`` columns; a larger parameter is cut into several strips."""
    names: list[str] = []
    total = 0
    for name, size in sizes:
        if names and total + size > limit:
            yield Strip(tuple(names), 0, total)
            names, total = [], 0
        if size > limit:
            for start in range(0, size, limit):
                yield Strip((name,), start, min(start + limit, size))
        else:
            names.append(name)
            total += size
    if names:
        yield Strip(tuple(names), 0, total)


def strip_width(total: int, rows: int, left: int, dtype: torch.dtype, precision: Precision) -> int:
    """Return how many of the ``total`` columns of J fit into half of the ``left`` bytes."""
    width = torch.finfo(dtype).bits // 8 if precision == "fast" else 8
    return max(1, min(total, left // 2 // (rows * width)))


def strip_count(
    found: Sequence[Contribution], problem: Problem, anatomy: Anatomy, room: int, per_layer: bool, precision: Precision
) -> int:
    """Return the number of strips, which is the number of times the whole batch passes through the network."""
    dtype = torch.float64 if problem.width == 8 else torch.float32
    sizes: dict[str, int] = {}
    for one in found:
        layer = one.layer if per_layer else ""
        sizes[layer] = sizes.get(layer, 0) + sum(anatomy.general_sizes[name] for name in one.parameters)
    rows = problem.samples * problem.outputs
    left = max(1, room - problem.samples * anatomy.forward_bytes)
    return sum(-(-size // strip_width(size, rows, left, dtype, precision)) for size in sizes.values())


def strip_cost(strips: int, problem: Problem, general: PassCost | None) -> tuple[float, float]:
    """Return flops and seconds of all passes: per strip one forward of the batch, and one backward for each row of J.

    This overestimates strips that hold only some of the parameters, since the gradients of the others are not taken.
    """
    if general is None:  # the outputs depend on no parameter
        return 0.0, 0.0
    rows = problem.samples * problem.outputs
    return strips * (general.forward + rows * general.backward), strips * rows * general.backward_seconds
