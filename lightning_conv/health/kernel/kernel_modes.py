r"""``KernelModes``: the eigenvalues and eigenvectors of a kernel in which a run is continued, all of them or the ones that matter.

Source: Saad 2011, Numerical Methods for Large Eigenvalue Problems, section 6.3 (the Krylov space reproduces every polynomial
of the matrix that acts on the start vector).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.arguments import require_callable, require_type, require_whole
from lightning_conv.health.step.step_coordinates import flat_sizes
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.linalg.lanczos import lanczos


@dataclass(frozen=True)
class KernelModes:
    r"""A kernel :math:`\Theta = V \, \mathrm{diag}(\theta) \, V^T`, positive semidefinite.

    Attributes:
        values: theta, (k,), none of them negative.
        vectors: V, (N, k), with orthonormal columns. N is the number n C of outputs, or n if all outputs share one kernel.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of_matrix(cls, kernel: Tensor) -> KernelModes:
        """Return all modes of a kernel matrix.

        Args:
            kernel: Theta, (N, N), symmetric and positive semidefinite up to rounding.

        Raises:
            TypeError: The kernel is no tensor.
            ValueError: The kernel is not square or not finite.

        Cost: one eigendecomposition, about 12 N^3 flops.
        """
        require_type("kernel", kernel, Tensor, "a matrix (N, N), such as ntk_gram(...).matrix")
        if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not bool(torch.isfinite(kernel).all()):
            raise ValueError(f"kernel: shape {tuple(kernel.shape)}; need a square matrix of finite numbers")
        matrix = kernel.detach().double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return cls(values.clamp(min=0), vectors)

    @classmethod
    def of_products(cls, product: Callable[[Tensor], Tensor], start: Tensor, *, products: int = 20) -> KernelModes:
        r"""Return the modes that a start vector reaches by a few products with the kernel.

        With Q the Krylov basis of k products, the kernel is replaced by :math:`Q (Q^T \Theta Q) Q^T`. For every polynomial p of
        a degree below k, :math:`p(Q Q^T \Theta Q Q^T) r = p(\Theta) r` for the start vector r. So up to k - 1 steps of descent
        on a squared loss are reproduced exactly, and more of them nearly.

        Args:
            product: v -> Theta v, on vectors (N,).
            start: r, (N,), the gradient of the loss in the outputs; not zero.
            products: k, the largest number of products.

        Raises:
            TypeError: ``product`` cannot be called, ``start`` is no tensor, or ``products`` no whole number.
            ValueError: The start vector is zero or not finite, ``product`` returns NaN or another shape, or ``products`` is below 1.

        Cost: ``products`` products and as many vectors of N numbers.
        """
        require_callable("product", product, "a function of a vector (N,), such as step_kernel(...)")
        require_type("start", start, Tensor, "the gradient of the loss in the outputs")
        require_whole("products", products, least=1)
        if not bool(torch.isfinite(start).all()) or not bool((start != 0).any()):
            raise ValueError(
                "start: zero or not finite; need the gradient of the loss in the outputs before it vanishes"
            )
        first = start.detach().double().flatten()

        def columns(v: Tensor) -> Tensor:
            return product(v[:, 0]).to(v).reshape(-1, 1)

        krylov = lanczos(columns, first.numel(), steps=min(products, first.numel()), start=first)
        values, coordinates = torch.linalg.eigh(krylov.projected)
        return cls(values.clamp(min=0), krylov.basis @ coordinates)


def step_kernel(operator: NTKOperator, sizes: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    r"""Return the product with :math:`\Theta = J D J^T`, which maps the gradient in the outputs to a step of the outputs.

    Args:
        operator: J, with ``outputs="full"``.
        sizes: D, the rate over the preconditioner of every weight (``StepSizes.scales``); weights that are left out do not move.

    Raises:
        TypeError: See ``flat_sizes``.
        ValueError: See ``flat_sizes``.

    Cost: a backward pass and a forward derivative per product.
    """
    flat = flat_sizes(operator, sizes)

    def product(v: Tensor) -> Tensor:
        back = operator.transposed(v.to(operator.precision))
        return operator.jvp((flat * back).to(operator.precision)).reshape(-1).double()

    return product
