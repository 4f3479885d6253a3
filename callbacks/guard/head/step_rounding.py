"""How far rounding in a run may move a gradient step of the head away from the exact one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.last_layer import HeadProblem

SHORT = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
"""Rounding unit of the float32 products that ``torch.set_float32_matmul_precision`` allows on CUDA."""
SEVERAL = 4.0
"""Number of such units that one number of the trunk or the head may be off by."""


def relative_error(weight: Tensor) -> float:
    """Return a generous relative error of features and outputs: sqrt(eps), as everywhere for "equal up to rounding".

    On CUDA, float32 convolutions and, where that is allowed, products are computed in TF32 or bfloat16; then it is four units of these
    types, if that is more.

    Args:
        weight: Weight of the head, for its type and device.
    """
    error = math.sqrt(torch.finfo(weight.dtype).eps)
    if weight.device.type != "cuda" or weight.dtype != torch.float32:
        return error
    try:
        convolved = SHORT["high"] if torch.backends.cudnn.allow_tf32 else 0.0
        short = max(convolved, SHORT[torch.get_float32_matmul_precision()])
    except RuntimeError:  # torch does not tell where its newer switches were used
        short = SHORT["medium"]
    return max(error, SEVERAL * short)


def step_rounding(problem: HeadProblem, w: Tensor, loss: float, eta: float, relative: float) -> float:
    r"""Estimate from above how far rounding may have moved :math:`w - \eta \nabla L(w)`.

    Outputs with an error of :math:`\rho |[h_i, 1]| |W|_F` move the gradient of a sample by :math:`L_\ell` times as much, and its product
    with the features has a relative error of :math:`\rho`, where :math:`|\nabla \ell_i|^2 \le 2 L_\ell (\ell_i - \inf \ell_i)`. With
    :math:`m = \frac1n \sum_i |[h_i, 1]|^2` and the Cauchy-Schwarz inequality that is

    .. math:: \eta \rho \bigl( L_\ell m |W|_F + \sqrt{2 L_\ell m (L(W) - L^*)} \bigr) + \rho^2 |W|_F,

    where the last term is for the weights, which are rounded to their type; it remains where the gradient itself vanishes.

    Args:
        problem: Problem of the head, of known smoothness and infimum.
        w: W, (D, C).
        loss: L(W).
        eta: Size of the step.
        relative: rho.
    """
    smoothness, infimum = problem.smoothness or 0.0, problem.infimum
    gap = max(loss - infimum.lower, 0.0) if infimum is not None else 0.0
    mean_square, size = float(problem.row_norms.square().mean()), float(w.norm())
    if problem.offset is not None:
        size += float(problem.offset.norm())
    gradient = smoothness * mean_square * size + math.sqrt(2 * smoothness * mean_square * gap)
    return eta * relative * gradient + relative**2 * size
