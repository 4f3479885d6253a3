"""``ntk_gram``: the exact empirical neural tangent kernel of a module on given samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from lightning_conv.arguments import require_seed, require_truth, require_type
from lightning_conv.kernels.engine.kernel import compute_kernel
from lightning_conv.kernels.engine.kernel_sum import KernelSum
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.planning.request import EngineName, Outputs, Request, contracted_outputs
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.precision import Precision, product_rate
from lightning_conv.kernels.reading.jacobian_error import with_narrowing
from lightning_conv.kernels.result import KernelGram
from lightning_conv.kernels.sharded.task import ShardedTask
from lightning_conv.machine.memory import allowed_memory
from lightning_conv.machine.processes import Processes
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.narrow_watch import NarrowWatch, narrowing_of
from lightning_conv.networks.narrowing import Narrowing, coarsest
from lightning_conv.networks.sharded import as_found, is_sharded
from lightning_conv.networks.stage import staged
from lightning_conv.networks.supported import require_module
from lightning_conv.networks.undisturbed import undisturbed
from lightning_conv.reporting.progress import Report, progress_bar, require_report

__all__ = ["KernelGram", "Outputs", "ntk_gram"]


def ntk_gram(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    outputs: Outputs = "trace",
    cotangents: Tensor | None = None,
    cotangents2: Tensor | None = None,
    parameters: Sequence[str] | str | None = None,
    per_layer: bool = False,
    precision: Precision = "exact",
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    engine: EngineName = "auto",
    projections: int = 16,
    seed: int = 0,
    plan: NTKPlan | None = None,
    remeasure: bool = False,
    progress: bool | Report | None = None,
    processes: Processes | None = None,
) -> KernelGram:
    r"""Compute the exact empirical neural tangent kernel of ``model`` on ``inputs``.

    .. math:: G_{(i,c),(j,d)} = \langle \partial u_{ic}/\partial\theta, \; \partial u_{jd}/\partial\theta \rangle

    where u_ic is output c of sample i, and theta are all parameters with ``requires_grad``. No factor for the loss or
    for the number of samples is included: G = J J^T, as it belongs to the loss S = 1/2 sum |u - y|^2.

    Layers with a rule (linear, convolutional, normalising and embedding layers, parameters that are added or
    multiplied) contribute through their inputs and output gradients, in whichever form is cheapest. All other
    parameters contribute through per-sample Jacobians. The model is evaluated in eval mode with copies of its
    parameters and buffers, and is unchanged afterwards.

    Args:
        model: a module that returns one tensor with samples along dimension 0, each row depending on its own sample
            only. One whose parameters ``fully_shard`` or ``parallelize_module`` has divided among processes is evaluated itself, in eval
            mode, and left as it was found; all of its processes call this together, with the same arguments, and get the same kernel.
            Every parameter then needs a layer rule, and ``"certified"``, ``engine="jacobian"`` and statistics of a batch are refused.
        inputs: n samples: a tensor, or a tuple or mapping of tensors that all have n rows.
        inputs2: m further samples: computes the kernel between ``inputs`` (rows) and these (columns). None: ``inputs``.
        outputs: which of the C outputs enter. ``"trace"``: (n, n), the sum over c = d. ``"full"``: (n C, n C), row i C
        + c.
            ``"sum"``: (n, n), the kernel of the summed output, from one backward pass. ``"projected"``: (n, n), an
            unbiased estimate of the trace kernel from random sign vectors over the outputs, for heads with many
            classes.
        cotangents: s, one row of output shape per sample, (n, C) or the shape of the outputs (n, ...), for example the
            gradient of the loss in the outputs. The kernel is then (n, n),

            .. math:: M_{ij} = s_i^\top K_{ij} s_j = \langle J_i^\top s_i, J_j^\top s_j \rangle ,

            from one backward pass whatever C is. s is taken as given: if it is the gradient of a mean loss it carries
            1/n, and the gradients of the losses of single samples are n times the J_i^T s_i. ``floor`` and
            ``jacobian_error`` are for these s as exact numbers. Not together with ``outputs``.
        cotangents2: the same for ``inputs2``, with m rows.
        parameters: names or shell patterns (``"encoder.*"``) of the parameters to differentiate by; None: all with
            ``requires_grad``.
        per_layer: also return the kernel of each layer.
        precision: ``"fast"``: products in the model's dtype in short blocks, sums in float64. ``"exact"``: forward and
            backward passes in the model's dtype, products in float64. ``"certified"``: everything in float64, with a
            float64 copy of parameters and buffers. It is watched for casts to a narrower type, and for outputs that change with
            the rest of the batch or with chance by more than rounding (``KernelGram.narrow``); with one nothing is certified.
        batch_norm: ``"eval"``: running statistics. ``"frozen"``: the statistics of ``inputs``, as constants.
            ``"batch"``: the statistics of ``inputs``, differentiated through as in training; the samples then couple,
            and each row of J takes a backward pass over the whole batch.
        max_memory: number of bytes that may be used, such as ``2**30`` or ``1e9``; None: a quarter of the free memory.
            The work is cut into pieces that fit.
        engine: ``"auto"``: layer rules where they apply. ``"jacobian"``: per-sample Jacobians for everything, which is
            slow and meant for comparison.
        projections: number k of sign vectors for ``"projected"``. With k outputs or fewer, the exact trace kernel is
            computed instead, at no higher cost.
        seed: seed of the sign vectors.
        plan: a plan for this model, from ``plan_ntk`` or ``KernelGram.plan``. The network is then not read again, which
            saves much of the time for small n. The weights may have changed since; the forward and the shapes of the
            samples may not. ``jacobian_error`` is then the one from the time of reading, unless ``remeasure``.
        remeasure: with a plan, measure ``jacobian_error`` at the weights of now, by two gradients of a few samples. The plan may then be
            one for another number of samples, other outputs, or another precision: only what was read is taken from it.
        progress: whether to show a progress bar on standard error; None: on a terminal, if more than 5 seconds are
            predicted. A function is called with the share that is done instead.
        processes: those among which the passes and products are divided, exactly: by outputs, or by samples, as is cheaper
            (``NTKPlan.division``). All of them call with the same arguments and weights, and get the same kernel. The network is
            read by each of them. With ``batch_norm="batch"`` rows of J are divided, and columns of the products.

    Returns:
        The matrix in float64, with ``floor``, a proven bound on its rounding error, and what else is known about it.

    Raises:
        ValueError: there is no trainable parameter; ``inputs`` is empty or not finite; samples couple; an option is
            unknown; ``max_memory`` is not a finite number of at least one byte; ``cotangents`` are not real, not finite,
            or not of the shape of the outputs, or ``outputs`` is given beside them.
        TypeError: ``model`` is no module, ``seed`` no whole number, ``progress`` neither truth value nor function; ``cotangents`` are
            not a tensor; the model does not return one floating-point tensor, or its forward makes numbers of a
            type of its own with which it cannot be evaluated in float64 (``NoSuchPathError``, which names the place; ``"exact"`` works).
        MemoryError: the kernel does not fit into ``max_memory``.
        ProcessesError: another process does not answer in time.

    Cost: one forward pass, K backward passes (K = C; 1 for ``"sum"`` and ``cotangents``, k for ``"projected"``), and n^2 (in + K out)
    flops per linear layer; ``plan_ntk`` predicts it for a given network. Source: Jacot, Gabriel, Hongler 2018
    (1806.07572); the split into layers follows Du et al. 2019 (1811.03804), section 4.

    Example:
        >>> import torch
        >>> gram = ntk_gram(torch.nn.Linear(3, 2), torch.eye(3), outputs="trace")
        >>> gram.matrix  # 2 outputs x (x_i . x_j + 1 for the bias)
        tensor([[4., 2., 2.],
                [2., 4., 2.],
                [2., 2., 4.]], dtype=torch.float64)
    """
    kind = contracted_outputs(outputs, cotangents, default="trace")
    require_seed(seed)
    require_report(progress)
    require_truth("remeasure", remeasure)
    require_type("plan", plan, (NTKPlan, type(None)), "a plan of plan_ntk, or None")
    require_type("processes", processes, (Processes, type(None)), "Processes(), or None to compute it alone")
    require_module(model)
    sharded = is_sharded(model)
    if sharded and processes is not None:
        raise ValueError(
            "processes: given for a sharded module, whose kernel all of its processes compute together; leave it out"
        )
    rate = None
    if processes is not None:  # the same cuts in all of them
        device = _device_of(model)
        mine = None if device.type == "cpu" else product_rate(device, precision)
        budgets, rates = zip(*processes.gather((allowed_memory(max_memory, device), mine)), strict=True)
        max_memory = min(budgets) // (1 if max_memory is not None else processes.world)
        rate = None if None in rates else min(rates)
    request = Request(kind, per_layer, precision, batch_norm, max_memory, engine, projections)
    start = time.perf_counter()
    given = (inputs, inputs2, parameters, request, plan, cotangents, cotangents2)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        if sharded:
            stack.enter_context(as_found(model))
            task: Task = ShardedTask(model, *given, remeasure=remeasure)
        else:
            stage = stack.enter_context(staged(model, inputs))
            stack.enter_context(request.path(stage.stateless, inputs))
            made = partial(Task, stage, *given, remeasure=remeasure)
            task = made() if processes is None else processes.together(partial(made, processes=processes, rate=rate))
        left = task.plan.seconds - task.plan.reading_seconds
        with progress_bar(f"tangent kernel of {task.plan.problem.samples} samples", left, progress) as report:
            found, error, narrowing = _watched(task, seed, report, processes)
    return KernelGram(
        matrix=found.matrix,
        outputs=kind,
        n_samples=sample_count(task.inputs),
        n_outputs=task.anatomy.outputs,
        precision=precision,
        batch_norm=batch_norm,
        floor=found.floor,
        jacobian_error=error,
        parameters=task.names,
        structured=tuple(name for site in task.anatomy.sites for name in site.names),
        general=tuple(task.anatomy.general),
        unused=task.anatomy.unused,
        seconds=time.perf_counter() - start,
        layer_traces=found.layer_traces,
        layer_matrices=found.layer_matrices,
        projection_error=found.projection_error,
        n_samples2=None if task.others is None else sample_count(task.others),
        plan=task.plan,
        narrow="" if narrowing is None else str(narrowing),
    )


def _device_of(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _watched(
    task: Task, seed: int, report: Report, processes: Processes | None
) -> tuple[KernelSum, float, Narrowing | None]:
    """Compute the kernel; in float64, watch all passes for casts to a narrower type, and look at ``Task.unsteady``.

    In other types the casts are those that were seen when the network was read, and its error allows for them already.

    Returns:
        The kernel, ``jacobian_error``, and the cast or the change of the outputs.
    """
    if isinstance(task, ShardedTask):
        return *task.agreed(compute_kernel(task, seed, report)), None
    error, narrowing = task.anatomy.jacobian_error, task.anatomy.narrowing
    if task.module.dtype != torch.float64:
        found = compute_kernel(task, seed, report, processes)
    else:
        watch = NarrowWatch(task.module, *(each for each in (task.inputs, task.others) if each is not None))
        with watch.watching():
            found = compute_kernel(task, seed, report, processes)
        narrowing = coarsest([narrowing_of(task.module, task.inputs, watch), task.unsteady])
        error = with_narrowing(error, task.module.dtype, narrowing)
    if processes is None:
        return found, task.jacobian_error(error, found.matrix), narrowing
    errors, seen = zip(*processes.gather((task.jacobian_error(error, found.matrix), narrowing)), strict=True)
    return found, max(errors), coarsest(seen)
