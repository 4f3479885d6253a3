"""``NTKOperator``: products of the empirical neural tangent kernel with vectors, without forming the matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_conv.kernels.planning.request import require_option
from lightning_conv.kernels.products.jacobian_map import JacobianMap
from lightning_conv.linalg.estimates import (
    Estimate,
    estimate_alignment,
    estimate_frobenius_norm,
    estimate_target_alignment,
    estimate_trace,
)
from lightning_conv.linalg.spectral_estimates import estimate_effective_rank, estimate_lambda_max
from lightning_conv.machine.memory import blocks, memory_budget
from lightning_conv.networks.evaluation import BatchNormMode, Inputs, sample_count

OperatorOutputs: TypeAlias = Literal["full", "sum", "trace"]


class NTKOperator:
    r"""The kernel G = J J^T of a model as a linear operator, applied by a backward pass and a forward derivative.

    .. math:: G v = J (J^T v), \qquad J = \partial u / \partial \theta \in \mathbb{R}^{N \times P}

    Neither G nor the Jacobian J is ever formed, so the number n of samples may be large. The whole batch may go through
    the network at once, so samples may couple (``batch_norm="batch"``). Vectors are float64 on input and output. The
    passes in between are in the dtype of the network: in float32 a product is accurate, and G symmetric, to about 1e-6
    |G||v|. ``dtype=torch.float64`` evaluates a converted copy instead.

    Parameters and buffers are copied (the inputs are not), so the operator remains the kernel at this moment while
    training goes on. The model is unchanged afterwards, as with ``ntk_gram``.

    The methods from ``trace`` to ``alignment`` return estimates with a standard error, not bounds.

    Args:
        model: a module that returns one tensor with samples along dimension 0.
        inputs: n samples: a tensor, or a tuple or mapping of tensors that all have n rows.
        parameters: names or shell patterns (``"encoder.*"``) of the parameters to differentiate by; None: all with
            ``requires_grad``.
        outputs: which of the C outputs enter. ``"full"``: N = n C, row i C + c. ``"sum"``: N = n, the summed output.
            ``"trace"``: N = n, the sum of the kernels of the C outputs; a product costs C times as much as with the
            others.
        batch_norm: ``"eval"``: running statistics. ``"frozen"``: the statistics of ``inputs``, as constants.
            ``"batch"``: the statistics of ``inputs``, differentiated through as in training.
        dtype: None: the dtype of the model. ``torch.float64``: a converted copy of the model.
        max_memory: number of bytes that the passes through the network may use, such as ``2**30`` or ``1e9``; None: a quarter of
            the free memory. It determines ``chunk`` and the number of vectors per pass. The vectors themselves, and the matrix
            of ``dense``, come in addition.
        chunk: number of samples that go through the network at once; None: as many as ``max_memory`` allows. With
            ``batch_norm="batch"`` it must be all of them.

    Attributes:
        parameters: names of the differentiated parameters.
        n_samples: n.
        n_outputs: C.
        device: device of the passes and of the vectors that come back.
        precision: dtype of the passes.
        narrowing: where the passes cast to a narrower type than ``precision``, on the first few samples; None: nowhere.
        jvp_method: how J w is computed: ``"forward mode"`` or ``"double backward"``.
        jvp_reason: why not in forward mode.

    Raises:
        ValueError: an option is unknown; there is no parameter; the inputs are empty or not finite; the forward is
            random; samples couple although ``batch_norm`` is not ``"batch"``; ``max_memory`` is not a finite number of
            at least one byte; ``chunk`` is below 1, or below n with ``batch_norm="batch"``.
        TypeError: the model does not return one floating-point tensor.
        MemoryError: a single pass does not fit into ``max_memory``.
        RuntimeError: J w can be computed neither in forward mode nor by a double backward.

    Cost: six forwards, a backward and P numbers per vector. Source: Jacot, Gabriel, Hongler 2018 (1806.07572, the
    kernel); Pearlmutter 1994 (products with derivatives).

    Example:
        >>> import torch
        >>> operator = NTKOperator(torch.nn.Linear(3, 2), torch.eye(3), outputs="sum")
        >>> operator @ torch.ones(3, dtype=torch.float64)  # 2 outputs x (x_i . x_j + 1 for the bias), summed over j
        tensor([8., 8., 8.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        parameters: str | Sequence[str] | None = None,
        outputs: OperatorOutputs = "full",
        batch_norm: BatchNormMode = "eval",
        dtype: torch.dtype | None = None,
        max_memory: float | None = None,
        chunk: int | None = None,
    ) -> None:
        if str(outputs) == "projected":  # an option of ntk_gram
            raise ValueError(
                "outputs: 'projected' is an option of ntk_gram; an operator has 'trace', the kernel that it estimates, 'full' and 'sum'"
            )
        require_option("outputs", outputs, get_args(OperatorOutputs))
        require_option("batch_norm", batch_norm, get_args(BatchNormMode))
        require_option("dtype", dtype, (None, torch.float64))
        samples = sample_count(inputs)
        if chunk is not None and (chunk < 1 or (batch_norm == "batch" and chunk < samples)):
            raise ValueError(
                f'chunk: {chunk}; need at least 1, and all {samples} samples with batch_norm="batch", since they couple'
            )
        self._map = JacobianMap(
            model, inputs, parameters=parameters, batch_norm=batch_norm, dtype=dtype, max_memory=max_memory, chunk=chunk
        )
        self._max_memory = max_memory
        self.outputs, self.batch_norm = outputs, batch_norm
        self.n_samples, self.n_outputs = samples, self._map.n_outputs
        self.parameters = self._map.names
        self.device, self.precision = self._map.module.device, self._map.module.dtype
        self.narrowing = self._map.narrowing
        self.jvp_method, self.jvp_reason = self._map.push_rule.method, self._map.push_rule.reason

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, N) of the kernel."""
        size = self.n_samples * (self.n_outputs if self.outputs == "full" else 1)
        return size, size

    @property
    def n_parameters(self) -> int:
        """Number P of parameters."""
        return sum(self._map.module.parameters[name].numel() for name in self.parameters)

    def matmul(self, vectors: Tensor) -> Tensor:
        """Return G v for v (N,), or G V for V (N, k), in float64 on the operator's device.

        Raises:
            ValueError: the first dimension of ``vectors`` is not N.
        """
        columns, scales = self._columns(vectors, self.shape[0])
        result = torch.zeros_like(columns)
        copies = self.n_outputs if self.outputs == "trace" else 1
        # For "trace" each column is taken C times, once for each output.
        for cut in blocks(columns.shape[1] * copies, self._map.block):
            pairs = torch.arange(cut.start, cut.stop, device=self.device)
            column, output = pairs // copies, pairs % copies
            cotangents = self._cotangents(columns[:, column].T, output)
            result.index_add_(1, column, self._values(self._map.push(self._map.pull(cotangents)), output).T)
        result *= scales
        return result if vectors.ndim == 2 else result[:, 0]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.matmul(vectors)

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return J^T v, flat in the order of ``parameters``: (P,) for v (N,), (P, k) for (N, k).

        Raises:
            ValueError: the first dimension is not N, or ``outputs="trace"``, for which there is no single J.
        """
        self._require_one_jacobian()
        columns, scales = self._columns(vectors, self.shape[0])
        parts = []
        for cut in blocks(columns.shape[1], self._map.block):
            pulled = self._map.pull(self._cotangents(columns[:, cut].T, None))
            parts.append(torch.cat([gradient.flatten(1) for gradient in pulled.values()], 1).T.double())
        result = torch.cat(parts, 1) * scales
        return result if vectors.ndim == 2 else result[:, 0]

    def vjp(self, vector: Tensor) -> dict[str, Tensor]:
        """Return J^T v for one vector v (N,), as a mapping from each parameter to a tensor of its shape.

        Raises:
            ValueError: the shape is not (N,), or ``outputs="trace"``.
        """
        if vector.ndim != 1:
            raise ValueError(f"vector: shape {tuple(vector.shape)}; need ({self.shape[0]},)")
        flat = self.transposed(vector)
        shapes = [self._map.module.parameters[name].shape for name in self.parameters]
        pieces = torch.split(flat, [shape.numel() for shape in shapes])
        return {n: piece.reshape(s) for n, piece, s in zip(self.parameters, pieces, shapes, strict=True)}

    def jvp(self, directions: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return J w: (N,) for w (P,) or a mapping by parameter, (N, k) for (P, k).

        Raises:
            ValueError: the first dimension is not P, a parameter is missing or unknown, or ``outputs="trace"``.
        """
        self._require_one_jacobian()
        if isinstance(directions, Mapping):
            if set(directions) != set(self.parameters):
                raise ValueError(f"directions: {sorted(directions)}; need {sorted(self.parameters)}")
            directions = torch.cat([directions[name].flatten() for name in self.parameters])
        columns, scales = self._columns(directions, self.n_parameters)
        shapes = [self._map.module.parameters[name].shape for name in self.parameters]
        parts = []
        for cut in blocks(columns.shape[1], self._map.block):
            pieces = torch.split(columns[:, cut].T, [shape.numel() for shape in shapes], 1)
            pushed = {n: p.reshape(-1, *s) for n, p, s in zip(self.parameters, pieces, shapes, strict=True)}
            parts.append(self._values(self._map.push(pushed), None).T)
        result = torch.cat(parts, 1) * scales
        return result if directions.ndim == 2 else result[:, 0]

    def dense(self) -> Tensor:
        """Return the matrix (N, N), symmetrised; ``ntk_gram`` is faster if samples do not couple, and bounds its error.

        Raises:
            MemoryError: the matrix does not fit into ``max_memory``.

        Cost: N products.
        """
        memory_budget(self._max_memory, self.device, 8 * self.shape[0] ** 2)
        matrix = self.matmul(torch.eye(self.shape[0], dtype=torch.float64, device=self.device))
        return (matrix + matrix.T) / 2

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

    def alignment(self, other: Tensor | NTKOperator, *, products: int = 30, seed: int = 0) -> Estimate:
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
        if isinstance(other, NTKOperator):
            if other.shape != self.shape:
                raise ValueError(
                    f"other: shape {other.shape} against {self.shape}; need an operator on the same samples and outputs"
                )
            return estimate_alignment(self.matmul, other.matmul, size, products=products, seed=seed, device=self.device)
        targets = other.detach().to(self.device, torch.float64)
        targets = targets.reshape(size, 1) if targets.numel() == size else targets
        return estimate_target_alignment(self.matmul, size, targets, products=products, seed=seed)

    def _columns(self, vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return float64 columns, scaled by powers of two into the range of the passes' dtype, and these powers."""
        if vectors.ndim not in (1, 2) or vectors.shape[0] != size or vectors.numel() == 0:
            raise ValueError(f"vectors: shape {tuple(vectors.shape)}; need ({size},) or ({size}, k)")
        columns = vectors.detach().to(self.device, torch.float64).reshape(size, -1)
        largest = columns.abs().amax(0)
        scales = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), torch.ones_like(largest))
        return columns / scales, scales

    def _cotangents(self, rows: Tensor, output: Tensor | None) -> Tensor:
        """Return the output gradients (b, n, C) that represent the vectors ``rows`` (b, N)."""
        if self.outputs == "full":
            return rows.reshape(len(rows), self.n_samples, self.n_outputs)
        everywhere = rows[:, :, None].expand(-1, -1, self.n_outputs)
        if self.outputs == "sum" or output is None:
            return everywhere
        return everywhere * torch.nn.functional.one_hot(output, self.n_outputs)[:, None]

    def _values(self, images: Tensor, output: Tensor | None) -> Tensor:
        """Return the rows (b, N) that represent output derivatives (b, n, C), by the transpose of ``_cotangents``."""
        if self.outputs == "full":
            return images.flatten(1)
        if self.outputs == "sum" or output is None:
            return images.sum(2)
        return images[torch.arange(len(images), device=images.device), :, output]

    def _require_one_jacobian(self) -> None:
        if self.outputs == "trace":
            raise ValueError(
                'outputs: "trace" is a sum of C products J_c J_c^T, without a single J; use "full" or "sum" for J^T v and J w'
            )
