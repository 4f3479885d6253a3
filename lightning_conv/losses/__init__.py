"""Loss functions: kind, scale, infimum and smoothness, and the value and gradient as functions of the weights."""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = ["LossFacts", "LossFn", "LossKind", "LossScale", "curvature", "loss_facts", "loss_kind", "loss_scale"]

if TYPE_CHECKING:
    from lightning_conv.losses.facts import LossFacts, curvature, loss_facts
    from lightning_conv.losses.kind import LossFn, LossKind, loss_kind
    from lightning_conv.losses.scale import LossScale, loss_scale
else:
    __getattr__, __dir__ = lazy(__name__)
