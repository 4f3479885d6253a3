"""Norms of the layers at the start of a run, and how far the weights have moved against the radius R' in the proofs of Du et al."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.callbacks.criteria.papers.du.kernel import PapersNetwork
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.networks.activation import largest_slope
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.networks import DuFC, DuNetwork, DuTwoLayer
from lightning_conv.theory.papers.du import (
    layer_movement,
    layer_movement_criterion,
    layer_norms,
    layer_norms_criterion,
    layer_radius,
    neuron_movement,
    neuron_movement_criterion,
    neuron_radius,
)


def start_norms(network: PapersNetwork, inputs: Tensor) -> list[Criterion]:
    """Judge 1/2 <= |x^(h)_i(0)| <= 2 for the deep networks; the proof for the two-layer one does not ask for it.

    Args:
        network: at its start.
        inputs: of norm 1.
    """
    if not isinstance(network, DuNetwork):
        return []
    found = layer_norms_criterion(layer_norms(network, inputs.to(next(network.parameters()))))
    if found.verdict == "refuted" and not isinstance(network, DuFC):
        why = "; the 2 is of the fully connected network, and for the residual ones the constant is not specified"
        found = replace(found, verdict="undecided", reason=found.reason + why)
    return [found]


def start_radius(network: PapersNetwork, inputs: Tensor, targets: Tensor | None, lambda_0: Bounded) -> float:
    """Return R' with the constants of the network at its start; NaN where the papers have no R', or it cannot be known.

    ``DuFC``: Lemma B.5, ``layer_radius``; ``DuTwoLayer``: Corollary 4.1, ``neuron_radius``. The residual networks' constants are not
    specified.

    Args:
        network: at its start.
        inputs: of norm 1.
        targets: y, or None.
        lambda_0: of the limit kernel; there is no R' if it is not resolved above its error.
    """
    residual = _residual(network, inputs, targets)
    if math.isnan(residual) or not lambda_0.resolved:
        return math.nan
    if isinstance(network, DuTwoLayer):
        return neuron_radius(residual, len(inputs), network.width, lambda_0.value)
    if isinstance(network, DuFC):
        slope = largest_slope(network.activation)
        return layer_radius(network, residual, len(inputs), lambda_0.value, lipschitz=slope)
    return math.nan


def _residual(network: PapersNetwork, inputs: Tensor, targets: Tensor | None) -> float:
    """Return |y - u| in float64; NaN where there is no target for each sample."""
    if targets is None or not targets.is_floating_point() or targets.numel() != len(inputs):
        return math.nan
    with torch.no_grad():
        outputs = network(inputs.to(next(network.parameters())))
    return float((outputs.cpu().double() - targets.cpu().double().flatten()).norm())


def movement_criteria(network: PapersNetwork, start: Mapping[str, Tensor], radius: float) -> list[Criterion]:
    """Judge the movement of layers (``DuFC``) and neurons (``DuTwoLayer``) against R'.

    Args:
        network: now.
        start: its trained weights at the start, on its device.
        radius: R'.
    """
    if isinstance(network, DuTwoLayer):
        return [neuron_movement_criterion(neuron_movement(network.hidden.weight, start["hidden.weight"]), radius)]
    if isinstance(network, DuFC):
        return [layer_movement_criterion(layer_movement(network, start), radius)]
    return []


def movement_quantities(network: PapersNetwork, start: Mapping[str, Tensor], radius: float) -> dict[str, float]:
    """Return the numbers that the criteria are about.

    Args:
        network: now.
        start: its trained weights at the start, on its device.
        radius: R', or NaN.

    Returns:
        ``averaged_movement``: max_h |W^(h)(k) - W^(h)(0)|_F / sqrt(m) (eq. 6), and ``layer_radius``; ``neuron_movement``:
        max_r |w_r(k) - w_r(0)|, and ``neuron_radius``.
    """
    if isinstance(network, DuTwoLayer):
        moved = float(neuron_movement(network.hidden.weight, start["hidden.weight"]).max())
        found = {"neuron_movement": moved, "neuron_radius": radius}
    else:
        moved = max(each.averaged for each in layer_movement(network, start))
        found = {"averaged_movement": moved, "layer_radius": radius}
    return {name: value for name, value in found.items() if math.isfinite(value)}
