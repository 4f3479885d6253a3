"""``KernelGram``: a Gram matrix of the empirical NTK and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, TypeAlias

from torch import Tensor

from lightning_conv.kernels.plan import NTKPlan
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.networks.evaluation import BatchNormMode

Outputs: TypeAlias = Literal["trace", "full", "sum", "projected"]


@dataclass(frozen=True)
class KernelGram:
    """A Gram matrix of the empirical NTK with what is known about its errors (convention of S = 1/2 sum |u - y|^2: G = J J^T)."""

    matrix: Tensor  # float64, (n, n) or (n C, n C), exactly symmetric; (n, m) or (n C, m C) for two sets of samples
    outputs: Outputs
    n_samples: int
    n_outputs: int
    precision: Precision
    batch_norm: BatchNormMode
    floor: float
    """Proven bound on |matrix - J J^T|_2 for the Jacobian J as computed: products and sums only, barring underflow."""
    jacobian_error: float
    """Estimate of |dJ|_F / |J|_F, the rounding inside the network's own forward and backward pass (measured, not
    proven)."""
    parameters: tuple[str, ...]  # over which J is taken
    structured: tuple[str, ...]  # those of them by a layer rule
    general: tuple[str, ...]  # those by per-sample Jacobians
    seconds: float
    layer_traces: Mapping[str, float] = field(default_factory=dict)
    """Trace of every layer's own kernel; they add up to ``trace``. Empty for two sets of samples."""
    layer_matrices: Mapping[str, Tensor] = field(default_factory=dict)
    """Every layer's own kernel, where ``per_layer`` was asked for; they add up to ``matrix``."""
    projection_error: float = 0.0
    """Of ``outputs="projected"``: estimated standard error of the matrix, in the Frobenius norm."""
    n_samples2: int | None = None  # of the columns, for a kernel between two sets of samples
    plan: NTKPlan | None = None
    unused: tuple[str, ...] = ()
    """The rest of ``parameters``: no sample's outputs depend on them."""

    @property
    def trace(self) -> float:
        """Sum of the diagonal = |J|_F^2 = sum of all eigenvalues.

        Raises:
            ValueError: the kernel is between two sets of samples.
        """
        if self.n_samples2 is not None:
            raise ValueError(f"trace: the kernel is between two sets of samples, {tuple(self.matrix.shape)}")
        return float(self.matrix.diagonal().sum())

    def facts(self) -> dict[str, Any]:
        """What is known beside the matrices and the plan, in plain types: for checkpoints and states."""
        kept = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_FACTS}
        return kept | {"layer_traces": dict(self.layer_traces)}

    @classmethod
    def from_facts(cls, matrix: Tensor, facts: Mapping[str, Any]) -> Self:
        """The inverse of ``facts``; what an older version did not store takes its default, and what is not known is left out."""
        known = {each.name for each in fields(cls)} - {"matrix"}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in facts.items() if name in known
        }
        return cls(matrix=matrix, **values)


NOT_FACTS = ("matrix", "layer_matrices", "plan")
