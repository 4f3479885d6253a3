"""Criteria of the weights and the data alone, without a step: kernel, separation, expressivity, and what is proven at the start."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_conv.anatomy import find_head, last_hidden_features
from lightning_conv.contraction import is_full
from lightning_conv.eigenvalues.bounded import Bounded
from lightning_conv.evaluation import Inputs, StatelessModule, undisturbed
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.spectrum import Spectrum
from lightning_conv.theory.allen_zhu import separation
from lightning_conv.theory.chatterjee import certify_descent
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.du import drift_criterion, own_lambda_min_criterion
from lightning_conv.theory.kawaguchi_sun import SOURCE as KAWAGUCHI
from lightning_conv.theory.kawaguchi_sun import expressivity_facts, judge_expressivity

DU = "Du et al. 2019 (1811.03804)"
ALLEN_ZHU = "Allen-Zhu, Li & Song 2019 (1811.03962)"

TRUNK_ROUNDING = 16 * 2.0**-29
"""Of the measured error of float32 features, the allowance for that of float64 ones, as in ``certify_expressivity``."""


def voided(criterion: Criterion, reason: str) -> Criterion:
    """The same, not applicable: the measured number stays, the bound means nothing."""
    return replace(criterion, bound=math.nan, verdict="not applicable", reason=reason)


def kernel_criteria(gram: KernelGram, first: KernelGram, first_spectrum: Spectrum) -> list[Criterion]:
    """What Du et al. ask of the kernel, with lambda_0 := 4/3 lambda_min(G(0)), as they go from 3/4 lambda_0 at the start."""
    found = [own_lambda_min_criterion(gram, first), drift_criterion(gram, first, own_lambda_0(first_spectrum))]
    if is_full(gram):
        return found
    why = f'the kernel is summed over {gram.n_outputs} outputs; Probe(outputs="full") gives the one that the theorem is about'
    return [voided(each, why) for each in found]


def own_lambda_0(spectrum: Spectrum) -> Bounded:
    """4/3 lambda_min(G(0)): the largest lambda_0 for which lambda_min(G(0)) >= 3/4 lambda_0."""
    smallest = spectrum.lambda_min
    value, lower, upper = (4 / 3 * end for end in (smallest.value, smallest.lower, smallest.upper))
    return replace(smallest, value=value, lower=lower, upper=upper)


def separation_criteria(inputs: Inputs, targets: Tensor | None) -> list[Criterion]:
    """delta of the probe's inputs after Allen-Zhu's normalisation, over all pairs and over those of different classes."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        why = "the input is not one tensor of numbers"
        return [Criterion("separation", ALLEN_ZHU, "|x_i - x_j| >= delta > 0", math.nan, math.nan, "undecided", why)]
    classes = (
        targets is not None
        and not targets.is_floating_point()
        and targets.ndim == 1
        and bool((targets != targets[0]).any())
    )
    try:
        return separation(inputs.cpu(), targets.cpu() if classes and targets is not None else None).criteria()
    except ValueError as error:
        return [
            Criterion("separation", ALLEN_ZHU, "|x_i - x_j| >= delta > 0", math.nan, math.nan, "undecided", str(error))
        ]


def expressivity_criteria(network: nn.Module, inputs: Inputs, targets: Tensor | None) -> list[Criterion]:
    """Rank [h, 1] = n of the last hidden features in eval mode, and whether the targets lie in their range.

    Args:
        network: left as it is.
        inputs: on the network's device.
        targets: numbers or classes, one row a sample; others are left out.
    """
    try:
        head = find_head(network, inputs)
        features = last_hidden_features(network, head, inputs, dtype=torch.float64).cpu()
        own = last_hidden_features(network, head, inputs)
        error = 0.0 if own.dtype == torch.float64 else TRUNK_ROUNDING * float((own.cpu().double() - features).norm())
        facts = expressivity_facts(features, _rows(targets, len(features)), bias=head.has_bias, feature_error=error)
    except Exception as error:  # no linear head, or one that cannot be read: the other theorems do not care
        asks = "rank [h, 1] = n, that is sigma_min([h, 1]) > 0"
        return [Criterion("expressivity_condition", KAWAGUCHI, asks, math.nan, math.nan, "not applicable", str(error))]
    return judge_expressivity(facts)


def _rows(targets: Tensor | None, samples: int) -> Tensor | None:
    """Targets as ``certify_expressivity`` takes them, or None."""
    if targets is None or len(targets) != samples:
        return None
    if targets.is_floating_point():
        rows = targets.detach().cpu().double().reshape(samples, -1)
        return rows if float(rows.norm()) > 0 else None
    return targets.detach().cpu() if targets.ndim == 1 else None


def descent_certificate(network: nn.Module, inputs: Inputs, targets: Tensor | None, step: float) -> list[Criterion]:
    """What Chatterjee's theorem proves about a smooth MLP with one output before the first step; nothing for other networks.

    Args:
        network: at the start.
        inputs: the whole training set.
        targets: y.
        step: of the run, on f = (1/n) sum (u - y)^2.

    Cost: some tenths of a second; intervals for about a hundred balls.
    """
    if not isinstance(inputs, Tensor) or targets is None or not targets.is_floating_point():
        return []
    try:
        found = certify_descent(
            _sequential(network, inputs),
            inputs.detach().cpu().double().flatten(1),
            targets.detach().cpu().double().flatten(),
        )
    except (ValueError, TypeError, RuntimeError):
        return []
    if not found.holds:
        return [found.criterion]
    asks = "h <= 2 eps / sup |Hess f|, the step for which descent to zero loss is proven"
    limit = at_most("certified_step", found.criterion.source, asks, step, found.step)
    if limit.verdict == "refuted":
        # A longer step is not proven; that it fails is not proven either.
        limit = replace(limit, verdict="undecided", reason=f"{limit.reason}, beyond which nothing is proven")
    return [found.criterion, limit]


def _sequential(network: nn.Module, inputs: Tensor) -> nn.Module:
    """The one child to which a module hands its inputs, as ``self.net(x)`` does, if it is the same function of inputs and weights.

    Raises:
        ValueError: it gives other outputs, at the present weights or at random ones.
    """
    own = {name: child for name, child in network.named_children() if any(True for _ in child.parameters())}
    if isinstance(network, nn.Sequential) or len(own) != 1:
        return network
    ((name, child),) = own.items()
    generator = torch.Generator().manual_seed(0)
    with undisturbed(network), torch.no_grad():
        whole, part = StatelessModule(network, dtype=torch.float64), StatelessModule(child, dtype=torch.float64)
        rows = whole.convert(inputs)
        for draw in range(3):
            weights = {
                key: value
                if draw == 0
                else torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
                for key, value in part.parameters.items()
            }
            outputs = whole.outputs({f"{name}.{key}": value for key, value in weights.items()}, rows)
            if not torch.allclose(outputs, part.outputs(weights, rows), rtol=1e-9, atol=1e-12):
                raise ValueError(f"model: {type(network).__name__} is not its child {name!r} alone")
    return child
