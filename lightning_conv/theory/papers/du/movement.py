r"""Movement of the weights, of single neurons and of whole layers, and the norms of the features at the start.

"Deep" is Du, Lee, Li, Wang, Zhai 2019 (1811.03804), "two layers" is Du, Zhai, Poczos, Singh 2019 (1810.02054).

The proofs keep the kernel near its start by keeping every weight near its start: the wider the network, the less each
neuron has to move. Notation: m is the width, R and R' are the radii of the papers, and the loss is S = 1/2 sum (u -
y)^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_conv.networks.precision import in_float64
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.networks import DuFC, DuNetwork
from lightning_conv.theory.papers.du.kernel import DEEP, TWO_LAYER
from lightning_conv.theory.tools.matrix_norms import spectral_norm

C_X0 = 2.0
"""Bound on the norm of a feature at the start, |x^(h)| <= c_{x,0} (Lemma B.1)."""


def neuron_movement(weight: Tensor, initial: Tensor) -> Tensor:
    """Compute |w_r(k) - w_r(0)|_2 of every neuron, (m,), float64.

    Args:
        weight: W(k) with rows w_r, (m, d).
        initial: W(0), of the same shape.

    Raises:
        ValueError: The shapes differ.
    """
    if weight.shape != initial.shape or weight.ndim != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)} against {tuple(initial.shape)}; need the same (m, d)")
    moved: Tensor = (in_float64(weight) - in_float64(initial)).norm(dim=1)
    return moved


def neuron_radius(
    initial_residual: float,
    samples: int,
    width: int,
    lambda_0: float,
    *,
    descent: Literal["flow", "gradient"] = "gradient",
) -> float:
    r"""Compute R', the radius that no neuron leaves while the error contracts at the theorem's rate.

    .. math:: R' = \frac{\sqrt n \, |y - u(0)|}{\sqrt m \, \lambda_0} \;\text{ (flow)}, \qquad
              R' = \frac{4 \sqrt n \, |y - u(0)|}{\sqrt m \, \lambda_0} \;\text{ (gradient descent)}

    Args:
        initial_residual: Initial error |y - u(0)|, Euclidean norm over the samples.
        samples: Number n of samples, of norm 1.
        width: Number m of neurons.
        lambda_0: lambda_min of H_inf.
        descent: Dynamics: ``"flow"`` for gradient flow, ``"gradient"`` for gradient descent.

    Raises:
        ValueError: ``samples``, ``width`` or ``lambda_0`` is not positive.

    Source: two layers, Lemma 3.3 (flow) and Corollary 4.1 (gradient descent).
    """
    if min(samples, width) < 1 or not lambda_0 > 0:
        raise ValueError(f"samples, width, lambda_0: {samples}, {width}, {lambda_0}; all must be positive")
    factor = 4 if descent == "gradient" else 1
    return factor * math.sqrt(samples / width) * initial_residual / lambda_0


def neuron_movement_criterion(movement: Tensor, radius: float) -> Criterion:
    """Judge max_r |w_r(k) - w_r(0)| <= R'.

    The inequality follows from the contraction at all steps before k, so a violation refutes the contraction too.

    Args:
        movement: Movement of every neuron (``neuron_movement``).
        radius: R' (``neuron_radius``).
    """
    source = f"{TWO_LAYER}, Lemma 3.3, Corollary 4.1"
    return at_most("neuron_movement", source, "max_r |w_r(k) - w_r(0)|_2 <= R'", float(movement.max()), radius)


@dataclass(frozen=True)
class Movement:
    """Distance of one layer's weights from their start."""

    name: str
    frobenius: float  # |W(k) - W(0)|_F
    averaged: float  # |W(k) - W(0)|_F / sqrt(m)


def layer_movement(network: DuNetwork, initial: Mapping[str, Tensor]) -> list[Movement]:
    """Compute |W^(h)(k) - W^(h)(0)|_F, absolute and over sqrt(m), of every hidden layer and of the output layer a.

    Args:
        network: The network after k steps.
        initial: A copy of its ``state_dict`` at the start.

    Returns:
        One movement per weight, in the order of ``network.named_parameters()``.

    Raises:
        ValueError: A weight is missing from ``initial`` or has another shape.

    Source: deep, eq. (6): the averaged movement must stay small, of the order of 1 / sqrt(m).
    """
    found = []
    for name, weight in network.named_parameters():
        if name not in initial or initial[name].shape != weight.shape:
            raise ValueError(
                f"initial: has no {name!r} of shape {tuple(weight.shape)}; pass a copy of the network's state_dict"
            )
        norm = float((in_float64(weight) - in_float64(initial[name])).norm())
        found.append(Movement(name, norm, norm / math.sqrt(network.width)))
    return found


