"""``Contribution``: what a site costs in flops and bytes in the cheapest of its forms.

``Problem``: the sizes of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.kernels.reading.sites import Site, layer_of

Way: TypeAlias = Literal[
    "Hadamard product", "patch Gram", "token Gram", "tied Gram", "per-sample gradients", "torch.func", "whole batch"
]

ELEMENTWISE = 100
"""Flops of a matrix product that take as long as one elementwise multiplication and addition in cache (measured:
50-200)."""

FORMING = 1.4
"""Factor by which flops are slower in the many small products that form per-sample gradients (measured: 1.1-1.9)."""


@dataclass(frozen=True)
class Problem:
    """The sizes of one kernel: n against m samples, and K outputs per pass, summed over (trace) or kept apart."""

    samples: int
    others: int | None  # m; None: the same samples, so that half of the pairs are enough
    outputs: int
    trace: bool
    width: int  # bytes per number in the dtype of the network

    @property
    def pairs(self) -> float:
        """Number of pairs of samples that are computed."""
        n = self.samples
        return n * (n + 1) / 2 if self.others is None else float(n * self.others)

    @property
    def rows(self) -> int:
        """Number of samples that pass through the network."""
        return self.samples + (self.others or 0)

    @property
    def output_pairs(self) -> int:
        """Number of pairs of outputs per pair of samples."""
        return self.outputs if self.trace else self.outputs**2


@dataclass(frozen=True)
class Contribution:
    """One site in the plan, in the form that was chosen for it."""

    layer: str
    parameters: tuple[str, ...]
    kind: str  # the rule, or the reason why there is none
    way: Way
    flops: float
    fixed_bytes: int  # per sample, kept until its products are done: what does not depend on the outputs
    output_bytes: int  # per sample and output
    formed_late: bool = False  # per-sample gradients are formed when they are multiplied, and A and B kept instead
    patch_bytes: int = 0  # per sample, of A where it is formed late: it is sent where the layer's input is larger

    def sent_bytes(self, outputs: int) -> int:
        """Return the bytes that another process gets of one sample and this many outputs."""
        return min(self.patch_bytes or self.fixed_bytes, self.fixed_bytes) + outputs * self.output_bytes

    def kept_bytes(self, outputs: int) -> int:
        """Return the bytes that are kept for one sample and this many outputs."""
        return self.fixed_bytes + outputs * self.output_bytes


def _forming_flops(site: Site, problem: Problem) -> float:
    return problem.rows * problem.outputs * site.flops


def _rows_flops(site: Site, problem: Problem) -> float:
    return _forming_flops(site, problem) + 2.0 * problem.pairs * problem.output_pairs * site.numel


def _outer_flops(site: Site, problem: Problem) -> float:
    return 2.0 * problem.pairs * site.positions**2 * (site.inputs + problem.output_pairs * site.gradients)


def _seconds(site: Site, problem: Problem) -> tuple[float, float]:
    """Return the durations of both forms, rows and outer products, in flops of a large matrix product."""
    rows = _rows_flops(site, problem) + (FORMING - 1) * _forming_flops(site, problem)
    entries = problem.pairs * site.positions**2 * (1 if problem.trace else problem.output_pairs)
    return rows, _outer_flops(site, problem) + 2 * ELEMENTWISE * entries


def contribution(site: Site, problem: Problem) -> Contribution:
    """Return the contribution of a site in the form that takes the least time."""
    if site.tied and problem.trace:
        return _tied_contribution(site, problem)
    can_be_outer = site.weight is not None and site.positions > 0 and site.groups == 1 and not site.tied
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
        # A is recomputed from the layer's input, which is usually far smaller than its patches and never larger.
        late = problem.width * (site.positions * site.gradients + (site.sizes[site.bias] if site.bias else 0))
        if can_be_outer and not site.tokens and late < each:
            fixed = problem.width * site.input_numel
            patches = problem.width * site.positions * site.inputs
            return Contribution(
                site.layer, site.names, site.kind, way, flops, fixed, late, formed_late=True, patch_bytes=patches
            )
    return Contribution(site.layer, site.names, site.kind, way, flops, fixed, each)


def _tied_contribution(site: Site, problem: Problem) -> Contribution:
    """Return the contribution of a table that is also the weight of a head: rows as large as the table are never formed."""
    r, s, d, words = site.positions, site.words, site.inputs, site.gradients
    of_words = 2.0 * problem.pairs * problem.outputs * d * (s**2 + 2 * r * s)
    fixed = problem.width * r * d + 8 * s
    each = problem.width * (r * words + s * d)
    return Contribution(
        site.layer, site.names, site.kind, "tied Gram", _outer_flops(site, problem) + of_words, fixed, each
    )


def general_contribution(name: str, numel: int, reason: str, problem: Problem) -> Contribution:
    """Return the contribution of a parameter without a rule."""
    flops = 2.0 * problem.pairs * problem.output_pairs * numel
    return Contribution(layer_of(name), (name,), reason, "torch.func", flops, 0, problem.width * numel)


def network_flops(sites: Sequence[Site]) -> tuple[float, float]:
    """Return the flops of a forward and of a backward of one sample, counting only layers with outer products.

    The other layers are negligible. The first layer has no backward, since nothing below it needs a gradient.
    """
    return sum(site.flops for site in sites), sum(site.flops for site in sites if site.passed_back)


def samples_passed(problem: Problem, rows: int) -> float:
    """Return how many samples go through the network in a pass over blocks of ``rows``.

    If blocks are taken in pairs, samples pass through the network repeatedly.
    """
    blocks = -(-problem.samples // rows)
    if problem.others is not None:
        return problem.samples + float(blocks * problem.others)
    return problem.samples * (blocks + 1) / 2
