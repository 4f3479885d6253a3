"""Loss functions: their kind, scale, infimum and smoothness, and their value and gradient as functions of the weights."""

from lightning_conv.losses.facts import LossFacts, curvature, loss_facts
from lightning_conv.losses.scale import LossScale, loss_scale

__all__ = ["LossFacts", "LossScale", "curvature", "loss_facts", "loss_scale"]
