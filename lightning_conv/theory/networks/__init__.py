"""The theorems' own networks, in their own parametrisation, as plain modules."""

from lightning_conv.theory.networks.allen_zhu import AllenZhuNet
from lightning_conv.theory.networks.biased import BiasedTwoLayer
from lightning_conv.theory.networks.du import DuConvResNet, DuFC, DuNetwork, DuResNet
from lightning_conv.theory.networks.du_two_layer import DuTwoLayer
from lightning_conv.theory.networks.leaky import LeakyTwoLayer
from lightning_conv.theory.networks.linear import LinearNetwork

__all__ = [
    "AllenZhuNet",
    "BiasedTwoLayer",
    "DuConvResNet",
    "DuFC",
    "DuNetwork",
    "DuResNet",
    "DuTwoLayer",
    "LeakyTwoLayer",
    "LinearNetwork",
]
