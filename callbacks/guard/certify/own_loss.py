"""``own_loss``: what the network computes on the whole training set is compared with W h + b, and its loss with the one that is logged."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.certify.training_pass import Walk
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.losses.of_outputs import ULPS, evaluate


def own_loss(view: GuardView, walked: Walk, logged: float | None = None) -> Check:
    r"""Judge a pass over the training set: is the network's output W h + b on every sample, and is its loss the logged one?

    Outputs may differ from W h + b by the rounding of float64, as in ``probe_head``; the loss by

    .. math:: |L_\text{logged} - L_{64}| \le 4 |L_{32} - L_{64}| + 64\, \epsilon\, (|L_{64}| + \sum |s u|)
        + \max_r |L(u + 64\, \epsilon\, |u|_\infty r) - L(u)|,

    where L_32 is the network's loss in its own precision, epsilon that of the head's type, s the gradient of the loss by u, and r are some
    random signs (at an optimum the first order vanishes). L_32 must itself be within the square root of epsilon of the size of the terms.

    Args:
        view: The run.
        walked: What the pass showed.
        logged: Loss that the guard says the network has, where it was not measured by calling the network; None: it was.

    Returns:
        The check ``own loss``; all ranks get the same.

    Cost: with ``logged`` a pass over the training set in the network's own precision.
    """
    if walked.own or logged is None or walked.outputs is None or view.loss.loss_fn is None:
        return Check("own loss", not walked.own, walked.own)
    with attempted(Exception) as attempt:
        said = _other_loss(view, walked.outputs, logged)
        return Check("own loss", not said, said)
    return Check("own loss", None, f"the network's loss could not be computed: {attempt.reason}")


def _other_loss(view: GuardView, outputs: Tensor, logged: float) -> str:
    targets = view.loss.targets()
    exact = view.loss.of(outputs, targets)["loss"]
    coarse = view.loss.measure(view.network, cached=False)["loss"]
    eps = torch.finfo(view.head.module.weight.dtype).eps
    size = evaluate(lambda u: view.loss.mean(u, targets), outputs).size
    generator, stride = torch.Generator().manual_seed(0), ULPS * eps * float(outputs.abs().max())
    signs = [torch.randn(outputs.shape, generator=generator).sign().double() for _ in range(4)]
    nearby = max(abs(view.loss.of(outputs + stride * r, targets)["loss"] - exact) for r in signs)
    rounded = min(4 * abs(coarse - exact), eps**0.5 * size + nearby)
    allowed = rounded + ULPS * eps * size + nearby
    if abs(logged - exact) <= allowed:
        return ""
    return (
        f"the network's own loss on the training set is {exact:.9g}, and that of W h + b was said to be {logged:.9g}; rounding explains "
        f"{allowed:.1g}"
    )
