"""Metrics of the latest kernel's eigenvalues: ``MinEigenvalue``, ``EffectiveRank``."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from typing_extensions import override

from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.spectrum import Bounded, Spectrum, require_symmetric
from lightning_conv.metrics.states import KernelMetric, matrix_of


class SpectrumMetric(KernelMetric):
    """A metric of the latest kernel's spectrum. In a ``MetricCollection`` such metrics share one state, but each decomposes it."""

    @override
    def update(self, gram: KernelGram | Tensor) -> None:
        """Take ``gram``, a ``KernelGram`` or a symmetric float64 matrix (N, N), as the latest kernel."""
        require_symmetric(matrix_of(gram))
        self._store("matrix", gram)

    @override
    def compute(self) -> Tensor:
        """Compute the metric; NaN before the first update."""
        gram = self._stored("matrix")
        self._found = None if gram is None else kernel_spectrum(gram)
        return self._scalar(float("nan") if self._found is None else self._number(self._found))

    @abstractmethod
    def _number(self, spectrum: Spectrum) -> float:
        """Return the metric's number."""

    def spectrum(self) -> Spectrum:
        """Return all eigenvalues, with bounds of the smallest and the largest one.

        Like ``compute``, this is a collective operation, and it is equally expensive unless the result is cached.

        Raises:
            ValueError: there is no kernel yet.
        """
        spectrum: Spectrum = self._details("gram")
        return spectrum


class MinEigenvalue(SpectrumMetric):
    """The smallest eigenvalue lambda_min of the latest kernel, for the loss S = 1/2 sum |u - y|^2, with ``bounds()``.

    The value alone may consist of rounding errors. Log the lower bound beside it, or stop on that bound. On m samples of a
    set lambda_min is an UPPER bound of lambda_min on the whole set (interlacing). For several ranks see ``KernelMetric``.

    Args:
        options: options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: from ``update`` if the kernel is not a finite symmetric float64 matrix. (A float32 matrix has lost the
            eigenvalues below 1e-7 of the largest, and converting it does not restore them.) From ``compute`` if ranks hold
            different kernels.

    Cost: one symmetric eigenvalue problem per ``compute``, about 12 N^3 flops.
    Source: ``kernel_spectrum``; Du et al. 2019 for the role of lambda_min.

    Example::

        def on_validation_epoch_end(self):
            self.lambda_min.update(ntk_gram(self, self.probe, precision="certified"))
            bounds = self.lambda_min.bounds()
            self.log_dict({"lambda_min": bounds.value, "lambda_min_lower": bounds.lower})
            self.lambda_min.reset()

    Example:
        >>> import torch
        >>> metric = MinEigenvalue()
        >>> metric.update(torch.diag(torch.tensor([0.25, 2.0], dtype=torch.float64)))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
        >>> metric.bounds().lower <= 0.25 <= metric.bounds().upper
        True
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    @override
    def _number(self, spectrum: Spectrum) -> float:
        return spectrum.lambda_min.value

    def bounds(self) -> Bounded:
        """Return lambda_min with its interval, and whether the interval is proven; collective like ``compute``."""
        return self.spectrum().lambda_min


class EffectiveRank(SpectrumMetric):
    r"""Effective rank of the latest kernel, the exponential of its spectrum's entropy.

    .. math:: \exp\Bigl(-\sum_i p_i \ln p_i\Bigr), \qquad p_i = \lambda_i / \sum_j \lambda_j

    It is N if all eigenvalues are equal, 1 if only one is not zero and 0 if all are. It has no unit and does not depend on the scale of
    the kernel. For several ranks see ``KernelMetric``.

    Args:
        options: options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: from ``update`` if the kernel is not a finite symmetric float64 matrix; from ``compute`` if ranks hold
            different kernels.

    Cost: one symmetric eigenvalue problem per ``compute``, about 12 N^3 flops.
    Source: Roy & Vetterli 2007, Definition 1.

    Example:
        >>> import torch
        >>> metric = EffectiveRank()
        >>> metric(torch.eye(4, dtype=torch.float64))
        tensor(4., dtype=torch.float64)
    """

    higher_is_better = None  # more directions learnt at a similar speed, or fewer features: neither is better
    plot_lower_bound = 0.0

    @override
    def _number(self, spectrum: Spectrum) -> float:
        return spectrum.effective_rank
