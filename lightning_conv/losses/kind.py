"""``loss_kind``: the facts about a loss function that the rest of the project needs, in one object."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_conv.losses.arranged import ArrangedLoss
from lightning_conv.losses.facts import LossFacts, loss_facts
from lightning_conv.losses.scale import LossScale, loss_scale
from lightning_conv.losses.torch_loss import (
    LossFn,
    TorchLoss,
    has_classes_0_and_1,
    is_elementwise,
    is_loss_module,
    reduction,
    torch_loss,
)

__all__ = ["LossFn", "LossKind", "TorchLoss", "is_loss_module", "loss_kind"]


@dataclass(frozen=True)
class LossKind:
    """A loss function, and the facts that follow from its type and settings."""

    loss_fn: Any  # the loss itself; None: not known
    kind: TorchLoss  # which of torch's losses it is; "other": any other, a subclass too; "unknown": there is none
    reduction: str  # "mean", "sum" or "none"; "mean" for a loss that has no such setting
    factor: float = 1.0  # c of a loss c x (one of torch's losses), of which ``kind`` and ``reduction`` are

    @property
    def base(self) -> Any:
        """The loss of torch that is multiplied by the factor; the loss itself where nothing is."""
        return self.loss_fn.base if isinstance(self.loss_fn, ArrangedLoss) else self.loss_fn

    @property
    def name(self) -> str:
        """Name for messages, such as ``"MSELoss"``."""
        return "not known" if self.loss_fn is None else getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)

    @property
    def described(self) -> str:
        """Name for messages with the reduction, unless that is the mean: ``"MSELoss(reduction='sum')"``."""
        whole = isinstance(self.loss_fn, ArrangedLoss) or self.reduction == "mean"
        return self.name if whole else f"{self.name}(reduction={self.reduction!r})"

    @property
    def summed(self) -> bool:
        """Whether the loss is a sum over the samples of a batch, so that its gradient grows with the batch."""
        return self.reduction == "sum"

    @property
    def averaged(self) -> bool:
        """Whether the loss is a mean over the samples of a batch."""
        return self.reduction == "mean"

    @property
    def weighted(self) -> bool:
        """Whether the loss has class weights; torch divides their sum batch by batch."""
        return getattr(self.base, "weight", None) is not None

    @property
    def elementwise(self) -> bool:
        """Whether the targets must have the shape of the outputs; true for subclasses of such losses, too."""
        scaled = isinstance(self.loss_fn, ArrangedLoss) and self.loss_fn.is_plain
        return is_elementwise(self.base if scaled else self.loss_fn)

    @property
    def distance(self) -> bool:
        """Whether the loss attains its infimum at u = y and nowhere else: squared, absolute, Huber, smooth L1."""
        return self.kind in ("squared", "absolute", "huber", "smooth_l1")

    @property
    def logistic(self) -> bool:
        """Whether the loss is log(1 + exp(-y f)) with equal weights for all samples."""
        if self.factor != 1:
            return False
        if self.kind == "binary_cross_entropy":
            return self.base.weight is None and self.base.pos_weight is None
        return self.kind == "soft_margin"

    @property
    def classes_0_and_1(self) -> bool:
        """Whether the loss numbers two classes 0 and 1, rather than -1 and 1; true for subclasses, too."""
        return has_classes_0_and_1(self.base)

    def hard_labels(self, targets: Tensor) -> bool:
        """Return whether this is a cross-entropy whose targets name exactly one class per sample.

        The infimum, 0, is then approached wherever the right class scores highest for every sample.

        Args:
            targets: class numbers without ``ignore_index``, (n, ...), or rows with a single non-zero entry, 1.
        """
        if self.kind != "cross_entropy" or self.base.label_smoothing:
            return False
        if not targets.is_floating_point():
            return not bool((targets == self.base.ignore_index).any())
        return targets.ndim == 2 and bool(((targets != 0).sum(1) == 1).all() and (targets.sum(1) == 1).all())

    def like(self, outputs: Tensor) -> Any:
        """Return the loss; a module is copied with its weights in the type and on the device of the outputs."""
        if isinstance(self.loss_fn, ArrangedLoss):
            return self.loss_fn.like(outputs)
        return copy.deepcopy(self.loss_fn).to(outputs) if isinstance(self.loss_fn, nn.Module) else self.loss_fn

    def aligned(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets in the form that the loss expects with these outputs.

        They are on the outputs' device, floating ones in the outputs' type, and in their shape if the loss is
        elementwise.

        Args:
            outputs: network outputs u, (n, ...).
            targets: targets y of the n samples.

        Raises:
            ValueError: the loss is elementwise and there is not one target per output.
        """
        targets = targets.to(outputs.device)
        if targets.is_floating_point():
            targets = targets.to(outputs.dtype)
        if not self.elementwise:
            return targets
        if targets.numel() != outputs.numel():
            raise ValueError(
                f"targets: shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}; bring them into one shape "
                "(target_fn=lambda batch: ...)"
            )
        return targets.reshape(outputs.shape)

    def evaluate(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of all outputs together, computed in their type; see ``aligned`` for the targets."""
        loss: Tensor = self.like(outputs)(outputs, self.aligned(outputs, targets))
        return loss

    def scale(self, samples: int, outputs: int) -> LossScale | None:
        """Return k of a squared loss L = k S on n samples of C numbers; None for any other loss. See ``loss_scale``."""
        found = loss_scale(self.base, samples, outputs) if self.kind == "squared" else None
        return found if found is None else replace(found, k=self.factor * found.k)

    def facts(self, outputs: Tensor, targets: Tensor) -> LossFacts | None:
        """Return infimum and smoothness, and whether the infimum is attained; None: not known. See ``loss_facts``."""
        if self.kind in ("other", "unknown"):
            return None
        found = loss_facts(self.base, outputs, targets)
        if found is None or self.factor == 1:
            return found
        smoothness = None if found.smoothness is None else self.factor * found.smoothness
        return replace(found, infimum=self.factor * found.infimum, smoothness=smoothness)


def loss_kind(loss_fn: object) -> LossKind:
    """Describe a loss function.

    Args:
        loss_fn: a loss module, any other function of (outputs, targets), or None where the loss is not known.

    Example:
        >>> import torch
        >>> kind = loss_kind(torch.nn.MSELoss(reduction="sum"))
        >>> kind.kind, kind.summed, kind.scale(samples=10, outputs=1)
        ('squared', True, LossScale(k=2.0, samples=10))
    """
    if isinstance(loss_fn, ArrangedLoss):
        kind = torch_loss(loss_fn.base) if loss_fn.is_plain else "other"
        return LossKind(loss_fn, kind, loss_fn.reduction, loss_fn.factor)
    return LossKind(loss_fn, torch_loss(loss_fn), reduction(loss_fn))
