"""``ntk_gram``: the exact empirical neural tangent kernel of a module on given samples, and ``plan_ntk``: what it will cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lightning_conv.kernels.engine.projection import projected_gram
from lightning_conv.kernels.plan import NTKPlan
from lightning_conv.kernels.planning.task import EngineName, Request, Task
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.result import KernelGram, Outputs
from lightning_conv.networks.evaluation import BatchNormMode, Inputs, undisturbed
from lightning_conv.reporting.progress import progress_bar

__all__ = ["KernelGram", "Outputs", "ntk_gram", "plan_ntk"]


def ntk_gram(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    outputs: Outputs = "trace",
    parameters: Sequence[str] | str | None = None,
    per_layer: bool = False,
    precision: Precision = "exact",
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    engine: EngineName = "auto",
    projections: int = 16,
    seed: int = 0,
    plan: NTKPlan | None = None,
    progress: bool | None = None,
) -> KernelGram:
    r"""Exact empirical neural tangent kernel of ``model`` on ``inputs``, over all parameters with ``requires_grad``.

    .. math:: G_{(i,c),(j,d)} = \langle \partial u_{ic}/\partial\theta, \; \partial u_{jd}/\partial\theta \rangle

    Layers with a rule (linear, convolutional, normalising, embedding layers, parameters that are added or multiplied) go
    by their inputs and output gradients, in whichever form is cheapest; everything else by per-sample Jacobians. The
    model is evaluated in eval mode through copies of its parameters and buffers and is untouched afterwards.

    Args:
        model: any module whose samples do not couple and whose result is one tensor, samples along dimension 0.
        inputs: n samples: a tensor, or a tuple / mapping of tensors, all with n rows.
        inputs2: m further samples: the kernel between ``inputs`` (rows) and these (columns). None: ``inputs``.
        outputs: ``"trace"``: (n, n), summed over the C outputs (c = d). ``"full"``: (n C, n C), row i C + c. ``"sum"``:
            (n, n), the kernel of the summed output, one backward pass. ``"projected"``: (n, n), an unbiased estimate of
            the trace kernel from random sign vectors over the outputs, for heads with many classes.
        parameters: names or patterns (``"encoder.*"``) of the parameters to differentiate by; None: all with
            ``requires_grad``.
        per_layer: also return every layer's own kernel.
        precision: ``"fast"``: products in the model's type in short blocks, sums in float64. ``"exact"``: the model's
            own forward and backward, products in float64. ``"certified"``: all of it in float64, from a float64 copy of
            parameters and buffers.
        batch_norm: ``"eval"``: running statistics; ``"frozen"``: the statistics of ``inputs``, held constant; ``"batch"``:
            the statistics of ``inputs``, differentiated through, as training does: samples couple, and every row of J is
            a backward pass over the whole batch.
        max_memory: bytes that may be used, such as ``2**30`` or ``1e9`` (default a quarter of what is free). The work is cut to keep
            to it.
        engine: ``"auto"``: layer rules where they hold. ``"jacobian"``: per-sample Jacobians for everything, slow, for
            comparison.
        projections: number k of sign vectors. Of k outputs or fewer the trace kernel itself is taken, which costs no more.
        seed: of the sign vectors.
        plan: of an earlier kernel of this model, by ``plan_ntk`` or ``KernelGram.plan``: the network is not read again, which
            is a good part of the time where n is small. Its weights may have changed since, its forward and the shapes of
            the samples may not; ``jacobian_error`` is then that of the reading.
        progress: show a bar on standard error; None: on a terminal, where the plan predicts more than 5 seconds.

    Returns:
        The matrix in float64 with the bound ``floor`` on its rounding error.

    Raises:
        ValueError: no trainable parameter, no or non-finite samples, samples that couple, unknown option, ``max_memory`` is not a
            finite number of at least one byte.
        TypeError: the model's result is not one floating tensor.
        MemoryError: ``max_memory`` cannot be kept.

    Cost: one forward, K backwards (K = C; 1 for ``"sum"``, k for ``"projected"``) and n^2 (in + K out) flops a linear
    layer; ``plan_ntk`` tells for a given network. Source: Jacot, Gabriel, Hongler 2018; the split into layers is Du et
    al. 2019, section 4.

    Example:
        >>> import torch
        >>> gram = ntk_gram(torch.nn.Linear(3, 2), torch.eye(3), outputs="trace")
        >>> gram.matrix  # 2 outputs x (x_i . x_j + 1 for the bias)
        tensor([[4., 2., 2.],
                [2., 4., 2.],
                [2., 2., 4.]], dtype=torch.float64)
    """
    request = Request(outputs, per_layer, precision, batch_norm, max_memory, engine, projections)
    start = time.perf_counter()
    with undisturbed(model):
        task = Task(model, inputs, inputs2, parameters, request, plan)
        left = task.plan.seconds - task.plan.reading_seconds
        with progress_bar(f"tangent kernel of {task.plan.problem.samples} samples", left, progress) as report:
            gram = projected_gram(task, seed, report) if task.projects else task.gram(task.cotangents(), report)
    return replace(gram, seconds=time.perf_counter() - start)


def plan_ntk(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    outputs: Outputs = "trace",
    parameters: Sequence[str] | str | None = None,
    per_layer: bool = False,
    precision: Precision = "exact",
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    engine: EngineName = "auto",
    projections: int = 16,
) -> NTKPlan:
    """What ``ntk_gram`` with the same arguments would do: its flops, its peak memory, seconds, and the form of every layer.

    Nothing but a few samples passes through the network (all of them where they couple, and forwards where the few leave a
    parameter unused), which takes a part of the predicted seconds: ``reading_seconds``. Arguments and errors are those of
    ``ntk_gram``.

    Example:
        >>> import torch
        >>> plan = plan_ntk(torch.nn.Linear(784, 10), torch.rand(100, 784))
        >>> plan.contributions[0].way
        'Hadamard product'
    """
    request = Request(outputs, per_layer, precision, batch_norm, max_memory, engine, projections)
    with undisturbed(model):
        return Task(model, inputs, inputs2, parameters, request).plan
