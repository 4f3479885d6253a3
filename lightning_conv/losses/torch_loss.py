"""``torch_loss``: identification of torch's loss functions, by type; no other module does this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

LossFn: TypeAlias = Callable[[Tensor, Any], Tensor]
"""A loss as a function of (outputs, targets)."""

TorchLoss: TypeAlias = Literal[
    "squared",
    "absolute",
    "huber",
    "smooth_l1",
    "cross_entropy",
    "binary_cross_entropy",
    "soft_margin",
    "other",
    "unknown",
]

_KINDS: dict[type, TorchLoss] = {
    nn.MSELoss: "squared",
    nn.L1Loss: "absolute",
    nn.HuberLoss: "huber",
    nn.SmoothL1Loss: "smooth_l1",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy",
    nn.SoftMarginLoss: "soft_margin",
    type(None): "unknown",
}

_ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


def torch_loss(loss_fn: object) -> TorchLoss:
    """Return the kind of a loss of torch, and ``"other"`` for anything else.

    Subclasses, and modules whose ``forward`` is replaced or hooked, may compute anything.

    Args:
        loss_fn: the loss; None: not known.
    """
    changed = isinstance(loss_fn, nn.Module) and (
        "forward" in vars(loss_fn) or loss_fn._forward_hooks or loss_fn._forward_pre_hooks
    )
    return "other" if changed else _KINDS.get(type(loss_fn), "other")


def reduction(loss_fn: object) -> str:
    """Return ``"mean"``, ``"sum"`` or ``"none"``; a loss without a ``reduction`` is taken to be a mean over samples."""
    return str(getattr(loss_fn, "reduction", "mean"))


def is_elementwise(loss_fn: object) -> bool:
    """Return whether the targets must have the outputs' shape: (n, 1) against (n,) would broadcast to n x n."""
    return isinstance(loss_fn, _ELEMENTWISE)


def has_classes_0_and_1(loss_fn: object) -> bool:
    """Return whether the loss numbers two classes 0 and 1 and compares its outputs, which are logits, with 0."""
    return isinstance(loss_fn, nn.BCEWithLogitsLoss)


def is_loss_module(module: object) -> bool:
    """Return whether a module is one of torch's loss modules, or derived from one."""
    return isinstance(module, _Loss)


USUAL_LOSSES: tuple[nn.Module, ...] = (
    nn.MSELoss(),
    nn.CrossEntropyLoss(),
    nn.BCEWithLogitsLoss(),
    nn.L1Loss(),
    nn.NLLLoss(),
    nn.SmoothL1Loss(),
    nn.HuberLoss(),
    nn.MSELoss(reduction="sum"),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.BCEWithLogitsLoss(reduction="sum"),
)
"""Losses that a training step may call as functions, with their usual settings."""
