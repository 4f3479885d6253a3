"""Make the plan of a kernel: choose a form for every layer and cut the work so that it keeps to its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lightning_conv.kernels.engine.coupled import strip_width
from lightning_conv.kernels.engine.factors import TILE
from lightning_conv.kernels.engine.formed import WIDE_ENOUGH
from lightning_conv.kernels.plan import NTKPlan, Pass
from lightning_conv.kernels.planning.costs import (
    Contribution,
    Problem,
    contribution,
    general_contribution,
    network_flops,
    samples_passed,
)
from lightning_conv.kernels.planning.memory import allowed_memory, mebibytes
from lightning_conv.kernels.planning.pass_flops import PassCost
from lightning_conv.kernels.planning.passes import FORWARD_TARGET, Cutter
from lightning_conv.kernels.products.gemm import calibrated
from lightning_conv.kernels.products.precision import DOUBLE_BLOCK, Precision
from lightning_conv.kernels.reading.discovery import Anatomy

WORKSPACE = 128 * 2**20
"""Bytes in which per-sample gradients are formed to be multiplied at once: larger pieces are not faster."""

BUFFERS = 8 * 2**20
"""Bytes that the libraries of matrix products and the allocator keep beside what is asked of them (an eighth of the allowed
memory where that is less)."""

EFFICIENCY = 0.6
"""Share of the calibrated rate that whole kernels reach, for the prediction of seconds."""

FORMED_ENTRY = 300
"""Flops of a product that take as long as ``torch.func`` needs to form one number of a Jacobian and to put it away (measured:
290-400)."""


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
    max_memory: float | None,
    device: torch.device,
    couples: bool = False,
    reading_seconds: float = 0.0,
    general: PassCost | None = None,
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
        max_memory: bytes, such as ``2**30`` or ``1e9``; None: a quarter of what is free.
        device: where.
        couples: samples couple: rows of J come from backward passes over the whole batch, cut by ``coupled_gram`` itself.
        reading_seconds: that it took to find ``anatomy``.
        general: what a pass costs for the parameters without a rule, of one sample or, where samples couple, of all.

    Raises:
        ValueError: ``max_memory`` is not a finite number of at least one byte.
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
    temporary = _product_bytes(found, anatomy, problem, precision) + min(BUFFERS, allowed // 8)
    left = allowed - result - temporary
    if left <= 0:
        raise MemoryError(
            f"max_memory: the kernel with the temporaries of its products takes {mebibytes(result + temporary)} of the allowed "
            f"{mebibytes(allowed)}; {_smaller(problem, allowed, result + temporary)}"
        )
    if couples:
        kind = "samples couple: a backward pass for every row"
        both = problem.samples**2 / problem.pairs  # both triangles are multiplied
        found = [replace(one, way="whole batch", kind=kind, flops=both * one.flops) for one in found]
        passes: tuple[Pass, ...] = ()
        workspace, at_once, peak = 0, 1, allowed - result - temporary
    else:
        workspace = _workspace(anatomy, found, problem, left)
        sizes = _sizes(anatomy, found, problem)
        tile, at_once = _tile(sizes, problem, (left - 2 * workspace) // 2)
        working = tile * sizes.structured(at_once) if anatomy.sites else 0
        passes = _passes(found, len(anatomy.sites), problem, left - 2 * workspace - working, sizes, tile)
        peak = 2 * workspace + max((p.bytes + (0 if p.general else working) for p in passes), default=0)
    products, rate = sum(c.flops for c in found), _rate(device, precision)
    if couples:
        room = allowed - result - 3 * result // matrices  # as ``memory_budget`` has it
        per_layer = matrices > (2 if repeats > 1 else 1)
        strips = _strips(found, problem, anatomy, room, per_layer, precision)
        flops, seconds = _whole_batch(strips, problem, general)
    else:
        flops = sum(_pass_flops(each, anatomy, problem, general) for each in passes)
        formed = sum(_formed_entries(each, found, problem) for each in passes if each.general)
        seconds = FORMED_ENTRY * formed / (EFFICIENCY * rate)
    slower = 2.5 if precision == "exact" else 1.0
    seconds += slower * (products + (0.0 if couples else flops)) / (EFFICIENCY * rate)
    return NTKPlan(
        problem=problem,
        contributions=tuple(found),
        passes=passes,
        outputs_at_once=at_once,
        precision=precision,
        flops=repeats * (products + flops),
        workspace=workspace,
        bytes=max(result + temporary + peak, anatomy.reading_bytes),
        result_bytes=result,
        reading_bytes=anatomy.reading_bytes,
        seconds=reading_seconds + repeats * seconds,
        reading_seconds=reading_seconds,
        max_memory=allowed,
        parameters=anatomy.parameters,
        reading=anatomy,
        general_pass=general,
    )


def _workspace(anatomy: Anatomy, found: Sequence[Contribution], problem: Problem, left: int) -> int:
    """Bytes of one piece of memory in which gradients are formed; two are held.

    Raises:
        MemoryError: a single output channel does not fit.
    """
    late = [site for site, one in zip(anatomy.sites, found, strict=False) if one.formed_late]
    channel = [problem.rows * problem.outputs * problem.width * site.inputs for site in late]
    whole = [size * site.gradients for size, site in zip(channel, late, strict=True)]
    workspace = max(max(channel, default=0), min(WORKSPACE, max(whole, default=0), left // 8))
    if 2 * workspace >= left:
        raise MemoryError(
            f"max_memory: forming the gradients of one output channel takes {mebibytes(2 * workspace)} and {mebibytes(left)} are left "
            "beside the kernel; allow more, or use fewer samples or outputs"
        )
    return workspace


def _passes(
    found: Sequence[Contribution], ruled: int, problem: Problem, budget: int, sizes: _Sizes, tile: int
) -> tuple[Pass, ...]:
    passes: list[Pass] = []
    for general, indices in ((False, range(ruled)), (True, range(ruled, len(found)))):
        if len(indices):
            passes += Cutter(found, problem, budget, general, tile, sizes.general).cut(indices)
    return tuple(passes)


def _rate(device: torch.device, precision: Precision) -> float:
    dtype = torch.float64 if precision == "certified" else torch.float32
    return calibrated(device.type, dtype, torch.get_num_threads())[1]


def _pass_flops(each: Pass, anatomy: Anatomy, problem: Problem, general: PassCost | None) -> float:
    """Of the network, in one pass of the plan: a forward and a backward for every output."""
    forward, backward = network_flops(anatomy.sites)
    if each.general:
        assert general is not None
        forward, backward = general.forward, general.backward
    return samples_passed(problem, each.rows) * (forward + (each.outputs[1] - each.outputs[0]) * backward)


def _formed_entries(each: Pass, found: Sequence[Contribution], problem: Problem) -> float:
    """Numbers of the Jacobian rows that a pass by ``torch.func`` forms."""
    size = sum(found[index].output_bytes // problem.width for index in each.contributions)
    return samples_passed(problem, each.rows) * (each.outputs[1] - each.outputs[0]) * size


def _strips(
    found: Sequence[Contribution], problem: Problem, anatomy: Anatomy, room: int, per_layer: bool, precision: Precision
) -> int:
    """How often the batch is passed through the network where samples couple: once for every strip of columns of J."""
    dtype = torch.float64 if problem.width == 8 else torch.float32
    sizes: dict[str, int] = {}
    for one in found:
        layer = one.layer if per_layer else ""
        sizes[layer] = sizes.get(layer, 0) + sum(anatomy.general_sizes[name] for name in one.parameters)
    rows = problem.samples * problem.outputs
    left = max(1, room - problem.samples * anatomy.forward_bytes)
    return sum(-(-size // strip_width(size, rows, left, dtype, precision)) for size in sizes.values())


def _whole_batch(strips: int, problem: Problem, general: PassCost | None) -> tuple[float, float]:
    """Flops and seconds of the passes where samples couple: for every strip a forward, and a backward for every row of J.

    Strips of a part of the parameters cost less than that: the gradients of the others are not taken.
    """
    if general is None:  # the outputs depend on no parameter
        return 0.0, 0.0
    rows = problem.samples * problem.outputs
    return strips * (general.forward + rows * general.backward), strips * rows * general.backward_seconds


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
    prepared = sum(s.positions * s.groups * s.inputs for s, one in planned if s in formed and not one.formed_late)
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


def _smaller(problem: Problem, allowed: int, needed: int) -> str:
    """What would fit."""
    stride = 1 if problem.trace else problem.outputs
    samples = int((allowed / 2 / 8) ** 0.5 / stride)
    options = [
        f"about {samples} samples would fit" if 1 < samples < problem.samples else f"allow {mebibytes(2 * needed)}"
    ]
    if not problem.trace:
        options.append("outputs='trace' needs a matrix smaller by the square of the number of outputs")
    return "; ".join(options)
