"""Estimates of how far rounding moves a gradient step of the head away from the exact step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.last_layer import HeadProblem

# Rounding unit of the float32 products that ``torch.set_float32_matmul_precision`` allows on CUDA.
SHORT = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
SEVERAL = 4.0  # number of such units by which a feature or an output may be wrong


def relative_error(weight: Tensor) -> float:
    """Return a generous estimate of the relative error of features and outputs: sqrt(eps) of the head's dtype.

    On CUDA, torch may compute float32 convolutions and products in TF32 or bfloat16. The estimate is then four rounding units of that
    type, if that is larger.

    Args:
        weight: Weight of the head, which gives dtype and device.
    """
    error = math.sqrt(torch.finfo(weight.dtype).eps)
    if weight.device.type != "cuda" or weight.dtype != torch.float32:
        return error
    try:
        convolved = SHORT["high"] if torch.backends.cudnn.allow_tf32 else 0.0
        short = max(convolved, SHORT[torch.get_float32_matmul_precision()])
    except RuntimeError:  # torch raises where its newer precision settings were used
        short = SHORT["medium"]
    return max(error, SEVERAL * short)


def step_rounding(problem: HeadProblem, w: Tensor, loss: float, eta: float, relative: float) -> float:
    r"""Estimate from above the distance by which rounding may have moved :math:`w - \eta \nabla L(w)`.

    Outputs with an error of :math:`\rho |[h_i, 1]| |W|_F` move the gradient of a sample by :math:`L_\ell` times as much, and its product
    with the features has a relative error of :math:`\rho`, where :math:`|\nabla \ell_i|^2 \le 2 L_\ell (\ell_i - \inf \ell_i)`. With
    :math:`m = \frac1n \sum_i |[h_i, 1]|^2` and the Cauchy-Schwarz inequality that is

    .. math:: \eta \rho \bigl( L_\ell m |W|_F + \sqrt{2 L_\ell m (L(W) - L^*)} \bigr) + \rho^2 |W|_F,

    where the last term is for the weights, which are rounded to their type; it remains where the gradient itself vanishes.

    Args:
        problem: Convex problem of the head; an unknown smoothness or infimum leaves its term out.
        w: W, (D, C).
        loss: L(W).
        eta: Step size.
        relative: rho, the relative error of features and outputs.
    """
    smoothness, infimum = problem.smoothness or 0.0, problem.infimum
    gap = max(loss - infimum.lower, 0.0) if infimum is not None else 0.0
    mean_square, size = float(problem.row_norms.square().mean()), float(w.norm())
    if problem.offset is not None:
        size += float(problem.offset.norm())
    gradient = smoothness * mean_square * size + math.sqrt(2 * smoothness * mean_square * gap)
    return eta * relative * gradient + relative**2 * size
