"""The theorems' own networks, in their own parametrisation, as plain modules."""

from lightning_conv.theory.networks.du import DuConvResNet, DuFC, DuNetwork, DuResNet
from lightning_conv.theory.networks.du_two_layer import DuTwoLayer

__all__ = ["DuConvResNet", "DuFC", "DuNetwork", "DuResNet", "DuTwoLayer"]
