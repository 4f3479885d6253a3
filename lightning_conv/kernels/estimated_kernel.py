"""``EstimatedKernel``: what is estimated of a kernel from its products with random vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_conv.linalg.estimates import (
    Estimate,
    estimate_alignment,
    estimate_frobenius_norm,
    estimate_target_alignment,
    estimate_trace,
)
from lightning_conv.linalg.spectral_estimates import estimate_effective_rank, estimate_lambda_max


class EstimatedKernel(ABC):
    """A kernel G of N rows that is known by its products alone; each method returns an estimate with a standard error, no bound.

    Attributes:
        device: device of the vectors that come back.
        precision: dtype in which the products are computed.
    """

    device: torch.device
    precision: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (N, N) of the kernel."""

    @abstractmethod
    def matmul(self, vectors: Tensor) -> Tensor:
        """Return G v for v (N,), or G V for V (N, k), in float64."""

    def trace(self, *, products: int = 30, seed: int = 0) -> Estimate:
        """Estimate the trace, which equals |J|_F^2, by Hutch++; see ``estimate_trace``."""
        return estimate_trace(self.matmul, self.shape[0], products=products, seed=seed, device=self.device)

    def frobenius_norm(self, *, products: int = 30, seed: int = 0) -> Estimate:
        """Estimate |G|_F; see ``estimate_frobenius_norm``."""
        return estimate_frobenius_norm(self.matmul, self.shape[0], products=products, seed=seed, device=self.device)

    def lambda_max(self, *, steps: int = 60, tolerance: float | None = None, seed: int = 0) -> Estimate:
        """Estimate the largest eigenvalue, with its Ritz residual; see ``estimate_lambda_max``.

        ``tolerance=None`` stands for what the dtype of the passes resolves.
        """
        tolerance = torch.finfo(self.precision).eps ** 0.5 / 10 if tolerance is None else tolerance
        return estimate_lambda_max(
            self.matmul, self.shape[0], steps=steps, tolerance=tolerance, seed=seed, device=self.device
        )

    def effective_rank(self, *, probes: int = 8, steps: int = 12, seed: int = 0) -> Estimate:
        """Estimate the exponential of the entropy of the spectrum; see ``estimate_effective_rank``."""
        return estimate_effective_rank(
            self.matmul, self.shape[0], probes=probes, steps=steps, seed=seed, device=self.device
        )

    def alignment(self, other: Tensor | EstimatedKernel, *, products: int = 30, seed: int = 0) -> Estimate:
        """Estimate the alignment <G, H>_F / (|G|_F |H|_F), not centred, with an operator H or targets Y (H = Y Y^T).

        Args:
            other: an operator of the same N, such as one from an earlier moment of the training; or targets: one value
                per row, in any shape with N elements (for ``"full"``: (n, C)), or (N, k).
            products: number of products with the operator for each estimated norm.
            seed: seed of the random vectors.

        Raises:
            ValueError: the sizes differ.
        """
        size = self.shape[0]
        if isinstance(other, EstimatedKernel):
            if other.shape != self.shape:
                raise ValueError(
                    f"other: shape {other.shape} against {self.shape}; need an operator on the same samples and outputs"
                )
            return estimate_alignment(self.matmul, other.matmul, size, products=products, seed=seed, device=self.device)
        targets = other.detach().to(self.device, torch.float64)
        targets = targets.reshape(size, 1) if targets.numel() == size else targets
        return estimate_target_alignment(self.matmul, size, targets, products=products, seed=seed)
