"""``label_margins``: what the other samples say about the label of each one, by kernel ridge regression without it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.arguments import require_type

RIDGES = tuple(10.0**power for power in range(-8, 2))
"""Ridges that are tried, in units of the mean of the kernel's diagonal."""


@dataclass(frozen=True)
class LabelMargins:
    """Leave-one-out margins of the given labels.

    Attributes:
        margins: Score of the given label minus the largest score of another one, (n,); the lower, the more suspicious.
        suggested: The class of the largest score, (n,).
        ridge: What was added to the diagonal of the kernel.
        error: Mean squared leave-one-out error with it.
    """

    margins: Tensor
    suggested: Tensor
    ridge: float
    error: float

    @property
    def suspicious(self) -> Tensor:
        """Return the numbers of the samples, (n,), the most suspicious one first."""
        return self.margins.argsort(stable=True)


def label_margins(kernel: Tensor, labels: Tensor, *, ridge: float | None = None) -> LabelMargins:
    r"""Compute the leave-one-out margins of all labels from one factorisation.

    With Y, (n, C), the labels as 0 and 1 minus the mean of their columns, and :math:`A = (K + \rho I)^{-1}`, the residual of sample i
    under the regression without it is

    .. math:: r_i = (A Y)_i / A_{ii}

    Args:
        kernel: K, (n, n), symmetric and positive semidefinite up to rounding, such as the trace kernel of a network.
        labels: Class numbers, (n,).
        ridge: rho; None: that of ``RIDGES`` with the least leave-one-out error.

    Raises:
        TypeError: The kernel or the labels are no tensor.
        ValueError: The shapes do not agree, the kernel is not finite or zero, there are fewer than three samples or two classes, the ridge
            is not above 0 or not finite.

    Cost: one eigendecomposition of K and n^2 (C + 1) flops for each ridge.

    Source: Golub, Heath & Wahba 1979 (the residuals without each sample); Rifkin & Lippert 2007, section 3.
    """
    require_ridge(ridge)
    require_type("kernel", kernel, Tensor, "a matrix (n, n), such as ntk_gram(...).matrix")
    require_type("labels", labels, Tensor, "class numbers, (n,)")
    k = kernel.detach().double().cpu()
    given = labels.detach().cpu().long().flatten()
    if k.ndim != 2 or k.shape != (len(given), len(given)) or len(given) < 3:
        raise ValueError(
            f"kernel: shape {tuple(k.shape)} for {len(given)} labels; need (n, n) and n labels, n of at least 3"
        )
    scale = float(k.diagonal().mean())
    if not bool(torch.isfinite(k).all()) or not scale > 0:
        raise ValueError("kernel: not finite, or zero")
    classes, number = torch.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("labels: one class only, so nothing can be compared; pass samples of at least two classes")
    targets = torch.nn.functional.one_hot(number, len(classes)).double()
    mean = targets.mean(0)
    values, vectors = torch.linalg.eigh((k + k.T) / 2)
    values = values.clamp(min=0)
    coordinates, squares = vectors.T @ (targets - mean), vectors.square()

    def residuals(rho: float) -> Tensor:
        inverse = 1 / (values + rho)
        found: Tensor = (vectors @ (inverse[:, None] * coordinates)) / (squares @ inverse)[:, None]
        return found

    tried = [scale * each for each in RIDGES] if ridge is None else [float(ridge)]
    errors = [float(residuals(rho).square().mean()) for rho in tried]
    best = min(range(len(tried)), key=lambda number: errors[number])
    scores = targets - residuals(tried[best])
    own = scores.gather(1, number[:, None])[:, 0]
    others = scores.scatter(1, number[:, None], -torch.inf).amax(1)
    return LabelMargins(own - others, classes[scores.argmax(1)], tried[best], errors[best])


def require_ridge(ridge: object) -> None:
    """Refuse a ridge that is none.

    Args:
        ridge: The argument of this name.

    Raises:
        ValueError: It is neither a finite number above 0 nor None.
    """
    if ridge is not None and (not isinstance(ridge, (int, float)) or not 0 < ridge < math.inf):
        raise ValueError(f"ridge: {ridge!r}; need a finite number above 0, or None for the one with the least error")


def gaussian_kernel(inputs: Tensor) -> Tensor:
    r"""Return :math:`\exp(-|x_i - x_j|^2 / (2 m))` with m the median of the squared distances: a baseline that knows no network.

    Args:
        inputs: x, (n, ...).

    Raises:
        TypeError: It is no tensor.
        ValueError: There are fewer than two samples, or a sample has no dimension of its own.
    """
    require_type("inputs", inputs, Tensor, "samples, (n, ...)")
    if inputs.ndim < 2 or len(inputs) < 2:
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; need (n, ...) with n of at least 2")
    x = inputs.detach().double().cpu().flatten(1)
    distances = torch.cdist(x, x).square()
    above = distances[torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)]
    median = float(above.median()) or 1.0
    return torch.exp(-distances / (2 * median))
