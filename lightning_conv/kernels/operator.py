"""``NTKOperator``: products of the empirical neural tangent kernel with vectors, without forming the matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_conv.arguments import require_option, require_whole
from lightning_conv.kernels.estimated_kernel import EstimatedKernel
from lightning_conv.kernels.planning.request import contracted_outputs
from lightning_conv.kernels.products.combinations import checked_cotangents
from lightning_conv.kernels.products.jacobian_map import JacobianMap
from lightning_conv.kernels.products.kernel_rows import KernelRows, contraction
from lightning_conv.kernels.products.scaled_columns import scaled_columns
from lightning_conv.machine.memory import blocks, memory_budget
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count

OperatorOutputs: TypeAlias = Literal["full", "sum", "trace"]


class NTKOperator(EstimatedKernel):
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
        cotangents: s, one row of output shape per sample, (n, C) or the shape of the outputs (n, ...): N = n, the kernel
            s_i^T K_ij s_j of the contracted outputs, with s as given; see ``ntk_gram``. They are not copied, and must not
            change. Not together with ``outputs``.
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
        cancellation: factor by which the rounding of the passes is larger relative to a contracted kernel (``"sum"``,
            ``cotangents``) than to the whole one, since its terms cancel; an estimate from the first few samples.
        narrowing: where the passes cast to a narrower type than ``precision``, on the first few samples; None: nowhere.
        jvp_method: how J w is computed: ``"forward mode"`` or ``"double backward"``.
        jvp_reason: why not in forward mode.

    Raises:
        ValueError: an option is unknown; there is no parameter; the inputs are empty or not finite; the forward is
            random; samples couple although ``batch_norm`` is not ``"batch"``; ``max_memory`` is not a finite number of
            at least one byte; ``chunk`` is below 1, or below n with ``batch_norm="batch"``; ``cotangents`` are not real, not
            finite, or not of the shape of the outputs, or ``outputs`` is given beside them.
        TypeError: the model does not return one floating-point tensor; ``cotangents`` are not a tensor.
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
        cotangents: Tensor | None = None,
        batch_norm: BatchNormMode = "eval",
        dtype: torch.dtype | None = None,
        max_memory: float | None = None,
        chunk: int | None = None,
    ) -> None:
        if str(outputs) == "projected" and cotangents is None:  # an option of ntk_gram
            raise ValueError(
                "outputs: 'projected' is an option of ntk_gram; an operator has 'trace', the kernel that it estimates, 'full' and 'sum'"
            )
        kind = contracted_outputs(outputs, cotangents, default="full", allowed=get_args(OperatorOutputs))
        require_option("batch_norm", batch_norm, get_args(BatchNormMode))
        require_option("dtype", dtype, (None, torch.float64))
        samples = sample_count(inputs)
        given = None if cotangents is None else checked_cotangents(cotangents, samples)
        if chunk is not None:
            require_whole("chunk", chunk, least=1)
        if chunk is not None and batch_norm == "batch" and chunk < samples:
            raise ValueError(f'chunk: {chunk}; need all {samples} samples with batch_norm="batch", since they couple')
        self._map = JacobianMap(
            model, inputs, parameters=parameters, batch_norm=batch_norm, dtype=dtype, max_memory=max_memory, chunk=chunk
        )
        self._max_memory = max_memory
        self.outputs: OperatorOutputs | Literal["cotangents"] = kind
        self.batch_norm = batch_norm
        self.n_samples, self.n_outputs = samples, self._map.n_outputs
        self.parameters = self._map.names
        self.device, self.precision = self._map.module.device, self._map.module.dtype
        self.narrowing = self._map.narrowing
        self.jvp_method, self.jvp_reason = self._map.push_rule.method, self._map.push_rule.reason
        self.cancellation = 1.0
        contracted = None
        if kind in ("sum", "cotangents"):
            contracted, self.cancellation = contraction(self._map, given)
        self._rows = KernelRows(samples, self.n_outputs, each=kind == "full", contracted=contracted, device=self.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (N, N) of the kernel."""
        return self._rows.size, self._rows.size

    @property
    def n_parameters(self) -> int:
        """Number P of parameters."""
        return sum(self._map.module.parameters[name].numel() for name in self.parameters)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter, in the order in which flat vectors hold them."""
        return {name: self._map.module.parameters[name].shape for name in self.parameters}

    def follow(self, model: nn.Module) -> None:
        """Make this the operator at the present parameters of the model that it was made of.

        What was found out about the model at first is not looked at again; running statistics of BatchNorm are those of then.

        Args:
            model: The model.

        Raises:
            ValueError: A parameter is missing or has another shape, or the outputs are contracted.

        Cost: a copy of the parameters; a new operator takes six forward passes.
        """
        if self._rows.contracted is not None:
            what = "cotangents=" if self.outputs == "cotangents" else f"outputs={self.outputs!r}"
            raise ValueError(f"model: an operator with {what} does not follow it; make a new NTKOperator")
        self._map.follow(model)

    def matmul(self, vectors: Tensor) -> Tensor:
        """Return G v for v (N,), or G V for V (N, k), in float64 on the operator's device.

        Raises:
            ValueError: the first dimension of ``vectors`` is not N.
        """
        columns, scales = self._rows.columns(vectors)
        result, copies = torch.zeros_like(columns), self._rows.copies
        # For "trace" each column is taken C times, once for each output.
        for cut in blocks(columns.shape[1] * copies, self._map.block):
            pairs = torch.arange(cut.start, cut.stop, device=self.device)
            column, output = pairs // copies, pairs % copies
            directions = self._map.pull(self._rows.cotangents(columns[:, column].T, output))
            result.index_add_(1, column, self._map.push(directions, self._rows.values(output)).flatten(1).T)
        result = self._rows.scaled(result * scales)
        return result if vectors.ndim == 2 else result[:, 0]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.matmul(vectors)

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return J^T v, flat in the order of ``parameters``: (P,) for v (N,), (P, k) for (N, k).

        Raises:
            ValueError: the first dimension is not N, or ``outputs="trace"``, for which there is no single J.
        """
        self._require_one_jacobian()
        columns, scales = self._rows.columns(vectors)
        parts = []
        for cut in blocks(columns.shape[1], self._map.block):
            pulled = self._map.pull(self._rows.cotangents(columns[:, cut].T, None))
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
        shapes = list(self.shapes.values())
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
        columns, scales = scaled_columns(directions, self.n_parameters, self.device)
        shapes = list(self.shapes.values())
        parts = []
        for cut in blocks(columns.shape[1], self._map.block):
            pieces = torch.split(columns[:, cut].T, [shape.numel() for shape in shapes], 1)
            pushed = {n: p.reshape(-1, *s) for n, p, s in zip(self.parameters, pieces, shapes, strict=True)}
            parts.append(self._map.push(pushed, self._rows.values(None)).flatten(1).T)
        result = self._rows.scaled(torch.cat(parts, 1) * scales)
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

    def _require_one_jacobian(self) -> None:
        if self.outputs == "trace":
            raise ValueError(
                'outputs: "trace" is a sum of C products J_c J_c^T, without a single J; use "full" or "sum" for J^T v and J w'
            )
