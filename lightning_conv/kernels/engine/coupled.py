"""The dense kernel of a network whose samples couple, such as one with true batch statistics: ``coupled_gram``.

No layer rule and no per-sample transform holds there: output c of sample i depends on every sample, so each row of J is one
backward pass over the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.engine.sums import KernelSum
from lightning_conv.kernels.plan import NTKPlan
from lightning_conv.kernels.planning.memory import memory_budget
from lightning_conv.kernels.products.precision import Precision, product, product_gamma, unit_roundoff
from lightning_conv.kernels.products.pullback import (
    BATCH,
    WORKING_COPIES,
    GraphSize,
    Pullback,
    graph_size,
    pays_to_batch,
)
from lightning_conv.networks.evaluation import Inputs, StatelessModule, sample_count
from lightning_conv.reporting.progress import Report, equal_parts, silent


@dataclass(frozen=True)
class Strip:
    """Columns of J that are formed together: whole parameters, or a range of one."""

    names: tuple[str, ...]
    start: int  # in the concatenation of the parameters
    stop: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


def strips(sizes: Sequence[tuple[str, int]], limit: int) -> Iterator[Strip]:
    """Cut the columns of J into strips of at most ``limit``; a parameter that is larger is cut into several strips."""
    names: list[str] = []
    total = 0
    for name, size in sizes:
        if names and total + size > limit:
            yield Strip(tuple(names), 0, total)
            names, total = [], 0
        if size > limit:
            for start in range(0, size, limit):
                yield Strip((name,), start, min(start + limit, size))
        else:
            names.append(name)
            total += size
    if names:
        yield Strip(tuple(names), 0, total)


def coupled_gram(
    module: StatelessModule,
    names: Sequence[str],
    inputs: Inputs,
    cotangents: Tensor,
    *,
    trace: bool,
    precision: Precision,
    max_memory: float | None = None,
    report: Report = silent,
) -> tuple[Tensor, float]:
    r"""Gram matrix of the Jacobian rows of a whole batch: no assumption that a sample's outputs are its own.

    .. math:: G_{(i,k),(j,l)} = \langle \partial (w_k \cdot u_i)/\partial\theta, \; \partial (w_l \cdot u_j)/\partial\theta \rangle

    with u_i a function of all n samples. With ``batch_norm="batch"`` this is the kernel of the network that train mode
    differentiates, where the entry (i, j) depends on the batch that both are in. Call inside ``undisturbed(module.model)``.

    Args:
        module: the network as a function.
        names: parameters to differentiate by.
        inputs: n samples, converted by ``module.convert``.
        cotangents: w, (K, C): the identity for all outputs, a row of ones for their sum.
        trace: sum over k = l: (n, n). Otherwise (n K, n K), row i K + k.
        precision: as in ``ntk_gram``; for ``"certified"`` the module must evaluate in float64.
        max_memory: bytes that may be used, such as ``2**30`` or ``1e9`` (default a quarter of what is free). Columns of J are
            cut into strips to keep to it, each strip with its own n K backward passes.
        report: told the share of the rows that is done.

    Returns:
        The symmetric float64 matrix, and a proven bound on its distance in spectral norm from J J^T for J as computed
        (products and sums only, barring underflow).

    Raises:
        MemoryError: the result, the graph of the batch or one row of J does not fit.
        ValueError: two forwards of the batch differ; ``max_memory`` is not a finite number of at least one byte.

    Cost: n K backward passes over n samples a strip, which is n times the passes of a network whose samples do not
    couple, and n^2 K P flops (times K if not ``trace``).
    """
    rows = sample_count(inputs) * len(cotangents)
    size = sample_count(inputs) if trace else rows
    budget = memory_budget(max_memory, module.device, 8 * size * size)
    require_repeatable(module, inputs)
    graph = graph_size(module, names, inputs, limit=budget)
    pullback = Pullback(module, names, inputs, batched=False)
    sizes = [(name, module.parameters[name].numel()) for name in pullback.reached()]
    limit, block = _plan(sizes, rows, graph, budget, module.dtype, precision)
    pullback.batched = pays_to_batch(max([graph.largest, *(size for _, size in sizes)]), module.device)
    matrix = torch.zeros(size, size, dtype=torch.float64, device=module.device)
    floor, parts = 0.0, list(strips(sizes, limit))
    dtype = module.dtype if precision == "fast" else torch.float64  # products in float64 then need no copies
    for number, strip in enumerate(parts):
        jacobian = torch.empty(rows, strip.width, dtype=dtype, device=module.device)
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            found = pullback(_unit_cotangents(start, stop, cotangents, pullback.outputs), strip.names)
            gradients = torch.cat([gradient.flatten(1) for gradient in found.values()], 1)
            jacobian[start:stop] = gradients[:, strip.start : strip.stop]
            report((number * rows + stop) / (len(parts) * rows))
        lines = jacobian.view(size, -1)
        part = product(lines, lines, precision)
        gamma = product_gamma(lines.shape[1], dtype, precision)
        # |E_ij| <= gamma |J_i||J_j|, hence |E|_2 <= gamma |J|_F^2, and |J|_F^2 is at most the computed trace over 1 - gamma.
        floor += gamma / (1 - gamma) * float(part.diagonal().sum()) if gamma < 1 else float("inf")
        matrix += part
    matrix = (matrix + matrix.T) / 2
    floor += (2 + len(parts)) * 2 * unit_roundoff(torch.float64) * float(matrix.diagonal().sum())
    return matrix, floor


def coupled_kernel(
    module: StatelessModule,
    plan: NTKPlan,
    inputs: Inputs,
    cotangents: Tensor,
    *,
    per_layer: bool,
    report: Report = silent,
) -> KernelSum:
    """``coupled_gram`` as the plan says, for the layers together or, ``per_layer``, one after the other."""
    layers: dict[str, list[str]] = {}
    for one in plan.contributions:
        layers.setdefault(one.layer if per_layer else "", []).extend(one.parameters)
    matrices: dict[str, Tensor] = {}
    floor = 0.0
    size = sample_count(inputs) * (1 if plan.problem.trace else len(cotangents))
    total = torch.zeros(size, size, dtype=torch.float64, device=module.device)
    for (layer, names), share in zip(layers.items(), equal_parts(report, len(layers)), strict=True):
        matrix, own = coupled_gram(
            module, names, inputs, cotangents, trace=plan.problem.trace, precision=plan.precision,
            max_memory=plan.max_memory - plan.result_bytes, report=share,
        )  # fmt: skip
        total += matrix
        floor += own
        if per_layer:
            matrices[layer] = matrix
    # One float64 addition a layer: at most u |G_layer| each, and the trace bounds the norm.
    floor += len(layers) * 2 * unit_roundoff(torch.float64) * float(total.diagonal().sum())
    traces = {layer: float(matrix.diagonal().sum()) for layer, matrix in matrices.items()}
    return KernelSum(total, floor, traces, matrices)


def require_repeatable(module: StatelessModule, inputs: Inputs) -> None:
    """Refuse a network that is random in evaluation mode: two forwards of one batch must agree up to rounding.

    Raises:
        ValueError: they do not.
    """
    # Not under no_grad: the forward may differentiate inside, and no parameter asks for a graph.
    first, second = (module.outputs({}, inputs).detach() for _ in range(2))
    change = float((first - second).abs().max())
    if change > torch.finfo(module.dtype).eps ** 0.5 * float(first.abs().max()):
        raise ValueError(
            f"model: two forwards of one batch differ by {change:.1e}, so the forward is random in evaluation mode; remove what is random"
        )


def strip_width(total: int, rows: int, left: int, dtype: torch.dtype, precision: Precision) -> int:
    """Columns of J, of ``total``, that fit into half of the ``left`` bytes."""
    width = torch.finfo(dtype).bits // 8 if precision == "fast" else 8
    return max(1, min(total, left // 2 // (rows * width)))


def _plan(
    sizes: Sequence[tuple[str, int]], rows: int, graph: GraphSize, budget: int, dtype: torch.dtype, precision: Precision
) -> tuple[int, int]:
    """(columns of J in a strip, vectors in a pass) such that graph, strip and working storage fit ``budget``.

    Raises:
        MemoryError: a pass with a single vector does not fit.
    """
    width = torch.finfo(dtype).bits // 8
    left = budget - graph.saved_bytes
    total, longest = sum(size for _, size in sizes), max((size for _, size in sizes), default=0)
    limit = strip_width(total, rows, left, dtype, precision)
    # The gradients of all parameters in a strip, twice (found and concatenated), and those of the activations.
    vector = width * (2 * min(total, max(limit, longest)) + WORKING_COPIES * graph.largest)
    if left // 2 < vector:
        raise MemoryError(
            f"max_memory: one row of J takes {vector / 2**20:.3g} MiB in its backward pass and the graph of the batch "
            f"{graph.saved_bytes / 2**20:.3g} MiB, but {budget / 2**20:.3g} MiB are left beside the Gram matrix, half of them for "
            "the pass; use fewer samples, fewer parameters, or allow a larger max_memory"
        )
    return limit, min(BATCH, rows, left // 2 // vector)


def _unit_cotangents(start: int, stop: int, cotangents: Tensor, outputs: Tensor) -> Tensor:
    """Rows ``start`` to ``stop`` of the identity over (sample, cotangent) pairs, as output gradients (b, n, C)."""
    pairs = torch.arange(start, stop, device=outputs.device)
    found = outputs.new_zeros(stop - start, *outputs.shape)
    found[pairs - start, pairs // len(cotangents)] = cotangents.to(outputs)[pairs % len(cotangents)]
    return found
