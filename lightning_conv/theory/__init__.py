"""The theorems, a file a paper: what each asks of a network, as inequalities that can be measured.

Every function states the formula, the loss scale and the theorem it belongs to. What comes out as a judgement is a ``Criterion``.
"""

from lightning_conv.theory import du
from lightning_conv.theory.criterion import Criterion, Verdict, at_least, at_most, not_applicable
from lightning_conv.theory.descent import Descent, gradient_descent
from lightning_conv.theory.loss_scale import LossScale, loss_scale
from lightning_conv.theory.networks import DuConvResNet, DuFC, DuResNet, DuTwoLayer
from lightning_conv.theory.objective import Objective

__all__ = [
    "Criterion",
    "Descent",
    "DuConvResNet",
    "DuFC",
    "DuResNet",
    "DuTwoLayer",
    "LossScale",
    "Objective",
    "Verdict",
    "at_least",
    "at_most",
    "du",
    "gradient_descent",
    "loss_scale",
    "not_applicable",
]
