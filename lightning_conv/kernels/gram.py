"""``ntk_gram``: the exact empirical neural tangent kernel of a module on given samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_conv.evaluation import BatchNormMode, Inputs, StatelessModule, map_inputs, sample_count, undisturbed
from lightning_conv.kernels.discovery import (
    Anatomy,
    check_samples_do_not_couple,
    layer_gradients,
    read_network,
    record,
    require_float_inputs,
)
from lightning_conv.kernels.jacobian import JacobianFactor, jacobian_rows
from lightning_conv.kernels.plan import memory_budget, parameter_groups, tile_rows, tiles
from lightning_conv.kernels.precision import PRECISIONS, Precision, unit_roundoff
from lightning_conv.kernels.structured import linear_factors

Outputs: TypeAlias = Literal["trace", "full", "sum"]


@dataclass(frozen=True)
class KernelGram:
    """A Gram matrix of the empirical NTK with what is known about its errors (convention of S = 1/2 sum |u - y|^2: G = J J^T)."""

    matrix: Tensor  # float64, (n, n) or (n C, n C), exactly symmetric
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
    general: tuple[str, ...]  # those by per-sample Jacobians; the outputs do not depend on the rest
    seconds: float

    @property
    def trace(self) -> float:
        """Sum of the diagonal = |J|_F^2 = sum of all eigenvalues."""
        return float(self.matrix.diagonal().sum())


class _Factor(Protocol):
    def gram(self, other: Self, *, trace: bool, precision: Precision, block_bytes: int) -> tuple[Tensor, float]: ...


def ntk_gram(
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: Outputs = "trace",
    parameters: Sequence[str] | None = None,
    precision: Precision = "exact",
    batch_norm: BatchNormMode = "eval",
    max_memory: int | None = None,
) -> KernelGram:
    r"""Exact empirical neural tangent kernel of ``model`` on ``inputs``, over all parameters with ``requires_grad``.

    .. math:: G_{(i,c),(j,d)} = \langle \partial u_{ic}/\partial\theta, \; \partial u_{jd}/\partial\theta \rangle

    Linear layers go by their Hadamard rule, which never forms the n x P Jacobian; everything else by per-sample Jacobians,
    one group of parameters at a time. The model is evaluated in eval mode through copies of its parameters and buffers
    and is untouched afterwards.

    Args:
        model: any module whose samples do not couple and whose result is one tensor, samples along dimension 0.
        inputs: n samples: a tensor, or a tuple / mapping of tensors, all with n rows.
        outputs: ``"trace"``: (n, n), summed over the C outputs (c = d). ``"full"``: (n C, n C), row i C + c. ``"sum"``:
            (n, n), the kernel of the summed output, one backward pass.
        parameters: names of the parameters to differentiate by; None: all with ``requires_grad``.
        precision: ``"fast"``: products in the model's type in short blocks, sums in float64. ``"exact"``: the model's
            own forward and backward, products in float64. ``"certified"``: all of it in float64, from a float64 copy of
            parameters and buffers.
        batch_norm: ``"eval"``: running statistics; ``"frozen"``: the statistics of ``inputs``, held constant.
        max_memory: bytes that may be used (default a quarter of what is free). Rows are cut into tiles to keep to it.

    Returns:
        The matrix in float64 with the bound ``floor`` on its rounding error.

    Raises:
        ValueError: no trainable parameter, no or non-finite samples, samples that couple, unknown option.
        TypeError: the model's result is not one floating tensor.
        MemoryError: ``max_memory`` cannot be kept.

    Cost: one forward, K backwards (K = C; 1 for ``"sum"``) and 2 n^2 (in + K out) flops a linear layer; per-sample
    Jacobians and 2 n^2 K P flops for the other P parameters. Source: Jacot, Gabriel, Hongler 2018; the split into layers
    is Du et al. 2019, section 4.

    Example:
        >>> import torch
        >>> gram = ntk_gram(torch.nn.Linear(3, 2), torch.eye(3), outputs="trace")
        >>> gram.matrix  # 2 outputs x (x_i . x_j + 1 for the bias)
        tensor([[4., 2., 2.],
                [2., 4., 2.],
                [2., 2., 4.]], dtype=torch.float64)
    """
    _require("outputs", outputs, get_args(Outputs))
    _require("precision", precision, PRECISIONS)
    _require("batch_norm", batch_norm, get_args(BatchNormMode))
    start = time.perf_counter()
    samples = sample_count(inputs)
    require_float_inputs(inputs)
    with undisturbed(model):
        dtype = torch.float64 if precision == "certified" else None
        module = StatelessModule(model, dtype=dtype, batch_norm=batch_norm, statistics_of=inputs)
        names = _parameter_names(module, parameters)
        inputs = module.convert(inputs)
        anatomy = read_network(module, names, inputs, batch_norm=batch_norm, statistics_of=inputs)
        engine = _Engine(module, inputs, anatomy, outputs, precision, max_memory)
        engine.run()
    return KernelGram(
        matrix=engine.matrix,
        outputs=outputs,
        n_samples=samples,
        n_outputs=anatomy.outputs,
        precision=precision,
        batch_norm=batch_norm,
        floor=engine.floor,
        jacobian_error=anatomy.jacobian_error,
        parameters=names,
        structured=tuple(n for site in anatomy.sites for n in (site.weight, site.bias) if n is not None),
        general=anatomy.general,
        seconds=time.perf_counter() - start,
    )


class _Engine:
    """Adds up the Gram matrix tile by tile: structured sites together, then one group of the other parameters after the other."""

    def __init__(
        self,
        module: StatelessModule,
        inputs: Inputs,
        anatomy: Anatomy,
        outputs: Outputs,
        precision: Precision,
        max_memory: int | None,
    ) -> None:
        self.module, self.inputs, self.anatomy, self.precision = module, inputs, anatomy, precision
        self.trace = outputs != "full"
        self.samples = sample_count(inputs)
        eye = torch.eye(anatomy.outputs, dtype=module.dtype, device=module.device)
        self.cotangents = eye.sum(0, keepdim=True) if outputs == "sum" else eye
        self.stride = 1 if self.trace else anatomy.outputs
        size = self.samples * self.stride
        self.budget = memory_budget(max_memory, module.device, 8 * size * size)
        self.matrix = torch.zeros(size, size, dtype=torch.float64, device=module.device)
        self.floor = 0.0
        self.width = torch.finfo(module.dtype).bits // 8
        with torch.no_grad():
            few = self._outputs(slice(0, min(3, max(1, self.samples - 1))))
            check_samples_do_not_couple(few, self._outputs(slice(0, min(16, self.samples))))

    def _outputs(self, rows: slice) -> Tensor:
        return self.module.outputs({}, map_inputs(lambda tensor: tensor[rows], self.inputs))

    def run(self) -> None:
        count = len(self.cotangents)
        if self.anatomy.sites:
            # Factors, the activations that autograd keeps for them, and a float64 copy of one factor in a product.
            size = 4 * (self.anatomy.input_bytes + count * self.anatomy.bytes_per_sample)
            rows = tile_rows(self.samples, size, self.budget // 2, "layer inputs and output gradients")
            self._add(rows, self._linear_factors)
        sizes = [(name, self.module.parameters[name].numel()) for name in self.anatomy.general]
        # Per-sample Jacobian twice (built and concatenated) and its float64 copy.
        per_element = count * (2 * self.width + 8)
        limit = max(1, self.budget // (2 * per_element * self.samples))
        for group in parameter_groups(sizes, limit):
            rows = tile_rows(
                self.samples, per_element * group.numel, self.budget // 2, f"the Jacobian of {group.names[0]}"
            )
            self._add(rows, lambda tile, names=group.names: self._jacobian_factors(tile, names))  # type: ignore[misc]
        self._finish()

    def _linear_factors(self, tile: slice) -> Sequence[_Factor]:
        inputs = map_inputs(lambda tensor: tensor[tile], self.inputs)
        outputs, calls, _ = record(self.module, inputs)
        if len(calls) != self.anatomy.call_count:
            raise ValueError(
                f"model: called {len(calls)} linear layers on one batch and {self.anatomy.call_count} on another; its control flow "
                "depends on the data, which a kernel on a batch cannot follow"
            )
        last = len(self.cotangents) - 1
        gradients = [
            layer_gradients(outputs, cotangent, calls, keep=k < last) for k, cotangent in enumerate(self.cotangents)
        ]
        stacked = [torch.stack(of_call, 1) for of_call in zip(*gradients, strict=True)]
        return linear_factors(calls, stacked, self.anatomy.sites)

    def _jacobian_factors(self, tile: slice, names: tuple[str, ...]) -> Sequence[_Factor]:
        inputs = map_inputs(lambda tensor: tensor[tile], self.inputs)
        return [JacobianFactor(jacobian_rows(self.module, names, inputs, self.cotangents))]

    def _add(self, rows: int, factors_of: Callable[[slice], Sequence[_Factor]]) -> None:
        """Add all blocks (I, J) with J >= I of the factors' Gram matrices, and their part of the floor."""
        cuts = tiles(self.samples, rows)
        for first, upper in enumerate(cuts):
            left = factors_of(upper)
            for lower in cuts[first:]:
                right = left if lower is upper else factors_of(lower)
                for a, b in zip(left, right, strict=True):
                    block, gamma = a.gram(b, trace=self.trace, precision=self.precision, block_bytes=self.budget // 4)
                    self._place(block, upper, lower)
                    if lower is upper:
                        # |E_ij| <= gamma |J_i||J_j|, hence |E|_2 <= gamma sum_i |J_i|^2 = gamma * trace (of the exact
                        # diagonal, which is at most the computed one over 1 - gamma).
                        self.floor += gamma / (1 - gamma) * float(block.diagonal().sum()) if gamma < 1 else float("inf")

    def _place(self, block: Tensor, upper: slice, lower: slice) -> None:
        i = slice(upper.start * self.stride, upper.stop * self.stride)
        j = slice(lower.start * self.stride, lower.stop * self.stride)
        self.matrix[i, j] += block
        if upper is not lower:
            self.matrix[j, i] += block.T

    def _finish(self) -> None:
        """Symmetrise and add the rounding of the float64 sums over layers and blocks to the floor."""
        self.matrix = (self.matrix + self.matrix.T) / 2
        additions = 2 + len(self.anatomy.sites) + len(self.anatomy.general)
        self.floor += additions * 2 * unit_roundoff(torch.float64) * float(self.matrix.diagonal().sum())


def _parameter_names(module: StatelessModule, asked: Sequence[str] | None) -> tuple[str, ...]:
    if asked is not None:
        unknown = [name for name in asked if name not in module.parameters]
        if unknown or not asked:
            known = ", ".join(module.parameters)
            raise ValueError(
                f"parameters: {unknown or 'an empty list'}; need names of parameters of the model ({known})"
            )
        return tuple(asked)
    if not module.trainable:
        raise ValueError(
            "model: no parameter has requires_grad, so its tangent kernel is empty; unfreeze what is meant"
        )
    return module.trainable


def _require(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
