"""``Amounts``: flops and bytes that a rank computes with, by kind of work, derived from the contributions and passes of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_conv.kernels.planning.costs import network_flops, samples_passed
from lightning_conv.kernels.planning.passes import Pass
from lightning_conv.kernels.planning.plan import NTKPlan, pass_flops
from lightning_conv.kernels.planning.sizes import TILE
from lightning_conv.kernels.reading.anatomy import READ_SAMPLES

DOUBLE = 2
"""Flops in float32 that take as long as one in float64."""

TOUCHED = 3
"""Times that a number of a tile passes through memory: read as a product, read as another one, and added."""

ADDED = 32
"""Bytes that pass through memory when an entry of a layer is added to the matrix: converted to float64 (4 + 8), read, added and written."""

COPIES = 6
"""Times that the parameters pass through memory: copied for the kernel, copied in float64 (twice as large), and read in both passes."""

OF_PATCHES = ("patch Gram", "token Gram", "tied Gram")
"""Ways in which a tile has all positions of a few samples."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What a rank does, by the kind of work: each kind has a rate of its own.

    Attributes:
        matrices: Flops of products of large matrices: of the layers' factors, and of passes through linear layers.
        small: Flops of many small products: passes through convolutions, and those that form per-sample gradients.
        moved: Bytes that pass through memory in elementwise work, activations and copies of the parameters.
    """

    matrices: float
    small: float
    moved: float

    def plus(self, other: Amounts, times: float = 1.0) -> Amounts:
        """Return the sum with a multiple of others.

        Args:
            other: The others.
            times: Their factor.
        """
        return Amounts(
            matrices=self.matrices + times * other.matrices,
            small=self.small + times * other.small,
            moved=self.moved + times * other.moved,
        )


NOTHING = Amounts(matrices=0.0, small=0.0, moved=0.0)


def divisible(plan: NTKPlan, frozen: float = 0.0) -> Amounts:
    """Return what the passes and products of a plan take, which are divided among ranks.

    Args:
        plan: The plan.
        frozen: As for ``work_of``.
    """
    problem, passed = plan.problem, _passed(plan)
    passes = sum(pass_flops(each, plan.reading, problem, plan.general_pass) for each in plan.passes) + frozen * passed
    formed, convolved = forming(plan), convolutions(plan)
    activations = sum(samples_passed(problem, each.rows) * (1 + outputs_of(each)) for each in plan.passes)
    return Amounts(
        matrices=(1 - convolved) * passes + multiplying(plan),
        small=convolved * passes + formed,
        moved=plan.sample_bytes * activations + TOUCHED * problem.width * multiplied(plan) + ADDED * added(plan),
    )


def of_inputs(plan: NTKPlan, frozen: float = 0.0) -> Amounts:
    """Return what does not depend on the outputs, and is repeated by each rank where they are divided: forward passes, products of inputs.

    Args:
        plan: The plan.
        frozen: As for ``work_of``.
    """
    passed, convolved = _passed(plan), convolutions(plan)
    forward = passed * (network_flops(plan.reading.sites)[0] + frozen)
    return Amounts(
        matrices=(1 - convolved) * forward + multiplying(plan) / (plan.problem.outputs + 1),
        small=convolved * forward,
        moved=plan.sample_bytes * passed,
    )


def at_each_rank(plan: NTKPlan, ranks: int, frozen: float = 0.0) -> Amounts:
    """Return what each rank does whatever the others do: rounding on a sample or more, copies of parameters, the matrix of the kernel.

    Args:
        plan: The plan.
        ranks: Number of ranks; the samples on which rounding is measured are divided among them.
        frozen: As for ``work_of``.
    """
    problem, convolved = plan.problem, convolutions(plan)
    forward, backward = network_flops(plan.reading.sites)
    looked = (1 + DOUBLE) * -(-READ_SAMPLES // ranks) * (forward + backward + frozen)
    matrix = 8.0 * problem.samples * (problem.others or problem.samples)
    return Amounts(
        matrices=(1 - convolved) * looked,
        small=convolved * looked,
        moved=COPIES * problem.width * weights(plan) + TOUCHED * matrix,
    )


def weights(plan: NTKPlan) -> int:
    """Return the number of parameters that the kernel of a plan is over.

    Args:
        plan: The plan.
    """
    return sum(site.numel for site in plan.reading.sites) + sum(plan.reading.general_sizes.values())


def convolutions(plan: NTKPlan) -> float:
    """Return which share of the flops of a forward pass is that of convolutions.

    Args:
        plan: The plan.
    """
    flops = sum(each.flops for each in plan.reading.sites)
    return sum(each.flops for each in plan.reading.sites if "convolution" in each.kind) / flops if flops else 0.0


def _passed(plan: NTKPlan) -> float:
    return sum(samples_passed(plan.problem, each.rows) for each in plan.passes)


def forming(plan: NTKPlan) -> float:
    """Return the flops that form per-sample gradients, in many small products as those of a pass are.

    Args:
        plan: The plan.
    """
    pairs = zip(plan.reading.sites, plan.contributions, strict=False)
    formed = [site.flops for site, one in pairs if one.way == "per-sample gradients"]
    return plan.problem.rows * plan.problem.outputs * float(sum(formed))


def multiplying(plan: NTKPlan) -> float:
    """Return the flops of the products of factors: those of the plan, and the second halves of the tiles on the diagonal.

    Args:
        plan: The plan.
    """
    problem, found = plan.problem, 0.0
    sites = [*plan.reading.sites, *[None] * (len(plan.contributions) - len(plan.reading.sites))]
    for site, one in zip(sites, plan.contributions, strict=True):
        flops = one.flops
        if site is not None and one.way == "per-sample gradients":
            flops -= problem.rows * problem.outputs * site.flops
        rows = TILE if site is None or one.way not in OF_PATCHES else max(1, TILE // site.positions)
        both = (problem.samples + min(rows, problem.samples)) / (problem.samples + 1)
        found += flops * (both if problem.others is None else 1.0)
    return found


def added(plan: NTKPlan) -> float:
    """Return how many entries are added to the matrix, over all layers and passes.

    Args:
        plan: The plan.
    """
    stride = 1 if plan.problem.trace else plan.problem.outputs
    return sum(len(each.contributions) for each in plan.passes) * plan.problem.pairs * float(stride**2)


def multiplied(plan: NTKPlan) -> float:
    """Return how many numbers are multiplied one by one, or formed, in the products of a plan.

    Those are the products of the inputs of each pair of samples and positions with those of their output gradients, and the entries of
    per-sample gradients.

    Args:
        plan: The plan.
    """
    problem, found = plan.problem, 0.0
    for site, one in zip(plan.reading.sites, plan.contributions, strict=False):
        if one.way in ("Hadamard product", *OF_PATCHES):
            found += problem.pairs * site.positions**2 * problem.output_pairs
        else:
            found += problem.rows * problem.outputs * site.numel
    general = sum(plan.reading.general_sizes.values())
    return found + problem.rows * problem.outputs * general


def outputs_of(each: Pass) -> int:
    """Return how many outputs a pass covers.

    Args:
        each: The pass.
    """
    return each.outputs[1] - each.outputs[0]
