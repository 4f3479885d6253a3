"""``loss_facts``: the infimum of a loss over all outputs, and the Lipschitz constant of its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.checked import checked, real, whole
from lightning_conv.losses.torch_loss import reduction, torch_loss


@dataclass(frozen=True)
class LossFacts:
    """A loss L(u) = (1/n) sum_i ell(u_i, y_i), convex in the outputs u."""

    infimum: float  # (1/n) sum_i inf_q ell(q, y_i)
    smoothness: float | None  # Lipschitz constant of grad ell(., y_i), Euclidean norm; None: unbounded or not known
    attained: bool  # whether some outputs attain the infimum


@checked()
def loss_facts(loss_fn: Any, outputs: Tensor, targets: Tensor) -> LossFacts | None:
    r"""Return infimum and smoothness of a mean loss of torch; None if they are not known.

    They are not known for subclasses, which may compute anything.
    With ``reduction="sum"`` the facts are about that sum divided by n; the divisions by C below are then left out.

    - squared error, mean over n C numbers: infimum 0, smoothness 2 / C
    - Huber (delta) and smooth L1 (beta): infimum 0, smoothness 1 / C and 1 / (beta C)
    - absolute error: infimum 0, not smooth
    - cross-entropy with target distribution q (one-hot, given, or smoothed): the infimum is the entropy of q, the
      smoothness 1/2 (the largest eigenvalue of diag(p) - p p^T is at most 1/2)
    - binary cross-entropy of logits with target t: infimum is the entropy of (t, 1 - t), smoothness 1 / (4 C)

    Class weights scale the loss of each sample: the infimum is known where it is 0, and the smoothness is that of the
    heaviest class, divided by the mean weight (for a sum: not divided).

    Args:
        loss_fn: a loss module; ``"none"`` is treated as the mean of its result.
        outputs: u, (n, C) or (n,); only its shape counts.
        targets: targets y of the n samples.

    Example:
        >>> import torch
        >>> loss_facts(torch.nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([0, 2]))
        LossFacts(infimum=0.0, smoothness=0.5, attained=False)
    """
    # Divisor of the sum over the outputs of a sample.
    divisor = 1 if reduction(loss_fn) == "sum" else outputs[0].numel() if outputs.ndim else 1
    match torch_loss(loss_fn):
        case "cross_entropy":
            return _cross_entropy(loss_fn, outputs, targets)
        case "binary_cross_entropy":
            return _binary(loss_fn, targets, divisor)
        case "squared":
            return LossFacts(0.0, 2 / divisor, attained=True)
        case "huber":
            return LossFacts(0.0, 1 / divisor, attained=True)
        case "smooth_l1":
            return LossFacts(0.0, 1 / (loss_fn.beta * divisor) if loss_fn.beta > 0 else None, attained=True)
        case "absolute":
            return LossFacts(0.0, None, attained=True)
    return None


def _cross_entropy(loss_fn: Any, outputs: Tensor, targets: Tensor) -> LossFacts | None:
    if outputs.ndim != 2 or bool((targets == loss_fn.ignore_index).any()):
        return None  # several positions per sample, or samples that do not count
    hard = not targets.is_floating_point()
    if loss_fn.weight is not None:
        if not hard or loss_fn.label_smoothing:
            return None
        weights = loss_fn.weight.to(targets.device, torch.float64)[targets]
        mean = float(weights.mean()) if loss_fn.reduction == "mean" else 1.0
        return LossFacts(0.0, 0.5 * float(weights.max()) / mean, attained=False)
    q = target_distributions(loss_fn, targets, outputs.shape[1])
    if bool((q < 0).any()):
        return None  # not bounded from below
    entropy = -torch.special.xlogy(q, q).sum(1)
    # q need not sum to 1: inf_p -sum q log p is that of q / |q|, times |q|.
    total = q.sum(1)
    infimum = float((entropy + torch.special.xlogy(total, total)).mean())
    return LossFacts(max(infimum, 0.0), 0.5 * float(total.max()), attained=bool((q > 0).all()))


def _binary(loss_fn: Any, targets: Tensor, divisor: int) -> LossFacts | None:
    if loss_fn.weight is not None or loss_fn.pos_weight is not None:
        return None
    t = targets.double()
    if bool(((t < 0) | (t > 1)).any()):
        return None  # not bounded from below
    infimum = float(binary_entropy(t).sum()) / (len(t) * divisor)
    return LossFacts(infimum, 1 / (4 * divisor), attained=bool(((t > 0) & (t < 1)).all()))


def target_distributions(loss_fn: Any, targets: Tensor, outputs: int) -> Tensor:
    """Return the target distributions q of a cross-entropy, (n, C), with label smoothing and without class weights.

    Args:
        loss_fn: the ``nn.CrossEntropyLoss``.
        targets: class numbers, (n,), or distributions, (n, C).
        outputs: number C of classes.
    """
    q = targets.double() if targets.is_floating_point() else F.one_hot(targets.long(), outputs).double()
    smoothing = float(loss_fn.label_smoothing)
    return (1 - smoothing) * q + smoothing / outputs if smoothing else q


def binary_entropy(t: Tensor) -> Tensor:
    """Return -t log t - (1 - t) log(1 - t) of every entry."""
    entropy: Tensor = -(torch.special.xlogy(t, t) + torch.special.xlogy(1 - t, 1 - t))
    return entropy


@checked(smoothness=real(least=0), sigma_max=real(least=0), samples=whole(1))
def curvature(smoothness: float, sigma_max: float, samples: int) -> float:
    r"""Return L_H = (L_ell / n) sigma_max([h, 1])^2, the Lipschitz constant of the gradient of L by the last layer.

    Gradient descent with eta = 1 / L_H obeys L(w_t) - L* <= L_H R^2 / (2 t), where R is the distance of the start
    from a minimiser (Kawaguchi & Sun 2021, Theorem 2).
    """
    try:
        return smoothness / samples * sigma_max**2
    except OverflowError:
        return math.inf
