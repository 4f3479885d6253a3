"""The dense kernel of a network whose samples couple, such as one with true batch statistics: ``coupled_gram``.

Layer rules and per-sample transforms do not apply: output c of sample i depends on every sample, so each row of J takes
one backward pass over the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_conv.kernels.engine.kernel_sum import KernelSum
from lightning_conv.kernels.planning.strips import Strip, strip_width, strips
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.combinations import Combinations
from lightning_conv.kernels.products.precision import Precision, product, product_gamma
from lightning_conv.kernels.products.pullback import (
    BATCH,
    WORKING_COPIES,
    GraphSize,
    Pullback,
    graph_size,
    pays_to_batch,
)
from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.machine.memory import memory_budget
from lightning_conv.machine.processes import Processes
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.reporting.progress import Report, equal_parts, silent
from lightning_conv.reporting.progress import part as part_of


def coupled_gram(
    module: StatelessModule,
    names: Sequence[str],
    inputs: Inputs,
    combinations: Combinations,
    *,
    trace: bool,
    precision: Precision,
    max_memory: float | None = None,
    report: Report = silent,
    processes: Processes | None = None,
) -> tuple[Tensor, float]:
    r"""Compute the Gram matrix of the Jacobian rows of a whole batch, where each output may depend on all samples.

    .. math:: G_{(i,k),(j,l)} = \langle \partial (w_{ik} \cdot u_i)/\partial\theta, \; \partial (w_{jl} \cdot u_j)/\partial\theta \rangle

    Here u_i is a function of all n samples. With ``batch_norm="batch"`` this is the kernel of the network that train
    mode differentiates; its entry (i, j) depends on the batch that contains samples i and j. Call it inside
    ``undisturbed(module.model)``.

    Args:
        module: the network as a function.
        names: parameters to differentiate by.
        inputs: n samples, converted by ``module.convert``.
        combinations: w, such as every output by itself, or one cotangent for each sample.
        trace: True: sum over k = l, (n, n). False: (n K, n K), row i K + k.
        precision: as in ``ntk_gram``; for ``"certified"`` the module must evaluate in float64.
        max_memory: number of bytes that may be used, such as ``2**30`` or ``1e9`` (default: a quarter of the free
            memory). To keep to it, the columns of J are cut into strips, each with its own n K backward passes.
        report: called with the share of the rows that is done.
        processes: those among which rows of J are divided, which all of them then get, and columns of the products; None: there is one.

    Returns:
        The symmetric float64 matrix, and a proven bound on its distance in spectral norm from J J^T, for J as computed.
        The bound covers products and sums, barring underflow.

    Raises:
        MemoryError: the result, the graph of the batch or one row of J does not fit.
        ValueError: ``max_memory`` is not a finite number of at least one byte.

    Cost: n K backward passes over n samples per strip, which is n times the passes of a network whose samples do not
    couple, and n^2 K P flops (times K unless ``trace``). Each of W processes has 1 / W of both, and sends n K P (W - 1) / W numbers.
    """
    rows = sample_count(inputs) * combinations.count
    scales = 1.0 if combinations.scales is None else combinations.scales
    size = sample_count(inputs) if trace else rows
    budget = memory_budget(max_memory, module.device, 8 * size * size)
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
        lines, done = jacobian.view(size, -1), part_of(report, number / len(parts), 1 / len(parts))
        fill = partial(_fill, jacobian, strip, block, pullback, combinations, done)
        if processes is None:
            fill(slice(0, rows))
        else:
            processes.together(partial(fill, processes.share(rows)))
            shares = [processes.share(rows, rank) for rank in range(processes.world)]
            processes.share_blocks(jacobian, [[(each.start, each.stop, 0, strip.width)] for each in shares])
            lines = lines[:, processes.share(lines.shape[1])]
        part = product(lines, lines, precision)
        gamma = product_gamma(lines.shape[1], dtype, precision)
        part *= scales
        part = (part.T * scales).T
        # |E_ij| <= gamma |J_i||J_j|, hence |E|_2 <= gamma |J|_F^2, and |J|_F^2 <= (computed trace) / (1 - gamma).
        floor += gamma / (1 - gamma) * float(part.diagonal().sum()) if gamma < 1 else float("inf")
        matrix += part
    sums = len(parts)
    if processes is not None:
        processes.add(matrix)
        floor = sum(processes.gather(floor))
        sums += processes.world
    matrix = (matrix + matrix.T) / 2
    floor += (2 + sums) * 2 * unit_roundoff(torch.float64) * float(matrix.diagonal().sum())
    return matrix, floor


def _fill(
    jacobian: Tensor,
    strip: Strip,
    block: int,
    pullback: Pullback,
    combinations: Combinations,
    report: Report,
    mine: slice,
) -> None:
    """Fill these rows of a strip of J."""
    for start in range(mine.start, mine.stop, block):
        stop = min(start + block, mine.stop)
        found = pullback(_unit_cotangents(start, stop, combinations, pullback.outputs), strip.names)
        gradients = torch.cat([gradient.flatten(1) for gradient in found.values()], 1)
        jacobian[start:stop] = gradients[:, strip.start : strip.stop]
        report((stop - mine.start) / (mine.stop - mine.start))


def coupled_kernel(
    task: Task, combinations: Combinations, report: Report = silent, processes: Processes | None = None
) -> KernelSum:
    """Compute ``coupled_gram`` for all layers together or, with ``per_layer``, one layer after the other."""
    plan, per_layer = task.plan, task.request.per_layer
    layers: dict[str, list[str]] = {}
    for one in plan.contributions:
        layers.setdefault(one.layer if per_layer else "", []).extend(one.parameters)
    matrices: dict[str, Tensor] = {}
    floor = 0.0
    size = sample_count(task.inputs) * (1 if plan.problem.trace else combinations.count)
    total = torch.zeros(size, size, dtype=torch.float64, device=task.module.device)
    for (layer, names), share in zip(layers.items(), equal_parts(report, len(layers)), strict=True):
        matrix, own = coupled_gram(
            task.module,
            names,
            task.inputs,
            combinations,
            trace=plan.problem.trace,
            precision=plan.precision,
            max_memory=plan.max_memory - plan.result_bytes,
            report=share,
            processes=processes,
        )
        total += matrix
        floor += own
        if per_layer:
            matrices[layer] = matrix
    # One float64 addition per layer errs by at most u |G_layer|, and the trace bounds the norm.
    floor += len(layers) * 2 * unit_roundoff(torch.float64) * float(total.diagonal().sum())
    traces = {layer: float(matrix.diagonal().sum()) for layer, matrix in matrices.items()}
    return KernelSum(total, floor, traces, matrices)


def _plan(
    sizes: Sequence[tuple[str, int]], rows: int, graph: GraphSize, budget: int, dtype: torch.dtype, precision: Precision
) -> tuple[int, int]:
    """Return (columns of J per strip, vectors per pass) such that graph, strip and working storage fit into ``budget``.

    Raises:
        MemoryError: a pass with a single vector does not fit.
    """
    width = torch.finfo(dtype).bits // 8
    left = budget - graph.saved_bytes
    total, longest = sum(size for _, size in sizes), max((size for _, size in sizes), default=0)
    limit = strip_width(total, rows, left, dtype, precision)
    # The gradients of a strip's parameters exist twice (as found and concatenated), beside those of the activations.
    vector = width * (2 * min(total, max(limit, longest)) + WORKING_COPIES * graph.largest)
    if left // 2 < vector:
        raise MemoryError(
            f"max_memory: one row of J takes {vector / 2**20:.3g} MiB in its backward pass and the graph of the batch "
            f"{graph.saved_bytes / 2**20:.3g} MiB, but {budget / 2**20:.3g} MiB are left beside the Gram matrix, half of them for "
            "the pass; use fewer samples, fewer parameters, or allow a larger max_memory"
        )
    return limit, min(BATCH, rows, left // 2 // vector)


def _unit_cotangents(start: int, stop: int, combinations: Combinations, outputs: Tensor) -> Tensor:
    """Return rows ``start`` to ``stop`` of the identity over (sample, combination) pairs, as gradients (b, n, C)."""
    found = outputs.new_zeros(stop - start, *outputs.shape)
    for index, pair in enumerate(range(start, stop)):
        sample, k = divmod(pair, combinations.count)
        found[index, sample] = combinations.taken(slice(k, k + 1), slice(sample, sample + 1), outputs)[0, 0]
    return found
