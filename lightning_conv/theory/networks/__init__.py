"""The networks that the theorems are about, in the parametrisation of their papers, as plain modules."""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

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
    "SymmetricTwoLayer",
]

if TYPE_CHECKING:
    from lightning_conv.theory.networks.allen_zhu import AllenZhuNet
    from lightning_conv.theory.networks.averaged_sgd import SymmetricTwoLayer
    from lightning_conv.theory.networks.bias_ntk import BiasedTwoLayer
    from lightning_conv.theory.networks.du import DuConvResNet, DuFC, DuNetwork, DuResNet
    from lightning_conv.theory.networks.du_two_layer import DuTwoLayer
    from lightning_conv.theory.networks.frei import LeakyTwoLayer
    from lightning_conv.theory.networks.linear_networks import LinearNetwork
else:
    __getattr__, __dir__ = lazy(__name__)
