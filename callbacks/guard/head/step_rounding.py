"""How far rounding in a run can carry a gradient step of the head from the exact one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.last_layer import HeadProblem

SHORT = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}
"""Unit of the shortened float32 products that ``torch.set_float32_matmul_precision`` allows on CUDA."""
SEVERAL = 4.0
"""Such units that one number of the trunk or the head may be off by."""


def relative_error(weight: Tensor) -> float:
    """Of the features and outputs in a run whose head has these weights, generously: sqrt(eps), as everywhere for "equal up to rounding".

    On CUDA float32 convolutions and, where it is allowed, products are taken in TF32 or bfloat16: then four units of these, if they are
    more.
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
    r"""What rounding may have done to :math:`w - \eta \nabla L(w)`, estimated from above.

    Outputs that err by :math:`\rho |[h_i, 1]| |W|_F` move the gradient of a sample by :math:`L_\ell` times as much, and its product
    with features errs by :math:`\rho` of its size, where :math:`|\nabla \ell_i|^2 \le 2 L_\ell (\ell_i - \inf \ell_i)`. With
    :math:`m = \frac1n \sum_i |[h_i, 1]|^2` and Cauchy-Schwarz that is

    .. math:: \eta \rho \bigl( L_\ell m |W|_F + \sqrt{2 L_\ell m (L(W) - L^*)} \bigr) + \rho^2 |W|_F,

    the last for the weights, which are rounded to their type. It stays where the gradient itself vanishes.

    Args:
        problem: the head's, of known smoothness and infimum.
        w: W, (D, C).
        loss: L(W).
        eta: of the step.
        relative: rho.
    """
    smoothness, infimum = problem.smoothness or 0.0, problem.infimum
    gap = max(loss - infimum.lower, 0.0) if infimum is not None else 0.0
    mean_square, size = float(problem.row_norms.square().mean()), float(w.norm())
    if problem.offset is not None:
        size += float(problem.offset.norm())
    gradient = smoothness * mean_square * size + math.sqrt(2 * smoothness * mean_square * gap)
    return eta * relative * gradient + relative**2 * size
