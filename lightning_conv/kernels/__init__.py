"""The empirical neural tangent kernel of any ``nn.Module``."""

from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram
from lightning_conv.kernels.precision import Precision

__all__ = ["KernelGram", "Outputs", "Precision", "ntk_gram"]
