"""The plan of a kernel: what is computed how, in which passes, with how many bytes and flops, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lightning_conv.kernels.costs import Contribution, Problem, contribution, general_contribution, network_flops
from lightning_conv.kernels.discovery import Anatomy
from lightning_conv.kernels.factors import TILE
from lightning_conv.kernels.formed import WIDE_ENOUGH
from lightning_conv.kernels.gemm import calibrated
from lightning_conv.kernels.memory import allowed_memory, mebibytes
from lightning_conv.kernels.precision import DOUBLE_BLOCK, Precision

WORKSPACE = 64 * 2**20
"""Bytes in which per-sample gradients are formed to be multiplied at once: larger pieces are not faster."""

FORWARD_TARGET = 512 * 2**20
"""Bytes that one tile of samples may take on its way through the network: more is not faster."""

COPIES = 3
"""Of the rows that torch.func forms, in the making (measured: up to 2.6 where it batches by itself)."""

EFFICIENCY = 0.6
"""Share of the calibrated rate that whole kernels reach, for the prediction of seconds."""


@dataclass(frozen=True)
class Pass:
    """One run over the samples: the contributions whose factors are held together."""

    contributions: tuple[int, ...]
    outputs: tuple[int, int]  # range of the outputs (or projections) it covers
    rows: int  # samples whose factors are held at once; fewer than n: in pairs of blocks
    tile: int  # samples that go through the network together
    bytes: int  # held by its factors, and by torch.func while it forms them
    general: bool


@dataclass(frozen=True)
class NTKPlan:
    """How ``ntk_gram`` will compute a kernel and what it will cost."""

    problem: Problem
    contributions: tuple[Contribution, ...]
    passes: tuple[Pass, ...]
    outputs_at_once: int
    workspace: int
    """Bytes of a piece of memory in which gradients are formed."""
    precision: Precision
    flops: float
    """Of the forward and backward passes and all products, a multiplication and an addition counted as two."""
    bytes: int
    """Peak of the memory that is taken beyond what was taken before, the result included."""
    result_bytes: int
    reading_bytes: int
    """Of ``bytes``: what looking at the network takes before the passes begin. ``max_memory`` does not bound it."""
    seconds: float
    """Predicted from the rate of a matrix product measured in this process; within a factor of 3 as a rule."""
    max_memory: int
    parameters: tuple[str, ...] = field(repr=False)
    """Names, in the order in which they were read."""
    reading: Anatomy = field(repr=False)
    """What was found in the network."""

    def __str__(self) -> str:
        lines = [
            f"NTK of {self.problem.samples} samples x {self.problem.outputs} outputs: {self.flops / 1e9:.1f} Gflop, "
            f"at most {mebibytes(self.bytes)} of {mebibytes(self.max_memory)}, about {self.seconds:.2g} s, "
            f"{len(self.passes)} pass(es)"
        ]
        width = max((len(c.layer) for c in self.contributions), default=0)
        lines += [
            f"  {c.layer:<{width}}  {c.way:<20}  {c.flops / 1e9:9.3f} Gflop  {c.kind}" for c in self.contributions
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one sample on its way through the network."""

    forward: int  # activations and the graph
    prepared: int  # patches and normalised activations, for all outputs
    gradients: int  # B of all calls, of one output
    stacked: int  # of one output and the largest site: its B, put beside those of other outputs, and temporaries
    general: int  # of a pass by torch.func, without the rows
    narrowest: int  # channels of the layer that needs most outputs side by side

    def structured(self, outputs: int) -> int:
        return self.forward + self.prepared + outputs * (self.gradients + self.stacked)


