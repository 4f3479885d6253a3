"""The rounding error in the gradients of a sum of outputs or of cotangents, where terms may cancel."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from lightning_conv.networks.evaluation import Inputs, StatelessModule, map_inputs, sample_count


@dataclass(frozen=True)
class ContractedError:
    r"""What was measured on a few samples: rounding relative to the combinations, not to the gradients that remain of them.

    The rows :math:`g_i = J_i^\top s_i` of a contracted kernel may be far smaller than |J_i||s_i| (the sum of the outputs of a softmax
    has no gradient at all), while their rounding is not. So the relative error |dJ|_F / |J|_F of the whole Jacobian is not theirs.
    """

    change: float  # |dG|_F / |S|_F, times ``SAFETY``; 0 where two precisions cannot be compared
    spread: float  # |G|_F / |S|_F for random combinations, which do not cancel
    size: float  # |G|_F / |S|_F for the combinations themselves
    whole: float  # |S|_F of all samples

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


def contracted_error(
    module: StatelessModule,
    names: Sequence[str],
    inputs: Inputs,
    combinations: Combinations,
    *,
    samples: int | None,
    compare: bool = True,
) -> ContractedError:
    """Measure the rounding of the rows of a contracted kernel (K = 1), on the samples with the largest combinations.

    These dominate the kernel and its error.

    Args:
        module: the network, inside ``undisturbed``.
        names: parameters that J differentiates by.
        inputs: all samples.
        combinations: one combination of the outputs per sample.
        samples: number of samples to measure; None: all of them together, where they couple.
        compare: whether passes in the other precision are compared; they need a copy of the parameters.

    Cost: two gradients of these samples, and one in the other precision. The rows of the combinations are read once.
    """
    like = next(iter(module.parameters.values()))
    sizes = combinations.norms(sample_count(inputs), like)
    if combinations.scales is not None:
        sizes = sizes * combinations.scales
    chosen = torch.arange(len(sizes), device=sizes.device)
    if samples is not None and samples < len(sizes):
        # Of equally large ones those that are spread evenly.
        order = torch.linspace(0, len(sizes) - 1, samples, device=sizes.device).round().long()
        equal = bool((sizes == sizes[0]).all())
        chosen = order if equal else sizes.argsort(descending=True, stable=True)[:samples].sort().values
    few = map_inputs(lambda each: each[chosen.to(each.device)], inputs)
    rows = _rows(combinations, chosen, like)
    weights = sizes[chosen] / torch.where(sizes > 0, sizes, 1.0).max()  # |s_i|, scaled to at most 1
    # Independent standard normal factors a_i give E |sum a_i g_i|^2 = |G|_F^2, for G and for its rounding error alike.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(len(rows), 1, generator=generator, dtype=torch.float64).to(rows)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    mixture = factors * weights[:, None] * rows / torch.where(norms > 0, norms, 1.0)
    random = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    random *= weights[:, None] / rows.shape[1] ** 0.5
    truth = parameter_gradients(module, names, few, mixture)
    measured = float(weights.norm()) or 1.0
    size, change = _norm(truth) / measured, 0.0
    if compare:
        difference = difference_of_passes(module, few, mixture, truth, by_factors=None)[0]
        if difference is not None:
            change = SAFETY * difference.change * ratio_to_twin(module.dtype) / measured
    del truth
    spread = _norm(parameter_gradients(module, names, few, random)) / measured
    return ContractedError(change, spread, size, float(sizes.norm()))


def _rows(combinations: Combinations, chosen: Tensor, like: Tensor) -> Tensor:
    """Return the combinations of these samples in float64, (t, C), so that rounding to the dtype of the passes is measured."""
    wide = like.new_empty(0, dtype=torch.float64)
    return torch.cat([combinations.taken(slice(0, 1), slice(i, i + 1), wide)[0] for i in chosen.tolist()])


def _norm(gradients: dict[str, Tensor | None]) -> float:
    return math.hypot(
        *(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients.values() if g is not None)
    )
