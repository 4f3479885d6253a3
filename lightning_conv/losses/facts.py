"""What is known of a loss: its infimum over the outputs for given targets, and how steep its gradient is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LossFacts:
    """A loss L(u) = (1/n) sum_i ell(u_i, y_i), convex in the outputs u."""

    infimum: float  # (1/n) sum_i inf_q ell(q, y_i)
    smoothness: (
        float | None
    )  # Lipschitz constant of grad ell(., y_i) in the Euclidean norm; None: not bounded or not known
    attained: bool  # whether some outputs have the infimum


def loss_facts(loss_fn: object, outputs: Tensor, targets: Tensor) -> LossFacts | None:
    r"""Infimum and smoothness of a mean loss of torch; None for what is not known (a subclass may compute anything).

    With ``reduction="sum"`` the facts are about the sum over n: where C divides below, it then does not.

    - squared error, mean over n C numbers: infimum 0, smoothness 2 / C
    - Huber (delta) and smooth L1 (beta): infimum 0, smoothness 1 / C and 1 / (beta C); absolute error: infimum 0, not smooth
    - cross-entropy with target distribution q (one-hot, given, or smoothed): infimum is the entropy of q, smoothness 1/2 (the
      largest eigenvalue of diag(p) - p p^T is at most 1/2)
    - binary cross-entropy of logits with target t: infimum is the entropy of (t, 1 - t), smoothness 1 / (4 C)

    Class weights scale by sample: the infimum is known where it is 0, the smoothness is that of the heaviest class, over the mean weight
    (for a sum not divided).

    Args:
        loss_fn: a loss module; ``"none"`` is taken as the mean of what it returns.
        outputs: u, (n, C) or (n,); only its shape counts.
        targets: y.

    Example:
        >>> import torch
        >>> loss_facts(torch.nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([0, 2]))
        LossFacts(infimum=0.0, smoothness=0.5, attained=False)
    """
    # What a sample's sum over its outputs is divided by.
    classes = 1 if getattr(loss_fn, "reduction", "mean") == "sum" else outputs[0].numel() if outputs.ndim else 1
    kind = type(loss_fn)
    if isinstance(loss_fn, nn.CrossEntropyLoss) and kind is nn.CrossEntropyLoss:
        return _cross_entropy(loss_fn, outputs, targets)
    if isinstance(loss_fn, nn.BCEWithLogitsLoss) and kind is nn.BCEWithLogitsLoss:
        return _binary(loss_fn, targets, classes)
    if kind is nn.MSELoss:
        return LossFacts(0.0, 2 / classes, attained=True)
    if kind is nn.HuberLoss:
        return LossFacts(0.0, 1 / classes, attained=True)
    if isinstance(loss_fn, nn.SmoothL1Loss) and kind is nn.SmoothL1Loss:
        return LossFacts(0.0, 1 / (loss_fn.beta * classes) if loss_fn.beta > 0 else None, attained=True)
    if kind is nn.L1Loss:
        return LossFacts(0.0, None, attained=True)
    return None


def _cross_entropy(loss_fn: nn.CrossEntropyLoss, outputs: Tensor, targets: Tensor) -> LossFacts | None:
    if outputs.ndim != 2 or bool((targets == loss_fn.ignore_index).any()):
        return None  # several positions a sample, or samples that do not count
    hard = not targets.is_floating_point()
    smoothing = loss_fn.label_smoothing
    if loss_fn.weight is not None:
        if not hard or smoothing:
            return None
        weights = loss_fn.weight.to(targets.device, torch.float64)[targets]
        mean = float(weights.mean()) if loss_fn.reduction == "mean" else 1.0
        return LossFacts(0.0, 0.5 * float(weights.max()) / mean, attained=False)
    q = F.one_hot(targets, outputs.shape[1]).double() if hard else targets.double()
    q = (1 - smoothing) * q + smoothing / outputs.shape[1]
    entropy = -torch.special.xlogy(q, q).sum(1)
    # q need not sum to 1: inf_p -sum q log p is that of q / |q|, times |q|.
    total = q.sum(1)
    infimum = float((entropy + torch.special.xlogy(total, total)).mean())
    return LossFacts(max(infimum, 0.0), 0.5 * float(total.max()), attained=bool((q > 0).all()))


def _binary(loss_fn: nn.BCEWithLogitsLoss, targets: Tensor, classes: int) -> LossFacts | None:
    if loss_fn.weight is not None or loss_fn.pos_weight is not None:
        return None
    t = targets.double()
    if bool(((t < 0) | (t > 1)).any()):
        return None  # not bounded from below
    entropy = -(torch.special.xlogy(t, t) + torch.special.xlogy(1 - t, 1 - t))
    infimum = float(entropy.sum()) / (len(t) * classes)
    return LossFacts(infimum, 1 / (4 * classes), attained=bool(((t > 0) & (t < 1)).all()))


def curvature(smoothness: float, sigma_max: float, samples: int) -> float:
    r"""L_H = (L_ell / n) sigma_max([h, 1])^2: Lipschitz constant of the gradient of L by the last layer (Kawaguchi & Sun 2021, Theorem 2).

    Gradient descent with eta = 1 / L_H obeys L(w_t) - L* <= L_H R^2 / (2 t), R the distance of the start from a minimiser.
    """
    return smoothness / samples * sigma_max**2