def make_plan(
    anatomy: Anatomy,
    problem: Problem,
    *,
    precision: Precision,
    matrices: int,
    repeats: int,
    max_memory: int | None,
    device: torch.device,
    couples: bool = False,
) -> NTKPlan:
    """Choose a form for every site and cut the work so that it keeps to ``max_memory``.

    Cut in this order, from the cheapest to the dearest: samples on their way through the network; outputs, where they
    are summed (one more forward each); layers (one more forward and backward pass each); blocks of samples (passes in
    proportion to their number).

    Args:
        anatomy: what was found in the network.
        problem: sizes.
        precision: of the products.
        matrices: number of n x n results that are held.
        repeats: how many times the passes are run, for other combinations of outputs.
        max_memory: bytes, None: a quarter of what is free.
        device: where.
        couples: samples couple: rows of J come from backward passes over the whole batch, cut by ``coupled_gram`` itself.

    Raises:
        ValueError: ``max_memory`` is not positive.
        MemoryError: it cannot be kept; says what takes the room and what would fit.
    """
    allowed = allowed_memory(max_memory, device)
    found = [contribution(site, problem) for site in anatomy.sites]
    found += [
        general_contribution(name, anatomy.general_sizes[name], reason, problem)
        for name, reason in anatomy.general.items()
    ]
    stride = 1 if problem.trace else problem.outputs
    result = 8 * matrices * problem.samples * (problem.others or problem.samples) * stride**2
    temporary = _product_bytes(found, anatomy, problem, precision)
    left = allowed - result - temporary
    if left <= 0:
        raise MemoryError(
            f"max_memory: the kernel with the temporaries of its products takes {mebibytes(result + temporary)} of the allowed "
            f"{mebibytes(allowed)}; {_smaller(problem, allowed)}"
        )
    if couples:
        found = [replace(one, way="whole batch", kind="samples couple: a backward pass for every row") for one in found]
        flops = repeats * sum(c.flops for c in found)
        rate = _rate(device, precision)
        return NTKPlan(
            problem,
            tuple(found),
            (),
            1,
            0,
            precision,
            flops,
            allowed,
            result,
            anatomy.reading_bytes,
            flops / rate,
            allowed,
            anatomy.parameters,
            anatomy,
        )
    late = [s for s, one in zip(anatomy.sites, found, strict=False) if one.formed_late]
    least = max((problem.rows * problem.outputs * problem.width * site.inputs for site in late), default=0)
    most = max((problem.rows * problem.outputs * problem.width * s.inputs * s.gradients for s in late), default=0)
    workspace = max(least, min(WORKSPACE, most, left // 8))
    left -= 2 * workspace
    if left <= 0:
        raise MemoryError(
            f"max_memory: forming gradients takes {mebibytes(2 * workspace)}, and {mebibytes(allowed)} are allowed for all; allow more, or "
            f"use fewer samples or outputs"
        )
    sizes = _sizes(anatomy, found, problem)
    tile, at_once = _tile(sizes, problem, left // 2)
    working = tile * sizes.structured(at_once) if anatomy.sites else 0
    passes = tuple(_passes(found, len(anatomy.sites), problem, left - working, sizes, tile))
    peak = max((p.bytes + (0 if p.general else working) for p in passes), default=0)
    flops = sum(c.flops for c in found) + network_flops(anatomy.sites, problem) * _repeats(passes)
    rate = calibrated(
        device.type, torch.float64 if precision == "certified" else torch.float32, torch.get_num_threads()
    )[1]
    slower = 2.5 if precision == "exact" else 1.0
    flops *= repeats
    return NTKPlan(
        problem=problem,
        contributions=tuple(found),
        passes=passes,
        outputs_at_once=at_once,
        precision=precision,
        flops=flops,
        workspace=workspace,
        bytes=max(result + temporary + 2 * workspace + peak, anatomy.reading_bytes),
        result_bytes=result,
        reading_bytes=anatomy.reading_bytes,
        seconds=slower * flops / (EFFICIENCY * rate),
        max_memory=allowed,
        parameters=anatomy.parameters,
        reading=anatomy,
    )


def _rate(device: torch.device, precision: Precision) -> float:
    dtype = torch.float64 if precision == "certified" else torch.float32
    return calibrated(device.type, dtype, torch.get_num_threads())[1]


def _repeats(passes: Sequence[Pass]) -> int:
    return max(1, len({p.contributions for p in passes if not p.general}))


def _product_bytes(found: Sequence[Contribution], anatomy: Anatomy, problem: Problem, precision: Precision) -> int:
    """Temporaries of one tile of products: a handful of float64 squares, and float64 copies of its rows."""
    stride = 1 if problem.trace else problem.outputs
    positions = [
        s.positions for s, c in zip(anatomy.sites, found, strict=False) if c.way in ("patch Gram", "token Gram")
    ]
    longest = stride * max(positions, default=1)
    side = min(max(TILE, longest), problem.rows * longest)
    columns = max((c.output_bytes * problem.outputs // problem.width for c in found), default=0)
    copies = 2 * side * min(columns, DOUBLE_BLOCK) * 8 if precision == "exact" else 0
    return 4 * 8 * side**2 + copies


def _sizes(anatomy: Anatomy, found: Sequence[Contribution], problem: Problem) -> _Sizes:
    planned = list(zip(anatomy.sites, found, strict=False))
    formed = [s for s, one in planned if one.way == "per-sample gradients" and s.positions > 1]
    prepared = sum(s.positions * s.groups * s.inputs for s in formed)
    if any("norm" in site.kind for site in anatomy.sites):
        prepared += anatomy.gradient_numel
    stacked = max((2 * s.positions * s.groups * (s.inputs + s.gradients) for s in anatomy.sites), default=0)
    # Only layers that take a good part of the time are worth more memory.
    heavy = sum(one.flops for one in found) / 20
    channels = [s.gradients for s, one in planned if s in formed and one.flops > heavy]
    return _Sizes(
        forward=anatomy.forward_bytes,
        prepared=problem.width * prepared,
        gradients=problem.width * anatomy.gradient_numel,
        stacked=problem.width * stacked,
        general=anatomy.forward_bytes * (1 + problem.outputs),
        narrowest=min(channels, default=WIDE_ENOUGH),
    )


def _tile(sizes: _Sizes, problem: Problem, budget: int) -> tuple[int, int]:
    """Samples and outputs that go through the network at once."""
    at_once = min(problem.outputs, max(1, 2 * WIDE_ENOUGH // sizes.narrowest) if sizes.narrowest < WIDE_ENOUGH else 1)
    while at_once > 1 and sizes.structured(at_once) > budget:
        at_once //= 2
    each = sizes.structured(at_once)
    if each > budget:
        raise MemoryError(
            f"max_memory: one sample takes {mebibytes(each)} on its way through the network and {mebibytes(budget)} are left for it; "
            f"allow at least {mebibytes(4 * each)}, or use a smaller network"
        )
    fit = min(budget, max(FORWARD_TARGET, each)) // max(each, 1)
    # Tiles of equal size: a small last one would pay for a pass through the network all the same.
    count = -(-problem.rows // max(1, fit))
    return -(-problem.rows // count), at_once


def general_rows(kept: int, working: int, rows: int) -> int:
    """Samples whose rows are formed by torch.func at once, several copies of them beside their activations."""
    return max(1, min(rows, FORWARD_TARGET // max(1, working + COPIES * kept)))


def _passes(
    found: Sequence[Contribution], ruled: int, problem: Problem, budget: int, sizes: _Sizes, tile: int
) -> list[Pass]:
    passes: list[Pass] = []
    if ruled:
        passes += _cut(list(range(ruled)), found, problem, budget, sizes, tile, general=False)
    if len(found) > ruled:
        passes += _cut(list(range(ruled, len(found))), found, problem, budget, sizes, tile, general=True)
    return passes


def _cut(
    indices: list[int],
    found: Sequence[Contribution],
    problem: Problem,
    budget: int,
    sizes: _Sizes,
    tile: int,
    *,
    general: bool,
) -> list[Pass]:
    """Outputs first, then layers, then blocks of samples."""

    def kept(group: Sequence[int], outputs: int) -> int:
        return sum(found[k].kept_bytes(outputs) for k in group)

    def working(group: Sequence[int], outputs: int) -> int:
        if not general:
            return 0  # counted once for all passes
        each = kept(group, outputs)
        return general_rows(each, sizes.general, problem.rows) * (sizes.general + COPIES * each)

    def fits(group: Sequence[int], outputs: int) -> bool:
        return problem.rows * kept(group, outputs) + working(group, outputs) <= budget

    def make(group: Sequence[int], outputs: tuple[int, int], rows: int) -> Pass:
        held = kept(group, outputs[1] - outputs[0])
        blocks = 1 if rows == problem.rows else 2
        bytes_held = blocks * rows * held + working(group, outputs[1] - outputs[0])
        held_here = kept(group, outputs[1] - outputs[0])
        through = general_rows(held_here, sizes.general, rows) if general else tile
        return Pass(tuple(group), outputs, rows, through, bytes_held, general)

    total = problem.outputs
    if fits(indices, total):
        return [make(indices, (0, total), problem.rows)]
    if problem.trace:
        size = total
        while size > 1 and not fits(indices, size):
            size = (size + 1) // 2
        if fits(indices, size):
            cuts = range(0, total, size)
            return [make(indices, (start, min(start + size, total)), problem.rows) for start in cuts]
    groups: list[list[int]] = [[]]
    for index in indices:
        if groups[-1] and not fits([*groups[-1], index], total):
            groups.append([])
        groups[-1].append(index)
    return [_whole_or_blocks(group, found, problem, budget, fits, kept, working, make) for group in groups]


def _whole_or_blocks(
    group: Sequence[int],
    found: Sequence[Contribution],
    problem: Problem,
    budget: int,
    fits: Callable[[Sequence[int], int], bool],
    kept: Callable[[Sequence[int], int], int],
    working: Callable[[Sequence[int], int], int],
    make: Callable[[Sequence[int], tuple[int, int], int], Pass],
) -> Pass:
    total = problem.outputs
    if fits(group, total):
        return make(group, (0, total), problem.rows)
    each = kept(group, total)
    rows = (budget - working(group, total)) // (2 * each)
    if rows < 1:
        layer = found[group[0]]
        raise MemoryError(
            f"max_memory: layer {layer.layer} ({layer.way}) keeps {mebibytes(each)} a sample and two must fit in {mebibytes(budget)}; "
            f"allow {mebibytes(4 * each)} more, use outputs='sum' or 'projected', or leave the layer out by parameters="
        )
    return make(group, (0, total), min(rows, problem.rows))


def _smaller(problem: Problem, allowed: int) -> str:
    """What would fit."""
    stride = 1 if problem.trace else problem.outputs
    samples = int((allowed / 2 / 8) ** 0.5 / stride)
    options = [f"about {samples} samples would fit"] if samples > 1 else ["allow more"]
    if not problem.trace:
        options.append("outputs='trace' needs a matrix smaller by the square of the number of outputs")
    return "; ".join(options)
