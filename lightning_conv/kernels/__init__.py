"""The empirical neural tangent kernel of any ``nn.Module``."""

from lightning_conv.kernels.coupled import coupled_gram
from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.kernels.precision import Precision

__all__ = ["KernelGram", "NTKOperator", "Outputs", "Precision", "coupled_gram", "ntk_gram"]
