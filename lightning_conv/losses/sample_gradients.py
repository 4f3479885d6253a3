"""``sample_gradients``: the gradient of each sample's own loss by its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.losses.kind import LossKind, loss_kind
from lightning_conv.losses.per_sample import require_loss

SEPARABLE = ("squared", "absolute", "huber", "smooth_l1", "binary_cross_entropy", "soft_margin", "cross_entropy")
"""Kinds whose loss of a batch is the mean or the sum of those of its samples, unless they are weighted or leave targets out."""


def sample_gradients(loss_fn: object, outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Compute :math:`s_i = \partial \ell_i / \partial u_i`, where :math:`\ell_i` is the loss of sample i as a batch of one.

    For a loss that is a mean over a batch of n samples, :math:`s_i` is n times the gradient of that mean.

    Args:
        loss_fn: a loss of torch, or any function of (outputs, targets) that returns one number for a batch of one.
        outputs: u, (n, ...).
        targets: y, one row or number per sample.

    Returns:
        s, in the shape and the type of the outputs.

    Raises:
        TypeError: see ``require_loss``.
        ValueError: there is not one row of targets for each sample; the loss of a batch of one is not one number, does not
            depend on the outputs, or has a gradient that is not finite.

    Cost: one evaluation of torch's losses; n evaluations of the others, and of weighted ones.

    Example:
        >>> sample_gradients(torch.nn.MSELoss(), torch.ones(3, 1), torch.zeros(3, 1)).flatten()
        tensor([2., 2., 2.])
    """
    require_loss(loss_fn)
    if targets.ndim == 0 or len(targets) != len(outputs):
        raise ValueError(
            f"targets: shape {tuple(targets.shape)} for {len(outputs)} samples; need one row or number per sample"
        )
    kind = loss_kind(loss_fn)
    with torch.enable_grad():
        if _separable(kind, targets):
            found = _gradient(kind, outputs, targets) * (len(outputs) if kind.averaged else 1)
        else:
            rows = [_gradient(kind, outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
            found = torch.cat(rows)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            "loss_fn: its gradient by the outputs contains NaN or infinity; check the outputs and the targets"
        )
    return found


def _separable(kind: LossKind, targets: Tensor) -> bool:
    """Return whether the loss of a batch is the mean or the sum of the losses of batches of one."""
    if kind.kind not in SEPARABLE or kind.weighted or not (kind.averaged or kind.summed):
        return False
    if kind.kind != "cross_entropy" or targets.is_floating_point():
        return True
    return not bool((targets == kind.base.ignore_index).any())


def _gradient(kind: LossKind, outputs: Tensor, targets: Tensor) -> Tensor:
    leaf = outputs.detach().requires_grad_()
    loss = kind.evaluate(leaf, targets)
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn: returned shape {tuple(loss.shape)} for {len(outputs)} samples; need one number, as with reduction='mean'"
        )
    (found,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True) if loss.requires_grad else (None,)
    if found is None:
        raise ValueError("loss_fn: its result does not depend on the outputs; check the function")
    return found
