r"""Outputs and Jacobian of a smooth network in float64, with running bounds of their rounding errors.

Every computed number x^ comes with a bound e such that \|x^ - x\| <= e for the exact x, entry by entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues import smallest_eigenvalue
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import gamma
from lightning_conv.theory.tools.smooth_mlp import SLOPE_ERROR, SmoothMLP, above, below

UNIT = 2.0**-53
METHOD = "kernel J J^T of the layers, its rounding and that of J taken off"


@dataclass(frozen=True)
class _Forward:
    """The input and the pre-activation z_l of every layer l = 1..L, each with its error, (n, units)."""

    entering: list[tuple[Tensor, Tensor]]
    pre_activations: list[tuple[Tensor, Tensor]]


def outputs_with_error(mlp: SmoothMLP, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the outputs u and a bound of their rounding error, both (n,).

    A product W h + b has an error of at most gamma_{m+2} (|W||h| + |b|) (Higham, section 3.1) and propagates the error
    e of h as |W| e. An activation multiplies the error by its largest slope and adds 2^-49 of a bound of its value,
    which allows for 8 units of roundoff in a library function.

    Args:
        mlp: The network.
        inputs: Samples, (n, d).
    """
    outputs, error = _forward(mlp, inputs).pre_activations[-1]
    return outputs[:, 0], error[:, 0]


def residual_with_error(mlp: SmoothMLP, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return |u - y| of every sample and a bound of the rounding error of u, both (n,).

    Args:
        mlp: The network.
        inputs: Samples, (n, d).
        targets: y, n numbers.

    Raises:
        ValueError: The number of targets is not n.
    """
    if targets.numel() != len(inputs):
        raise ValueError(f"targets: {targets.numel()} for {len(inputs)} samples; pass one number per sample")
    outputs, error = outputs_with_error(mlp, inputs)
    return (outputs - targets.detach().cpu().double().flatten()).abs(), error


def jacobian_sigma_min(mlp: SmoothMLP, inputs: Tensor) -> Bounded:
    r"""Bound the smallest singular value of the Jacobian J = du/dtheta, (n, P) with n <= P, without forming J.

    J is taken with respect to the trained weights. With g_l = du/dz_l and the input h_{l-1} of layer l, the rows of J
    consist of the Kronecker products of g_l and (h_{l-1}, 1), so

    .. math:: J J^T = \sum_l (H_{l-1} H_{l-1}^T + 1 1^T) \circ (g_l g_l^T) .

    The computed h and g have errors e_h and e_g, so they belong to a Jacobian that differs from the exact one by at
    most

    .. math:: |\delta J|_F^2 \le \sum_{l, i} (|g||e_h| + |e_g||h| + |e_g||e_h|)^2 + |e_g|^2

    and the rounding error of an entry of the sum is at most gamma_K times the product of two row norms. By Weyl's
    inequality both are subtracted from the bound. Slopes s'(z) have the error sup |s''| e_z + 2^-47. [derived]

    Args:
        mlp: The network.
        inputs: Samples, (n, d).

    Returns:
        The interval of sigma_min. It resolves numbers down to about 1e-8 of the largest singular value, because the
        eigenvalues of the kernel are squares. It is [0, inf) if a pre-activation lies beyond the point where torch's
        softplus becomes linear.

    Cost: one forward and one backward pass, n^2 (sum of widths) products, and ``smallest_eigenvalue`` of an n x n
    matrix.
    """
    forward = _forward(mlp, inputs)
    # The slope is that of softplus itself; torch's is 1 there.
    largest = [float((z.abs() + e_z).max()) for z, e_z in forward.pre_activations[:-1]]
    if any(z > s.smooth_to for z, s in zip(largest, mlp.activations, strict=True)):
        return Bounded(0.0, 0.0, math.inf, True, METHOD, "a pre-activation is where torch's softplus is linear")
    n = len(forward.entering[0][0])
    g, e_g = torch.ones(n, 1, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    gram, trace, off = torch.zeros(n, n, dtype=torch.float64), 0.0, 0.0
    for place in range(mlp.depth - 1, -1, -1):
        layer, (h, e_h) = mlp.layers[place], forward.entering[place]
        of_g, of_e = g.norm(dim=1), e_g.norm(dim=1)
        if layer.weight_trained:
            of_h, of_e_h = h.norm(dim=1), e_h.norm(dim=1)
            gram += (h @ h.T) * (g @ g.T)
            trace += float((of_h * of_g).square().sum())
            off += float((of_g * of_e_h + of_e * of_h + of_e * of_e_h).square().sum())
        if layer.bias_trained:
            gram += g @ g.T
            trace += float(of_g.square().sum())
            off += float(of_e.square().sum())
        if place:
            g, e_g = _back(mlp, place, g, e_g, forward.pre_activations[place - 1])
    widest = max(layer.inputs + layer.outputs for layer in mlp.layers)
    rounding = above(gamma(widest + 2 * mlp.depth + 8, torch.float64) * above(trace))
    found = smallest_eigenvalue((gram + gram.T) / 2)
    lower = below(math.sqrt(max(found.lower - rounding, 0.0))) - above(math.sqrt(off))
    upper = above(math.sqrt(max(found.upper, 0.0) + rounding)) + above(math.sqrt(off))
    value = min(max(math.sqrt(max(found.value, 0.0)), lower), upper)
    return Bounded(value, max(lower, 0.0), upper, found.certified, METHOD)


def _forward(mlp: SmoothMLP, inputs: Tensor) -> _Forward:
    h = inputs.detach().cpu().double().flatten(1)
    error = torch.zeros_like(h)
    entering, pre_activations = [(h, error)], []
    for place, layer in enumerate(mlp.layers):
        size = layer.weight.abs()
        rounding = gamma(layer.inputs + 3, torch.float64) * (h.abs() @ size.T + layer.bias.abs())
        h, error = h @ layer.weight.T + layer.bias, (error @ size.T + rounding) * above(1.0)
        pre_activations.append((h, error))
        if place < mlp.depth - 1:
            s = mlp.activations[place]
            h = s.function(h)
            error = (s.most_slope * error + 2.0**-49 * h.abs()) * above(1.0)
            entering.append((h, error))
    return _Forward(entering, pre_activations)


def _back(mlp: SmoothMLP, place: int, g: Tensor, e_g: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute g_l and its error from g_{l+1}; ``place`` is the index of layer l + 1."""
    weight, s = mlp.layers[place].weight, mlp.activations[place - 1]
    size = weight.abs()
    a, e_a = g @ weight, e_g @ size + gamma(len(weight) + 2, torch.float64) * (g.abs() @ size)
    slope, e_s = s.slope(z[0]), s.most_bend * z[1] + SLOPE_ERROR
    error = a.abs() * e_s + e_a * (slope.abs() + e_s) + UNIT * (a * slope).abs()
    return a * slope, error * above(1.0)
