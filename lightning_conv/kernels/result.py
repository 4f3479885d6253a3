"""``KernelGram``: a Gram matrix of the empirical neural tangent kernel, with what is known about its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import Tensor

from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.planning.request import KernelOutputs
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.networks.evaluation import BatchNormMode


@dataclass(frozen=True)
class KernelGram:
    """A Gram matrix of the empirical neural tangent kernel, with what is known about its errors.

    The convention is that of the loss S = 1/2 sum |u - y|^2, so G = J J^T without a factor for means. With ``outputs="cotangents"``
    the rows of J are those of the contracted outputs, J_i^T s_i, with s as it was given to ``ntk_gram``.
    """

    matrix: Tensor  # float64, (n, n) or (n C, n C), exactly symmetric; (n, m) or (n C, m C) for two sets of samples
    outputs: KernelOutputs
    n_samples: int
    n_outputs: int
    precision: Precision
    batch_norm: BatchNormMode
    floor: float
    """Proven bound on |matrix - J J^T|_2 for the Jacobian J as computed. It covers products and sums, barring
    underflow."""
    jacobian_error: float
    """Estimate of |dJ|_F / |J|_F, the rounding inside the network's own forward and backward passes (measured, not
    proven)."""
    parameters: tuple[str, ...]  # by which J differentiates
    structured: tuple[str, ...]  # those of them that a layer rule covers
    general: tuple[str, ...]  # those that per-sample Jacobians cover
    seconds: float
    layer_traces: Mapping[str, float] = field(default_factory=dict)
    """Trace of each layer's kernel; the traces add up to ``trace``. Empty for two sets of samples."""
    layer_matrices: Mapping[str, Tensor] = field(default_factory=dict)
    """The kernel of each layer, if ``per_layer`` was set; the kernels add up to ``matrix``."""
    projection_error: float = 0.0
    """Estimated standard error of the matrix in the Frobenius norm, for ``outputs="projected"``."""
    n_samples2: int | None = None  # of the columns, for a kernel between two sets of samples
    plan: NTKPlan | None = None
    unused: tuple[str, ...] = ()
    """The other ``parameters``, on which the outputs of no sample depend."""
    narrow: str = ""
    """Where the network casts to a narrower type, so that no bound is certified and ``jacobian_error`` allows for that type; empty:
    nowhere. All passes in float64 are watched; of a kernel in float32, one pass in float64 on a few samples. A kernel in float64 may
    have here that an output changes with the rest of the batch or with chance, by more than rounding and less than 1.5e-8."""

    @property
    def trace(self) -> float:
        """Sum of the diagonal, which equals |J|_F^2 and the sum of all eigenvalues.

        Raises:
            ValueError: the kernel is between two sets of samples.
        """
        if self.n_samples2 is not None:
            raise ValueError(f"trace: the kernel is between two sets of samples, {tuple(self.matrix.shape)}")
        return float(self.matrix.diagonal().sum())

    def facts(self) -> dict[str, Any]:
        """Return what is known beside the matrices and the plan, in plain types, for checkpoints and states."""
        kept = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_FACTS}
        return kept | {"layer_traces": dict(self.layer_traces)}

    @classmethod
    def from_facts(cls, matrix: Tensor, facts: Mapping[str, Any]) -> Self:
        """Return the kernel with these ``facts``: missing ones take their defaults, and unknown ones are ignored."""
        known = {each.name for each in fields(cls)} - {"matrix"}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in facts.items() if name in known
        }
        return cls(matrix=matrix, **values)


NOT_FACTS = ("matrix", "layer_matrices", "plan")
