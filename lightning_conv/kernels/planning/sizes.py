"""Bytes that one sample takes on its way through the network, and the sizes of the pieces that the work is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_conv.kernels.planning.costs import Contribution, Problem
from lightning_conv.kernels.products.precision import DOUBLE_BLOCK, Precision
from lightning_conv.kernels.reading.anatomy import Anatomy
from lightning_conv.machine.memory import mebibytes

TILE = 256
"""Rows of a tile of products: large enough for the full rate of a matrix product, small enough to skip the symmetric
half of a few hundred samples."""

WIDE_ENOUGH = 64
"""Rows from which a product that forms per-sample gradients runs at full speed; narrower layers take several outputs at
once."""

FORWARD_TARGET = 512 * 2**20
"""Bytes that one tile of samples may take on its way through the network; larger tiles are not faster."""

WORKSPACE = 128 * 2**20
"""Bytes of a buffer in which per-sample gradients are formed; larger buffers are not faster."""


@dataclass(frozen=True)
class SampleSizes:
    """Bytes that one sample takes on its way through the network."""

    forward: int  # activations and the autograd graph
    prepared: int  # patches and normalised activations, shared by all outputs
    gradients: int  # output gradients B of all calls, for one output
    stacked: int  # for one output at the largest site: B beside that of other outputs, and temporaries
    general: int  # a pass by torch.func, without the rows it forms
    narrowest: int  # channels (not bytes) of the narrowest layer for which several outputs are worth taking at once

    def structured(self, outputs: int) -> int:
        """Return the bytes of a pass by layer rules that takes this many outputs at once."""
        return self.forward + self.prepared + outputs * (self.gradients + self.stacked)


def workspace_bytes(anatomy: Anatomy, found: Sequence[Contribution], problem: Problem, left: int) -> int:
    """Return the bytes of one of the two buffers in which per-sample gradients are formed.

    Raises:
        MemoryError: a single output channel does not fit.
    """
    late = [site for site, one in zip(anatomy.sites, found, strict=False) if one.formed_late]
    channel = [problem.rows * problem.outputs * problem.width * site.inputs for site in late]
    whole = [size * site.gradients for size, site in zip(channel, late, strict=True)]
    workspace = max(max(channel, default=0), min(WORKSPACE, max(whole, default=0), left // 8))
    if 2 * workspace >= left:
        raise MemoryError(
            f"max_memory: forming the gradients of one output channel takes {mebibytes(2 * workspace)}, but only {mebibytes(left)} are "
            "left beside the kernel; allow more, or use fewer samples or outputs"
        )
    return workspace


def product_bytes(found: Sequence[Contribution], anatomy: Anatomy, problem: Problem, precision: Precision) -> int:
    """Return the bytes of the temporaries of a tile of products: four float64 squares, and copies of its rows."""
    stride = 1 if problem.trace else problem.outputs
    positions = [
        s.positions
        for s, c in zip(anatomy.sites, found, strict=False)
        if c.way in ("patch Gram", "token Gram", "tied Gram")
    ]
    longest = stride * max(positions, default=1)
    side = min(max(TILE, longest), problem.rows * longest)
    columns = max((c.output_bytes * problem.outputs // problem.width for c in found), default=0)
    copies = 2 * side * min(columns, DOUBLE_BLOCK) * 8 if precision == "exact" else 0
    return 4 * 8 * side**2 + copies


def sample_sizes(anatomy: Anatomy, found: Sequence[Contribution], problem: Problem) -> SampleSizes:
    """Measure one sample of the kernel: what its forward, its factors and its output gradients take."""
    planned = list(zip(anatomy.sites, found, strict=False))
    formed = [s for s, one in planned if one.way == "per-sample gradients" and s.positions > 1]
    prepared = sum(s.positions * s.groups * s.inputs for s, one in planned if s in formed and not one.formed_late)
    if any("norm" in site.kind for site in anatomy.sites):
        prepared += anatomy.gradient_numel
    stacked = max((2 * s.positions * s.groups * (s.inputs + s.gradients) for s in anatomy.sites), default=0)
    # More memory pays off only for layers that take a considerable part of the time.
    heavy = sum(one.flops for one in found) / 20
    channels = [s.gradients for s, one in planned if s in formed and one.flops > heavy]
    return SampleSizes(
        forward=anatomy.forward_bytes,
        prepared=problem.width * prepared,
        gradients=problem.width * anatomy.gradient_numel,
        stacked=problem.width * stacked,
        general=anatomy.forward_bytes * (1 + problem.outputs),
        narrowest=min(channels, default=WIDE_ENOUGH),
    )


def tile_sizes(sizes: SampleSizes, problem: Problem, budget: int) -> tuple[int, int]:
    """Return how many samples and how many outputs go through the network at once.

    Raises:
        MemoryError: not even one sample fits into ``budget``.
    """
    at_once = min(problem.outputs, max(1, 2 * WIDE_ENOUGH // sizes.narrowest) if sizes.narrowest < WIDE_ENOUGH else 1)
    while at_once > 1 and sizes.structured(at_once) > budget:
        at_once //= 2
    each = sizes.structured(at_once)
    if each > budget:
        raise MemoryError(
            f"max_memory: one sample takes {mebibytes(each)} on its way through the network, but only {mebibytes(budget)} are left for it; "
            f"allow at least {mebibytes(4 * each)}, or use a smaller network"
        )
    fit = min(budget, max(FORWARD_TARGET, each)) // max(each, 1)
    # Tiles of equal size: even a small last tile costs a full pass through the network.
    count = -(-problem.rows // max(1, fit))
    return -(-problem.rows // count), at_once


MIRRORED = 512
"""Number of rows that are copied to the other triangle of a symmetric matrix at a time."""


def measuring_bytes(anatomy: Anatomy) -> int:
    """Return the bytes of measuring the rounding of one sample: a graph in float64, and three combinations of the outputs in float64."""
    return 2 * anatomy.forward_bytes + 3 * 8 * anatomy.outputs


def what_fits(problem: Problem, allowed: int, needed: int) -> str:
    """Return a hint: how many samples or which outputs would fit into the allowed memory."""
    stride = 1 if problem.trace else problem.outputs
    samples = int((allowed / 2 / 8) ** 0.5 / stride)
    options = [
        f"about {samples} samples would fit" if 1 < samples < problem.samples else f"allow {mebibytes(2 * needed)}"
    ]
    if not problem.trace:
        options.append("outputs='trace' needs a matrix smaller by the square of the number of outputs")
    return "; ".join(options)
