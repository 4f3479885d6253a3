"""What a site costs in flops and bytes in each of its forms, and which form is the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.kernels.reading.sites import Site, layer_of

Way: TypeAlias = Literal[
    "Hadamard product", "patch Gram", "token Gram", "per-sample gradients", "torch.func", "whole batch"
]

ELEMENTWISE = 100
"""Flops of a product that take as long as one multiplication and addition of two entries in cache (measured: 50-200)."""

FORMING = 1.4
"""How much longer a flop takes in the many small products that form per-sample gradients (measured: 1.1-1.9)."""


@dataclass(frozen=True)
class Problem:
    """The sizes of one kernel: samples n against m, K outputs in one pass, summed over (trace) or kept apart."""

    samples: int
    others: int | None  # m; None: the samples themselves, so half of the pairs is enough
    outputs: int
    trace: bool
    width: int  # bytes of a number of the network

    @property
    def pairs(self) -> float:
        """Pairs of samples that are computed."""
        n = self.samples
        return n * (n + 1) / 2 if self.others is None else float(n * self.others)

    @property
    def rows(self) -> int:
        """Samples that are passed through the network."""
        return self.samples + (self.others or 0)

    @property
    def output_pairs(self) -> int:
        """Pairs of outputs for each pair of samples."""
        return self.outputs if self.trace else self.outputs**2


@dataclass(frozen=True)
class Contribution:
    """One site in the plan."""

    layer: str
    parameters: tuple[str, ...]
    kind: str  # the rule, or why there is none
    way: Way
    flops: float
    fixed_bytes: int  # of one sample, held until its products are done: what does not depend on the outputs
    output_bytes: int  # and what is held for each output
    formed_late: bool = False  # per-sample gradients are formed when they are multiplied, and A and B held instead

    def kept_bytes(self, outputs: int) -> int:
        """Of one sample and so many outputs."""
        return self.fixed_bytes + outputs * self.output_bytes


def _forming_flops(site: Site, problem: Problem) -> float:
    return problem.rows * problem.outputs * site.flops


def _rows_flops(site: Site, problem: Problem) -> float:
    return _forming_flops(site, problem) + 2.0 * problem.pairs * problem.output_pairs * site.numel


def _outer_flops(site: Site, problem: Problem) -> float:
    return 2.0 * problem.pairs * site.positions**2 * (site.inputs + problem.output_pairs * site.gradients)


def _seconds(site: Site, problem: Problem) -> tuple[float, float]:
    """Time of both forms, in flops of a large product: rows, outer products."""
    rows = _rows_flops(site, problem) + (FORMING - 1) * _forming_flops(site, problem)
    entries = problem.pairs * site.positions**2 * (1 if problem.trace else problem.output_pairs)
    return rows, _outer_flops(site, problem) + 2 * ELEMENTWISE * entries


def contribution(site: Site, problem: Problem) -> Contribution:
    """The site in the form that takes the least time."""
    can_be_outer = site.weight is not None and site.positions > 0 and site.groups == 1
    rows, outer = _seconds(site, problem)
    if can_be_outer and outer <= rows:
        way: Way = "token Gram" if site.tokens else "Hadamard product" if site.positions == 1 else "patch Gram"
        flops = _outer_flops(site, problem)
        fixed = 8 * site.positions if site.tokens else problem.width * site.positions * site.inputs
        each = problem.width * site.positions * site.gradients
        if site.bias is not None and not site.bias_in_product:
            each += problem.width * site.sizes[site.bias]
    else:
        way, flops, fixed, each = "per-sample gradients", _rows_flops(site, problem), 0, problem.width * site.numel
        # A is had again from the layer's input, which is not larger than the patches and as a rule far smaller.
        late = problem.width * (site.positions * site.gradients + (site.sizes[site.bias] if site.bias else 0))
        if can_be_outer and not site.tokens and late < each:
            fixed = problem.width * site.input_numel
            return Contribution(site.layer, site.names, site.kind, way, flops, fixed, late, formed_late=True)
    return Contribution(site.layer, site.names, site.kind, way, flops, fixed, each)


def general_contribution(name: str, numel: int, reason: str, problem: Problem) -> Contribution:
    """A parameter without a rule."""
    flops = 2.0 * problem.pairs * problem.output_pairs * numel
    return Contribution(layer_of(name), (name,), reason, "torch.func", flops, 0, problem.width * numel)


def network_flops(sites: Sequence[Site]) -> tuple[float, float]:
    """Flops of one sample's forward and of one backward, in the layers that are outer products (the rest is negligible).

    The first layer has a forward only: nothing below it needs a gradient.
    """
    return sum(site.flops for site in sites), sum(site.flops for site in sites if all(use.call for use in site.uses))


def samples_passed(problem: Problem, rows: int) -> float:
    """How many samples go through the network in a pass that holds ``rows`` of them at once: with blocks in pairs, some again."""
    blocks = -(-problem.samples // rows)
    if problem.others is not None:
        return problem.samples + float(blocks * problem.others)
    return problem.samples * (blocks + 1) / 2
