"""The rounding error in the gradients of a sum of outputs or of cotangents, where terms may cancel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.products.combinations import Combinations
from lightning_conv.kernels.reading.jacobian_error import (
    SAFETY,
    difference_of_passes,
    parameter_gradients,
    ratio_to_twin,
)
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, map_inputs, sample_count

MEASURED = 16
"""Samples on which the rounding is measured."""
LUCK = 4.0
"""Further factor on an error in float32 that stands for one in float64: one sample may have most of either, and be lucky in one."""
LARGE = 8 * 2**20
"""Bytes of activations from which fewer samples are measured."""


@dataclass(frozen=True)
class ContractedError:
    r"""What was measured on a few samples: rounding relative to the combinations, not to the gradients that remain of them.

    The rows :math:`g_i = J_i^\top s_i` of a contracted kernel may be far smaller than |J_i||s_i| (the sum of the outputs of a softmax
    has no gradient at all), while their rounding is not. So the relative error |dJ|_F / |J|_F of the whole Jacobian is not theirs.
    """

    change: float  # |dG|_F / |S|_F, times ``SAFETY``; 0 where two precisions cannot be compared
    spread: float  # what |G|_F / |S|_F would be for combinations that do not cancel
    size: float  # |G|_F / |S|_F for the combinations themselves
    whole: float  # |S|_F of all samples
    measured: float  # |S|_F of those that were measured, relative to the largest |s_i|

    def relative(self, error: float, trace: float | None) -> float:
        r"""Return an estimate of |dG|_F / |G|_F.

        .. math:: \max\{\epsilon, \; \max(\text{change}, \epsilon \, \text{spread}) \, |S|_F / |G|_F\}

        Args:
            error: the relative error eps of the whole Jacobian, which allows for casts to a narrower type.
            trace: |G|_F^2, the trace of the kernel; None: take |G|_F / |S|_F from the samples that were measured.
        """
        rounding = max(self.change, error * self.spread)
        size = self.size if trace is None else math.sqrt(max(trace, 0.0)) / (self.whole or 1.0)
        if rounding == 0 or self.whole == 0:
            return error
        return max(error, rounding / size) if size else math.inf


def combined(parts: Sequence[ContractedError]) -> ContractedError:
    """Return what was measured on several sets of samples as if it had been measured on all of them.

    The squares of the norms add up, as the samples are combined with independent factors of mean 0.

    Args:
        parts: Of the same samples; each was measured on some of them.
    """
    whole = math.hypot(*(each.measured for each in parts)) or 1.0
    change, spread, size = (
        math.hypot(*(getattr(each, name) * each.measured for each in parts)) / whole
        for name in ("change", "spread", "size")
    )
    return ContractedError(change, spread, size, parts[0].whole, whole)


def measured_count(samples: int, forward_bytes: int) -> int:
    """Return on how many of n samples to measure: up to 16, fewer if their activations are large beside those of the kernel."""
    return min(samples, MEASURED, max(LARGE // max(1, forward_bytes), samples // MEASURED, 1))


def chosen_samples(sizes: Tensor, count: int) -> Tensor:
    """Return the indices of ``count`` samples: half of them those of the largest ``sizes``, the others spread evenly."""
    largest = sizes.argsort(descending=True, stable=True)
    chosen = largest[: -(-count // 2)]
    rest = largest[len(chosen) :].sort().values
    spread = torch.linspace(0, len(rest) - 1, count - len(chosen), device=sizes.device).round().long()
    return torch.cat([chosen, rest[spread]]).sort().values


def contracted_error(
    module: StatelessModule,
    names: Sequence[str],
    inputs: Inputs,
    combinations: Combinations,
    *,
    count: int | None,
    diagonal: Tensor | None = None,
    compare: bool = True,
    share: Callable[[int], slice] | None = None,
) -> ContractedError:
    """Measure the rounding of the rows of a contracted kernel (K = 1).

    Half of the samples that it is measured on are those with the largest rows, which dominate the kernel and its rounding.

    Args:
        module: the network, inside ``undisturbed``.
        names: parameters that J differentiates by.
        inputs: all samples.
        combinations: one combination of the outputs per sample.
        count: number of samples to measure on; None: all of them together, where they couple.
        diagonal: that of the kernel; None: unknown, and the combinations are ordered by their norms instead.
        share: which of the chosen samples are measured here, by their number, where several processes measure; None: all.
        compare: whether passes in the other precision are compared; they need a copy of the parameters.

    Cost: two gradients of these samples, and one in the other precision. All combinations are read once.
    """
    like = next(iter(module.parameters.values()))
    sizes = combinations.norms(sample_count(inputs), like)
    if combinations.scales is not None:
        sizes = sizes * combinations.scales
    chosen = torch.arange(len(sizes), device=sizes.device)
    if count is not None and count < len(sizes):
        chosen = chosen_samples(sizes if diagonal is None or not bool(diagonal.any()) else diagonal, count)
    largest = float(sizes[chosen].max()) or 1.0
    if share is not None and len(chosen) > 1:
        chosen = chosen[share(len(chosen))]
    if not len(chosen):
        return ContractedError(0.0, 0.0, 0.0, float(sizes.norm()), 0.0)
    few = map_inputs(lambda each: each[chosen.to(each.device)], inputs)
    rows = _rows(combinations, chosen, like)
    weights = sizes[chosen] / largest  # |s_i|, scaled to at most 1
    # Independent factors a_i of mean 0 give E |sum a_i g_i|^2 = sum a_i^2 |g_i|^2, for G and for its rounding error alike. None is
    # small, since one sample may have most of the error; their sizes differ, since equal samples would cancel.
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(rows), 1), generator=generator) * 2.0 - 1.0
    factors = (signs * (1 + torch.rand(len(rows), 1, generator=generator) / 2)).to(rows)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    mixture = factors * weights[:, None] * rows / torch.where(norms > 0, norms, 1.0)
    random = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    random *= weights[:, None]
    truth = parameter_gradients(module, names, few, mixture)
    measured = float(weights.norm()) or 1.0
    size, change, comparable = _norm(truth) / measured, 0.0, not compare
    if compare:
        difference = difference_of_passes(module, few, mixture, truth, by_factors=None, watched=False)[0]
        comparable = difference is not None and module.dtype == torch.float32
        if difference is not None:
            safety = SAFETY if comparable else LUCK * SAFETY
            change = safety * difference.change * ratio_to_twin(module.dtype) / measured
    del truth
    spread = _norm(parameter_gradients(module, names, few, random)) / measured
    # |dJ^T s| <= |dJ|_F |s|, typically 1 / sqrt(C) of that. A twin in float32 does not show all: what saturates there (a probability
    # that rounds to 1) need not in float64. So the bound is taken there, and the typical value where float64 was compared.
    if comparable:
        spread /= rows.shape[1] ** 0.5
    return ContractedError(change, spread, size, float(sizes.norm()), measured)


def _rows(combinations: Combinations, chosen: Tensor, like: Tensor) -> Tensor:
    """Return the combinations of these samples in float64, (t, C), so that rounding to the dtype of the passes is measured."""
    wide = like.new_empty(0, dtype=torch.float64)
    return torch.cat([combinations.taken(slice(0, 1), slice(i, i + 1), wide)[0] for i in chosen.tolist()])


def _norm(gradients: dict[str, Tensor | None]) -> float:
    return math.hypot(
        *(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients.values() if g is not None)
    )
