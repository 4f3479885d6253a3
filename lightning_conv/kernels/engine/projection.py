"""The trace kernel of many outputs estimated from random sign vectors over them."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_conv.kernels.planning.task import Task, error_groups
from lightning_conv.kernels.result import KernelGram
from lightning_conv.reporting.progress import Report, equal_parts


def projected_gram(task: Task, seed: int, report: Report) -> KernelGram:
    r"""Mean over k sign vectors r of the kernels of r^T u, which is the trace kernel in expectation, as E r r^T = I.

    The standard error is that of the mean of the groups' kernels: sqrt(sum_g |K_g - K|_F^2 / (G (G - 1))), for groups of
    equal size (nearly so, where G does not divide k: they are weighted by their size).
    """
    count, groups = task.request.projections, error_groups(task.request.projections)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, task.anatomy.outputs), generator=generator) * 2.0 - 1.0
    signs = signs.to(task.module.device, task.module.dtype)
    mean: KernelGram | None = None
    moments = 0.0  # sum over the groups of size * |K_g|_F^2
    for each, share_of in zip(signs.tensor_split(groups), equal_parts(report, groups), strict=True):
        # Rows of sqrt(1 / size): the group's own mean. The plan is for the largest group.
        gram = task.gram(each / len(each) ** 0.5, share_of)
        moments += len(each) * float(gram.matrix.square().sum())
        share = len(each) / count
        mean = _weighted(gram, share) if mean is None else _plus(mean, _weighted(gram, share))
    assert mean is not None
    spread = max(moments / count - float(mean.matrix.square().sum()), 0.0)
    return replace(mean, projection_error=(spread / (groups - 1)) ** 0.5)


def _weighted(gram: KernelGram, share: float) -> KernelGram:
    for matrix in (gram.matrix, *gram.layer_matrices.values()):
        matrix *= share
    traces = {layer: share * trace for layer, trace in gram.layer_traces.items()}
    return replace(gram, floor=share * gram.floor, layer_traces=traces)


def _plus(one: KernelGram, other: KernelGram) -> KernelGram:
    one.matrix.add_(other.matrix)
    for layer, matrix in one.layer_matrices.items():
        matrix.add_(other.layer_matrices[layer])
    traces = {layer: trace + other.layer_traces[layer] for layer, trace in one.layer_traces.items()}
    return replace(one, floor=one.floor + other.floor, layer_traces=traces)
