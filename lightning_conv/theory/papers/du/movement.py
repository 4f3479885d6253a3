r"""How far the weights move, and what moves with them: activation patterns, neurons, layers, the norms of features.

The proofs keep the kernel near its start by keeping every weight near its start: the wider the network, the less each neuron has to
move. m is the width, R and R' the radii of the papers, S = 1/2 sum (u - y)^2.
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
    """|w_r(k) - w_r(0)|_2 of every neuron, (m,), float64.

    Args:
        weight: W, rows w_r, (m, d).
        initial: W(0).

    Raises:
        ValueError: the shapes differ.
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
    r"""R', the radius that no neuron leaves while the error contracts at the theorem's rate.

    .. math:: R' = \frac{\sqrt n \, |y - u(0)|}{\sqrt m \, \lambda_0} \;\text{ (flow)}, \qquad
              R' = \frac{4 \sqrt n \, |y - u(0)|}{\sqrt m \, \lambda_0} \;\text{ (gradient descent)}

    Args:
        initial_residual: |y - u(0)|.
        samples: n, of norm 1.
        width: m.
        lambda_0: of H_inf.
        descent: which of the two.

    Raises:
        ValueError: a number that is not positive.

    Source: two layers, Lemma 3.3 (flow) and Corollary 4.1 (gradient descent).
    """
    if min(samples, width) < 1 or not lambda_0 > 0:
        raise ValueError(f"samples, width, lambda_0: {samples}, {width}, {lambda_0}; need positive ones")
    factor = 4 if descent == "gradient" else 1
    return factor * math.sqrt(samples / width) * initial_residual / lambda_0


def neuron_movement_criterion(movement: Tensor, radius: float) -> Criterion:
    """max_r |w_r(k) - w_r(0)| <= R'. It follows from the contraction at all steps before k, so a violation refutes that too.

    Args:
        movement: of every neuron (``neuron_movement``).
        radius: R' (``neuron_radius``).
    """
    return at_most(
        "neuron_movement",
        f"{TWO_LAYER}, Lemma 3.3, Corollary 4.1",
        "max_r |w_r(k) - w_r(0)|_2 <= R'",
        float(movement.max()),
        radius,
    )


@dataclass(frozen=True)
class Movement:
    """How far one layer's weights are from their start."""

    name: str
    frobenius: float  # |W(k) - W(0)|_F
    averaged: float  # over sqrt(m)


def layer_movement(network: DuNetwork, initial: Mapping[str, Tensor]) -> list[Movement]:
    """|W^(h)(k) - W^(h)(0)|_F and the same over sqrt(m), of every hidden layer and of the output layer a.

    Args:
        network: now.
        initial: a copy of its ``state_dict`` at the start.

    Raises:
        ValueError: a weight is missing from ``initial``, or has another shape.

    Source: deep, eq. (6): the averaged movement must stay small, of the order 1 / sqrt(m).
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
    r"""R' of the deep fully connected network: every layer's averaged movement stays below it while the error contracts.

    .. math:: R' = \frac{16 \, c_{x,0} \, a_{2,0} \, c_x^H \sqrt n \, |y - u(0)|}{\lambda_0 \sqrt m}, \qquad
              c_x = 2 \sqrt{c_\sigma} \, L \, c_{w,0}

    with the constants that the lemmas leave open taken from this network at its start: c_{w,0} = max_h |W^(h)(0)|_2 / sqrt(m)
    (its upper end, ``spectral_size``) and a_{2,0} = |a(0)| / sqrt(m); c_{x,0} = 2 as in Lemma B.1.

    Args:
        network: at its start.
        initial_residual: |y - u(0)|.
        samples: n, of norm 1.
        lambda_0: of K^(H).
        lipschitz: L, of sigma: 1 for softplus, tanh and ReLU.

    Raises:
        TypeError: another network; the constants are those of the fully connected one.

    Source: deep, Lemma B.5.
    """
    if not isinstance(network, DuFC):
        raise TypeError(f"network: {type(network).__name__}; Lemma B.5 is about the fully connected network, DuFC")
    root = math.sqrt(network.width)
    a = float(in_float64(network.output.weight).norm()) / root
    c_x = 2 * math.sqrt(network.c_sigma) * lipschitz * spectral_size(network)
    return 16 * C_X0 * a * c_x**network.depth * math.sqrt(samples) * initial_residual / (lambda_0 * root)


def spectral_size(network: DuFC) -> float:
    """c_{w,0} >= max_h |W^(h)|_2 / sqrt(m), the constant that Lemma B.3 leaves open, by the upper end of ``spectral_norm``.

    The lemmas ask for any bound from above, and hold with R' for this one: a movement beyond that R' refutes them, while one beyond the
    R' of too small a constant would refute nothing. The upper end is some 1e-6 of the norm too large at most where Lanczos has converged,
    and R' H times that; like all of Lanczos it is an estimate.

    Cost: one ``spectral_norm`` a layer: 4 m^2 flops a step of Lanczos, 80 steps at most; no singular values of the matrix.
    """
    norms = [spectral_norm(in_float64(cast("Tensor", layer.weight))).upper for layer in network.hidden]
    return max(norms) / math.sqrt(network.width)


def layer_movement_criterion(movements: list[Movement], radius: float) -> Criterion:
    """max over the layers of |W^(h)(k) - W^(h)(0)|_F / sqrt(m) <= R'.

    Args:
        movements: of every layer (``layer_movement``).
        radius: R' (``layer_radius``).
    """
    return at_most(
        "layer_movement",
        f"{DEEP}, Lemma B.5, eq. (6)",
        "max_h |W^(h)(k) - W^(h)(0)|_F / sqrt(m) <= R'",
        max(each.averaged for each in movements),
        radius,
    )


def layer_norms(network: DuNetwork, x: Tensor) -> Tensor:
    """|x^(h)_i|_F of every hidden layer h = 1, ..., H and sample i, (H, n), float64.

    Args:
        network: at its start, or later.
        x: n samples, of norm 1 for the lemma.
    """
    with torch.no_grad():
        features, _ = network.states(x)
    return torch.stack([in_float64(layer).flatten(1).norm(dim=1) for layer in features[1:]])


def layer_norms_criterion(norms: Tensor) -> Criterion:
    """1/2 <= |x^(h)_i(0)| <= 2 for all layers and samples, measured as max |log2 |x^(h)_i|| <= 1.

    Args:
        norms: at the start (``layer_norms``).

    Source: deep, Lemma B.1.
    """
    worst = norms.log2().abs().max()
    return at_most("layer_norms", f"{DEEP}, Lemma B.1", "max over h, i of |log2 |x^(h)_i(0)|| <= 1", float(worst), 1.0)
