"""``Work``: what one of several ranks does for a kernel, in flops, bytes and messages; ``work_of`` derives it from a plan."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_conv.arguments import require_whole
from lightning_conv.kernels.planning.computed import (
    NOTHING,
    Amounts,
    at_each_rank,
    divisible,
    of_inputs,
    outputs_of,
    weights,
)
from lightning_conv.kernels.planning.costs import samples_passed
from lightning_conv.kernels.planning.passes import Pass
from lightning_conv.kernels.planning.plan import NTKPlan, pass_flops
from lightning_conv.machine.processes import PIECE

MEETINGS = 3
"""Times that all ranks meet in a measurement before and after the engine: for the rounding of the Jacobian and the choice of a path."""

PER_MEETING = 4
"""Messages to or from each other rank in a meeting: a barrier, and the size and the bytes of what is gathered."""

PER_FACTOR = 2
"""Tensors of a layer that travel: its inputs and its output gradients."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank does for a kernel; of several ranks, the one with the most to do.

    Attributes:
        ranks: Number W of ranks.
        by: How the kernel is divided: ``"outputs"``, ``"samples"``, ``"parameters"`` (a sharded module, whose ranks all do the same), or
            ``"nothing"``.
        computed: What the rank computes.
        same: The part of it that does not become less with more ranks.
        sent: Bytes of factors and matrices that are sent to other ranks.
        messages: Messages to and from other ranks, those of meetings included.
        memory: Bytes of the additional memory in use at the peak.
        gathered: Bytes of parameters that are sent to other ranks while a sharded module runs.
        eigenvalues: Flops of the eigenvalues of an n x n kernel in float64, which the first rank computes while the others wait.
    """

    ranks: int
    by: str
    computed: Amounts
    same: Amounts
    sent: float
    messages: float
    memory: float
    gathered: float
    eigenvalues: float


def work_of(
    plan: NTKPlan,
    ranks: int = 1,
    *,
    sharded: bool = False,
    frozen: float = 0.0,
    others: int = 0,
    rate: float | None = None,
) -> Work:
    r"""Return what each of W ranks does for the kernel of a plan, in the division that the engine makes.

    Divided by outputs, a rank takes all n samples through the forward pass, and :math:`\lceil K / W \rceil` of the K outputs through the
    backward pass. Divided by samples, it takes n / W samples through both. A kernel of fewer samples than ranks is not divided, nor one
    whose factors take longer to send than the kernel takes to compute. Of a sharded module each rank makes all passes and products, and
    the parameters are gathered in each of them.

    Args:
        plan: Of one process, from ``plan_ntk``.
        ranks: Their number W.
        sharded: Whether the parameters are divided among the ranks (``fully_shard``).
        frozen: Flops of a forward pass of one sample in layers that the kernel is not over, which no plan counts.
        others: Number of parameters that the kernel is not over; a sharded module gathers them in forward passes.
        rate: As for ``NTKPlan.divided``.

    Raises:
        TypeError: ``ranks`` is no whole number.
        ValueError: ``ranks`` is less than 1, or the samples of the kernel couple.
    """
    require_whole("ranks", ranks, least=1)
    if any(each.way == "whole batch" for each in plan.contributions):
        raise ValueError(
            'plan: the samples couple (batch_norm="batch"), and the passes of such a kernel are not modelled; plan it with '
            'batch_norm="eval"'
        )
    problem, alone = plan.problem, ranks == 1
    division = None if sharded else plan.divided(ranks, rate).division
    by = "parameters" if sharded and not alone else "nothing" if division is None else division.by
    repeats, whole = groups(plan), divisible(plan, frozen)
    share, same = 1.0, NOTHING
    if by == "outputs":
        share, same = -(-problem.outputs // ranks) / problem.outputs, of_inputs(plan, frozen)
    elif by == "samples":
        share = 1 / ranks
    elif not alone:
        same = whole
    once = at_each_rank(plan, ranks, frozen)
    return Work(
        ranks=ranks,
        by=by,
        computed=once.plus(same, repeats * (1 - share)).plus(whole, repeats * share),
        same=once.plus(same, repeats),
        sent=0.0 if division is None else repeats * division.sent,
        messages=0.0 if alone else repeats * _messages(plan, ranks, by, others),
        memory=_memory(plan, ranks, by, share),
        gathered=repeats * _gathered(plan, others) * (ranks - 1) / ranks if by == "parameters" else 0.0,
        eigenvalues=4 / 3 * problem.samples**3,
    )


def groups(plan: NTKPlan) -> float:
    """Return how many times the passes of a plan are run, each time for another group of projections.

    Args:
        plan: The plan.
    """
    products = sum(each.flops for each in plan.contributions)
    passes = sum(pass_flops(each, plan.reading, plan.problem, plan.general_pass) for each in plan.passes)
    return plan.flops / (passes + products) if passes + products else 1.0


def meetings(plan: NTKPlan, ranks: int, by: str) -> int:
    """Return how often all ranks meet in a measurement, to send something or to see whether one of them has failed.

    Args:
        plan: The plan.
        ranks: Number of ranks, at least 2.
        by: How the kernel is divided, as in ``Work``.
    """
    if by == "outputs":  # after the passes, for the sum of the matrices, and for what each rank has found
        return MEETINGS + 3
    if by != "samples":
        return MEETINGS
    others = ranks - 1
    partners = others if plan.problem.others else ranks // 2
    late = others if _late(plan) else 0
    return MEETINGS + 2 + len(plan.passes) * (2 + 2 * partners + late)


def _late(plan: NTKPlan) -> int:
    """Return of how many layers the gradients are formed late, by channels."""
    return 0 if plan.problem.others else sum(each.formed_late for each in plan.contributions)


def _messages(plan: NTKPlan, ranks: int, by: str, frozen: int) -> float:
    """Return the messages of a rank to and from others: data, and those by which ranks meet."""
    others = ranks - 1
    if by == "parameters":  # of the layers that are gathered; frozen ones are taken to be as large as the others
        layer = plan.problem.width * weights(plan) / max(1, len(plan.contributions))
        return _gathered(plan, frozen) / layer * others
    met = float(PER_MEETING * meetings(plan, ranks, by) * others)
    if by == "outputs":
        return met + 2 * others  # a sum of the matrices, in a ring
    if by != "samples":
        return met
    partners = others if plan.problem.others else ranks // 2
    layers, late = len(plan.contributions), _late(plan)
    travelling = PER_FACTOR * len(plan.passes) * (partners * (layers - late) + others * late)
    mine = plan.result_bytes / 8 / (1 if plan.problem.others else 2) / ranks
    return met + travelling + (2 if late else max(1.0, mine / PIECE)) * others


def _gathered(plan: NTKPlan, frozen: int) -> float:
    """Return the bytes of the parameters that are gathered: all in a forward pass of a tile, those of the kernel in each backward pass."""
    tiles = [-(-samples_passed(plan.problem, each.rows) // each.tile) for each in plan.passes]
    backward = sum(count * outputs_of(each) for count, each in zip(tiles, plan.passes, strict=True))
    return plan.problem.width * (sum(tiles) * (weights(plan) + frozen) + backward * weights(plan))


def _memory(plan: NTKPlan, ranks: int, by: str, share: float) -> float:
    """Return the bytes of a rank: factors of fewer outputs, or of its own samples and those that it receives."""
    held = max((each.bytes for each in plan.passes), default=0)
    if by == "outputs":
        own = max(_held(plan, each, max(1, round(share * outputs_of(each)))) for each in plan.passes)
    elif by == "samples":
        own = 2 * held // ranks
    else:
        return float(plan.bytes)
    return float(max(plan.bytes - held + min(held, own), plan.reading_bytes))


def _held(plan: NTKPlan, one: Pass, outputs: int) -> int:
    """Return the bytes of the factors of a pass for so many outputs."""
    return one.rows * sum(plan.contributions[index].kept_bytes(outputs) for index in one.contributions)
