"""Convergence theory diagnostics for PyTorch networks: the mathematics, without Lightning."""

from lightning_conv import _checkout

_checkout.install()

__version__ = "0.1.0"

from lightning_conv.anatomy import Head, find_head, last_hidden_features
from lightning_conv.drift import Drift, centred_alignment, kernel_drift
from lightning_conv.expressivity import RankCertificate, certify_expressivity
from lightning_conv.kernels import KernelGram, ntk_gram
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.spectrum import Bounded, Spectrum, kernel_spectrum

__all__ = [
    "Bounded",
    "Drift",
    "Head",
    "KernelGram",
    "RankCertificate",
    "Spectrum",
    "centred_alignment",
    "certify_expressivity",
    "find_head",
    "kernel_drift",
    "kernel_spectrum",
    "last_hidden_features",
    "ntk_gram",
    "resolved_spectrum",
]
