"""Convergence theorems, one module per paper: what each assumes of a network, as inequalities that can be measured.

Every function states its formula, the scale of the loss and the theorem that it belongs to. Every judgement is a
``Criterion``.
"""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = [
    "AllenZhuNet",
    "BiasedTwoLayer",
    "Criterion",
    "Descent",
    "DuConvResNet",
    "DuFC",
    "DuResNet",
    "DuTwoLayer",
    "LeakyTwoLayer",
    "LinearNetwork",
    "LossScale",
    "Objective",
    "Verdict",
    "allen_zhu",
    "at_least",
    "at_most",
    "bias_ntk",
    "du",
    "frei",
    "gradient_descent",
    "implicit_bias",
    "linear_networks",
    "linear_regions",
    "loss_scale",
    "not_applicable",
]

if TYPE_CHECKING:
    from lightning_conv.losses.objective import Objective
    from lightning_conv.losses.scale import LossScale, loss_scale
    from lightning_conv.theory.criterion import Criterion, Verdict, at_least, at_most, not_applicable
    from lightning_conv.theory.networks import (
        AllenZhuNet,
        BiasedTwoLayer,
        DuConvResNet,
        DuFC,
        DuResNet,
        DuTwoLayer,
        LeakyTwoLayer,
        LinearNetwork,
    )
    from lightning_conv.theory.papers import allen_zhu, bias_ntk, du, frei, linear_networks, linear_regions
    from lightning_conv.theory.papers import frei as implicit_bias  # its former name
    from lightning_conv.theory.tools.descent import Descent, gradient_descent
else:
    __getattr__, __dir__ = lazy(__name__)
