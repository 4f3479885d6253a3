"""The empirical neural tangent kernel of any ``nn.Module``."""

from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.kernels.plan import NTKPlan, plan_ntk
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.rules import LayerRule, OuterRule, register_rule

__all__ = [
    "KernelGram",
    "LayerRule",
    "NTKOperator",
    "NTKPlan",
    "OuterRule",
    "Outputs",
    "Precision",
    "ntk_gram",
    "plan_ntk",
    "register_rule",
]
