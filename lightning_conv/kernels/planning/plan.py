"""``NTKPlan``: the form of each layer, the passes, the bytes and the flops of a kernel; ``make_plan`` chooses them.

Nothing is computed before the plan stands, so a kernel that does not fit its memory is refused before any work is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lightning_conv.kernels.planning.costs import (
    Contribution,
    Problem,
    contribution,
    general_contribution,
    network_flops,
    samples_passed,
)
from lightning_conv.kernels.planning.division import Division, division
from lightning_conv.kernels.planning.pass_cost import PassCost
from lightning_conv.kernels.planning.passes import Cutter, Pass
from lightning_conv.kernels.planning.sizes import (
    measuring_bytes,
    product_bytes,
    sample_sizes,
    tile_sizes,
    what_fits,
    workspace_bytes,
)
from lightning_conv.kernels.planning.strips import strip_cost, strip_count
from lightning_conv.kernels.products.precision import Precision, product_rate
from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy
from lightning_conv.machine.memory import allowed_memory, mebibytes
from lightning_conv.networks.narrow_watch import FEW

BUFFERS = 8 * 2**20
"""Bytes that the libraries of matrix products and the allocator keep for themselves (an eighth of the allowed memory
where that is less)."""

EFFICIENCY = 0.6
"""Share of the calibrated rate that whole kernels reach; used to predict seconds."""

FORMED_ENTRY = 300
"""Flops of a matrix product that take as long as ``torch.func`` needs to form and store one entry of a Jacobian
(measured: 290-400)."""

MEASURING = 12
"""Forwards of a sample that take as long as measuring its rounding: two gradients and one in the other precision.
Those of a large network are timed."""

CONTRACTED_ENTRY = 2000
"""Flops of a float32 product that take as long as an entry of the combinations, scaled for its pass and counted in a norm."""


@dataclass(frozen=True)
class NTKPlan:
    """How ``ntk_gram`` will compute a kernel, and what it will cost; ``print`` it for a table of the layers."""

    problem: Problem
    contributions: tuple[Contribution, ...]
    passes: tuple[Pass, ...]
    outputs_at_once: int
    workspace: int
    """Bytes of one of the two buffers in which per-sample gradients are formed."""
    precision: Precision
    flops: float
    """Flops of the forward and backward passes and of all products, where a multiplication and an addition count as
    two. Reading the network is not included."""
    bytes: int
    """Peak of the additional memory in use, with the result; what an allocator keeps after it was freed is not in it. Copies
    of the parameters, with which rounding is measured, and what reading three samples takes are parts of it that ``max_memory``
    does not bound. Outputs of all samples are held while they are compared between batches, or as many of them as fit into a quarter
    of ``max_memory``."""
    result_bytes: int
    reading_bytes: int
    """Bytes that reading the network takes before the passes begin. They are part of ``bytes`` but not bounded by
    ``max_memory``."""
    seconds: float
    """Predicted duration of a call of ``ntk_gram``: ``reading_seconds`` and ``staging_seconds``, plus the flops at the rate
    of a matrix product that was measured in this process (passes of a large network or a whole batch: at the speed of one that was
    timed). Usually right within a factor of 3."""
    reading_seconds: float
    """Seconds that reading the network has just taken, a part of ``seconds``. Zero for a kernel that was given a
    ``plan``."""
    max_memory: int
    parameters: tuple[str, ...] = field(repr=False)
    """Names of the parameters, in the order in which they were read."""
    reading: Anatomy = field(repr=False)
    """What was found in the network."""
    general_pass: PassCost | None = field(repr=False)
    """Cost of a pass for the parameters without a layer rule; None where there are none."""
    staging_seconds: float = 0.0
    """Seconds that it took to copy the model and to try the copy, a part of ``seconds`` that every call takes."""
    division: Division | None = None
    """How passes and products are divided among processes; None: they are not. ``flops``, ``bytes`` and ``seconds`` are those of one
    process that does all."""

    def divided(self, processes: int, rate: float | None = None) -> NTKPlan:
        """Return the plan with the cheaper division among so many processes; where samples couple there is none.

        Args:
            processes: Their number.
            rate: Flops per second of each, where sending may take longer than computing; None: dividing pays.
        """
        if processes < 2 or not self.passes or min(self.problem.samples, self.problem.others or processes) < processes:
            return replace(self, division=None)
        network = network_flops(self.reading.sites)
        return replace(self, division=division(self.contributions, self.problem, network, processes, rate))

    @property
    def sample_bytes(self) -> int:
        """Bytes of the activations of one sample in a forward pass with its graph, such as the logits of all positions and words.

        Below a few times this no kernel is computed; however many samples and words there are, no more of it is needed at once.
        """
        return self.reading.forward_bytes

    def __str__(self) -> str:
        lines = [
            f"NTK of {self.problem.samples} samples x {self.problem.outputs} outputs: {self.flops / 1e9:.1f} Gflop, "
            f"at most {mebibytes(self.bytes)} of {mebibytes(self.max_memory)}, about {self.seconds:.2g} s "
            f"({self.reading_seconds:.2g} s of them to read the network), {len(self.passes)} pass(es)"
        ]
        width = max((len(c.layer) for c in self.contributions), default=0)
        lines += [
            f"  {c.layer:<{width}}  {c.way:<20}  {c.flops / 1e9:9.3f} Gflop  {c.kind}" for c in self.contributions
        ]
        lines.append(f"  one sample takes {mebibytes(self.sample_bytes)} on its way through the network")
        if self.division is not None:
            lines.append(f"  {self.division}")
        if self.reading.unused:
            lines.append(f"  no sample reaches {', '.join(self.reading.unused)}")
        return "\n".join(lines)


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
    staging_seconds: float = 0.0,
    general: PassCost | None = None,
    measured: int = 0,
    copies: int = 0,
) -> NTKPlan:
    """Choose the cheapest form for every site, and cut the work into pieces that fit into ``max_memory``.

    The work is cut in this order, from the cheapest cut to the most expensive one:

    1. samples on their way through the network;
    2. outputs, if the kernel is summed over them (one more forward pass for each piece);
    3. layers (one more forward and backward pass for each piece);
    4. blocks of samples (the number of passes grows with the number of blocks).

    Args:
        anatomy: what was found in the network.
        problem: the sizes of the kernel.
        precision: precision of the products.
        matrices: number of n x n results that are kept in memory.
        repeats: how many times the passes are run, each time for other combinations of outputs.
        max_memory: number of bytes, such as ``2**30`` or ``1e9``; None: a quarter of the free memory.
        device: where the kernel is computed.
        couples: whether the samples couple. The rows of J then come from backward passes over the whole batch, and
            ``coupled_gram`` cuts the work itself.
        reading_seconds: seconds that it took to find ``anatomy``.
        staging_seconds: seconds that it took to copy the model and to try the copy, which every call does.
        general: cost of a pass for the parameters without a layer rule: for one sample or, where samples couple, for
            all.
        measured: number of samples on which the rounding of contracted rows is measured at the end.
        copies: bytes of the parameters and gradients for that.

    Raises:
        ValueError: ``max_memory`` is not a finite number of at least one byte.
        MemoryError: the kernel does not fit; the message says what takes the memory and what would fit.
    """
    allowed = allowed_memory(max_memory, device)
    found = [contribution(site, problem) for site in anatomy.sites]
    found += [
        general_contribution(name, anatomy.general_sizes[name], reason, problem)
        for name, reason in anatomy.general.items()
    ]
    stride = 1 if problem.trace else problem.outputs
    result = 8 * matrices * problem.samples * (problem.others or problem.samples) * stride**2
    temporary = product_bytes(found, anatomy, problem, precision) + min(BUFFERS, allowed // 8)
    left = allowed - result - temporary
    if left <= 0:
        raise MemoryError(
            f"max_memory: the kernel with the temporaries of its products takes {mebibytes(result + temporary)} of the allowed "
            f"{mebibytes(allowed)}; {what_fits(problem, allowed, result + temporary)}"
        )
    if couples:
        kind = "samples couple: a backward pass for every row"
        both = problem.samples**2 / problem.pairs  # both triangles are multiplied
        found = [replace(one, way="whole batch", kind=kind, flops=both * one.flops) for one in found]
        passes: tuple[Pass, ...] = ()
        workspace, at_once, peak = 0, 1, allowed - result - temporary
    else:
        workspace = workspace_bytes(anatomy, found, problem, left)
        sizes = sample_sizes(anatomy, found, problem)
        tile, at_once = tile_sizes(sizes, problem, (left - 2 * workspace) // 2)
        working = tile * sizes.structured(at_once) if anatomy.sites else 0
        budget, ruled = left - 2 * workspace - working, len(anatomy.sites)
        kinds = ((False, range(ruled)), (True, range(ruled, len(found))))
        cutters = [(Cutter(found, problem, budget, kind, tile, sizes.general), own) for kind, own in kinds if own]
        passes = tuple(one for cutter, own in cutters for one in cutter.cut(own))
        peak = 2 * workspace + max((p.bytes + (0 if p.general else working) for p in passes), default=0)
    products, rate = sum(c.flops for c in found), product_rate(device, precision)
    if couples:
        room = allowed - result - 3 * result // matrices  # as ``memory_budget`` has it
        per_layer = matrices > (2 if repeats > 1 else 1)
        strips = strip_count(found, problem, anatomy, room, per_layer, precision)
        flops, seconds = strip_cost(strips, problem, general)
    else:
        flops = sum(pass_flops(each, anatomy, problem, general) for each in passes)
        formed = sum(_formed_entries(each, found, problem) for each in passes if each.general)
        seconds = FORMED_ENTRY * formed / (EFFICIENCY * rate)
    slower = 2.5 if precision == "exact" else 1.0
    seconds += slower * products / (EFFICIENCY * rate)
    each = MEASURING * network_flops(anatomy.sites)[0] / (EFFICIENCY * rate)
    if anatomy.is_large and not couples:
        # What was timed counts the layers without trainable parameters, too, which have no rule.
        seconds += sum(_pass_seconds(one, anatomy, problem, general) for one in passes)
        each = MEASURING * anatomy.forward_seconds if anatomy.alone is None else anatomy.alone.measuring
        if anatomy.alone is not None and anatomy.alone.outside:
            seconds += 2 * min(FEW, problem.samples) * anatomy.forward_seconds / repeats
    elif not couples:
        seconds += slower * flops / (EFFICIENCY * rate)
    if measured:
        each += (
            CONTRACTED_ENTRY * problem.rows * anatomy.outputs / measured / (EFFICIENCY * product_rate(device, "fast"))
        )
    seconds += measured * each
    measuring = result + copies + measured * measuring_bytes(anatomy) if measured else 0
    return NTKPlan(
        problem=problem,
        contributions=tuple(found),
        passes=passes,
        outputs_at_once=at_once,
        precision=precision,
        flops=repeats * (products + flops),
        workspace=workspace,
        bytes=max(result + temporary + peak, measuring, anatomy.reading_bytes),
        result_bytes=result,
        reading_bytes=anatomy.reading_bytes,
        seconds=reading_seconds + staging_seconds + repeats * seconds,
        reading_seconds=reading_seconds,
        staging_seconds=staging_seconds,
        max_memory=allowed,
        parameters=anatomy.parameters,
        reading=anatomy,
        general_pass=general,
    )


def pass_flops(each: Pass, anatomy: Anatomy, problem: Problem, general: PassCost | None) -> float:
    """Return the flops of the network in one pass of the plan: a forward, and a backward for every output.

    Args:
        each: the pass.
        anatomy: what was found in the network.
        problem: the sizes of the kernel.
        general: cost of a pass for the parameters without a layer rule.
    """
    forward, backward = network_flops(anatomy.sites)
    if each.general:
        assert general is not None
        forward, backward = general.forward, general.backward
    return samples_passed(problem, each.rows) * (forward + (each.outputs[1] - each.outputs[0]) * backward)


def _pass_seconds(each: Pass, anatomy: Anatomy, problem: Problem, general: PassCost | None) -> float:
    """Return the duration of the network's part of a pass from that of the passes that were timed when it was read."""
    forward, backward = anatomy.forward_seconds, anatomy.backward_seconds
    if anatomy.alone is not None:
        # Between a sample by itself and as many as were read together, of which more are hardly faster.
        together = min(1.0, (each.tile - 1) / (READ_SAMPLES - 1))
        forward = together * forward + (1 - together) * anatomy.alone.forward
        backward = together * backward + (1 - together) * anatomy.alone.backward
    if each.general:
        assert general is not None
        backward = general.backward_seconds
    return samples_passed(problem, each.rows) * (forward + (each.outputs[1] - each.outputs[0]) * backward)


def _formed_entries(each: Pass, found: Sequence[Contribution], problem: Problem) -> float:
    """Return how many entries of Jacobian rows a pass by ``torch.func`` forms."""
    size = sum(found[index].output_bytes // problem.width for index in each.contributions)
    return samples_passed(problem, each.rows) * (each.outputs[1] - each.outputs[0]) * size