def layer_radius(
    network: DuFC, initial_residual: float, samples: int, lambda_0: float, *, lipschitz: float = 1.0
) -> float:
    r"""Compute R', which bounds the averaged movement of every layer of the fully connected network.

    The bound is valid while the error contracts at the theorem's rate.

    .. math:: R' = \frac{16 \, c_{x,0} \, a_{2,0} \, c_x^H \sqrt n \, |y - u(0)|}{\lambda_0 \sqrt m}, \qquad
              c_x = 2 \sqrt{c_\sigma} \, L \, c_{w,0}

    The lemmas leave some constants open; they are taken from this network at its start: c_{w,0} = max_h
    |W^(h)(0)|_2 / sqrt(m) (bounded from above by ``spectral_size``) and a_{2,0} = |a(0)| / sqrt(m). Lemma B.1 has
    c_{x,0} = 2.

    Args:
        network: The network at its start.
        initial_residual: Initial error |y - u(0)|, Euclidean norm over the samples.
        samples: Number n of samples, of norm 1.
        lambda_0: lambda_min of K^(H).
        lipschitz: Lipschitz constant L of sigma: 1 for softplus, tanh and ReLU.

    Raises:
        TypeError: The network is not the fully connected one, to which the constants belong.

    Source: deep, Lemma B.5.
    """
    if not isinstance(network, DuFC):
        raise TypeError(f"network: {type(network).__name__}; Lemma B.5 is about the fully connected network, DuFC")
    root = math.sqrt(network.width)
    a = float(in_float64(network.output.weight).norm()) / root
    c_x = 2 * math.sqrt(network.c_sigma) * lipschitz * spectral_size(network)
    return 16 * C_X0 * a * c_x**network.depth * math.sqrt(samples) * initial_residual / (lambda_0 * root)


def spectral_size(network: DuFC) -> float:
    """Estimate c_{w,0} >= max_h |W^(h)|_2 / sqrt(m), a constant that Lemma B.3 leaves open.

    The estimate is the upper end of ``spectral_norm``. The lemmas are true for any upper bound c_{w,0} and the R' that
    belongs to it. A movement beyond this R' therefore refutes them, while a movement beyond the R' of too small a
    constant would refute nothing. Where Lanczos has converged, the upper end is at most about 1e-6 of the norm too
    large, and R' at most H times that. Like every result of Lanczos it is an estimate.

    Cost: one ``spectral_norm`` per layer, that is 4 m^2 flops per step of Lanczos and at most 80 steps.
    """
    norms = [spectral_norm(in_float64(cast("Tensor", layer.weight))).upper for layer in network.hidden]
    return max(norms) / math.sqrt(network.width)


def layer_movement_criterion(movements: list[Movement], radius: float) -> Criterion:
    """Judge |W^(h)(k) - W^(h)(0)|_F / sqrt(m) <= R' for all layers h.

    Args:
        movements: Movement of every layer (``layer_movement``).
        radius: R' (``layer_radius``).
    """
    source, largest = f"{DEEP}, Lemma B.5, eq. (6)", max(each.averaged for each in movements)
    return at_most("layer_movement", source, "max_h |W^(h)(k) - W^(h)(0)|_F / sqrt(m) <= R'", largest, radius)


def layer_norms(network: DuNetwork, x: Tensor) -> Tensor:
    """Compute |x^(h)_i|_F of every hidden layer h = 1, ..., H and sample i, (H, n), float64.

    Args:
        network: The network, at its start or later.
        x: n samples; Lemma B.1 is about samples of norm 1.
    """
    with torch.no_grad():
        features, _ = network.states(x)
    return torch.stack([in_float64(layer).flatten(1).norm(dim=1) for layer in features[1:]])


def layer_norms_criterion(norms: Tensor) -> Criterion:
    """Judge 1/2 <= |x^(h)_i(0)| <= 2 for all layers and samples; ``measured`` is max |log2 |x^(h)_i||, the bound is 1.

    Args:
        norms: Norms at the start (``layer_norms``).

    Source: deep, Lemma B.1.
    """
    worst = norms.log2().abs().max()
    return at_most("layer_norms", f"{DEEP}, Lemma B.1", "max over h, i of |log2 |x^(h)_i(0)|| <= 1", float(worst), 1.0)
