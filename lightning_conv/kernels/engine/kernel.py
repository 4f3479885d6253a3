"""The kernel of a task, or the estimate of its trace kernel from random projections of the outputs."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_conv.kernels.engine.coupled import coupled_kernel
from lightning_conv.kernels.engine.divided import OutputsDivided, SamplesDivided
from lightning_conv.kernels.engine.kernel_sum import KernelSum
from lightning_conv.kernels.engine.passes import Engine
from lightning_conv.kernels.planning.task import Task, error_groups
from lightning_conv.kernels.products.combinations import Combinations, SignRows
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.progress import Report, equal_parts


def compute_kernel(task: Task, seed: int, report: Report, processes: Processes | None = None) -> KernelSum:
    """Compute the kernel that ``task`` asks for; ``seed`` is that of the random projections."""
    if task.projects:
        return projected_kernel(task, seed, report, processes)
    return kernel_of(task, *task.combinations, report, processes)


def kernel_of(
    task: Task, rows: Combinations, columns: Combinations, report: Report, processes: Processes | None = None
) -> KernelSum:
    """Compute the kernel of these combinations of the outputs, divided among the processes."""
    if task.couples:
        return coupled_kernel(task, rows, report, processes)
    divided = task.plan.division
    if processes is None or divided is None:
        return Engine(task, rows, columns, report).run()
    engine = OutputsDivided if divided.by == "outputs" else SamplesDivided
    return engine(task, rows, columns, report, processes).run()


def projected_kernel(task: Task, seed: int, report: Report, processes: Processes | None = None) -> KernelSum:
    r"""Estimate the trace kernel by the mean of the kernels of r^T u over k random sign vectors r.

    The estimate is unbiased, since E r r^T = I. The sign vectors are divided into G groups, and the standard error is
    that of the mean of the groups' kernels,

    .. math:: \Bigl( \frac{1}{G (G - 1)} \sum_g \| K_g - K \|_F^2 \Bigr)^{1/2} .

    Where G does not divide k, the groups differ in size by one and are weighted by their size.
    """
    count, groups = task.request.projections, error_groups(task.request.projections)
    generator = torch.Generator().manual_seed(seed)
    mean: KernelSum | None = None
    moments = 0.0  # sum over the groups of size * |K_g|_F^2
    sizes = [len(each) for each in torch.arange(count).tensor_split(groups)]
    for size, share_of in zip(sizes, equal_parts(report, groups), strict=True):
        # With the factor 1 / sqrt(size) the kernel is the group's mean. The plan is for the largest group.
        rows = SignRows(size, task.anatomy.outputs, generator, size**-0.5)
        one = kernel_of(task, rows, rows, share_of, processes)
        moments += size * float(one.matrix.square().sum())
        share = size / count
        mean = _weighted(one, share) if mean is None else _plus(mean, _weighted(one, share))
    assert mean is not None
    spread = max(moments / count - float(mean.matrix.square().sum()), 0.0)
    return replace(mean, projection_error=(spread / (groups - 1)) ** 0.5)


def _weighted(one: KernelSum, share: float) -> KernelSum:
    for matrix in (one.matrix, *one.layer_matrices.values()):
        matrix *= share
    traces = {layer: share * trace for layer, trace in one.layer_traces.items()}
    return replace(one, floor=share * one.floor, layer_traces=traces)


def _plus(one: KernelSum, other: KernelSum) -> KernelSum:
    one.matrix.add_(other.matrix)
    for layer, matrix in one.layer_matrices.items():
        matrix.add_(other.layer_matrices[layer])
    traces = {layer: trace + other.layer_traces[layer] for layer, trace in one.layer_traces.items()}
    return replace(one, floor=one.floor + other.floor, layer_traces=traces)
