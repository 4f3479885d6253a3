"""The theorems, a file a paper: what each asks of a network, as inequalities that can be measured.

Every function states the formula, the loss scale and the theorem it belongs to. What comes out as a judgement is a ``Criterion``.
"""

from lightning_conv.theory.criterion import Criterion, Verdict, at_least, at_most, not_applicable
from lightning_conv.theory.loss_scale import LossScale, loss_scale

__all__ = ["Criterion", "LossScale", "Verdict", "at_least", "at_most", "loss_scale", "not_applicable"]
