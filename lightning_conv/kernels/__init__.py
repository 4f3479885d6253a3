"""The empirical neural tangent kernel of any ``nn.Module``."""

from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram, plan_ntk
from lightning_conv.kernels.plan import NTKPlan
from lightning_conv.kernels.precision import Precision

__all__ = ["KernelGram", "NTKPlan", "Outputs", "Precision", "ntk_gram", "plan_ntk"]
