"""``ntk_gram``: the exact empirical neural tangent kernel of a module on given samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_conv.evaluation import BatchNormMode, Inputs, StatelessModule, map_inputs, sample_count, undisturbed
from lightning_conv.kernels.costs import Problem
from lightning_conv.kernels.discovery import (
    Anatomy,
    check_samples_do_not_couple,
    read_network,
    require_float_inputs,
)
from lightning_conv.kernels.engine import Engine
from lightning_conv.kernels.plan import NTKPlan, make_plan
from lightning_conv.kernels.precision import PRECISIONS, Precision
from lightning_conv.kernels.selection import parameter_names

Outputs: TypeAlias = Literal["trace", "full", "sum", "projected"]
EngineName: TypeAlias = Literal["auto", "jacobian"]

ERROR_GROUPS = 4
"""Parts into which the projections are divided to see by how much they differ."""


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
    general: tuple[str, ...]  # those by per-sample Jacobians; the outputs do not depend on the rest
    seconds: float
    layer_traces: Mapping[str, float] = field(default_factory=dict)
    """Trace of every layer's own kernel; they add up to ``trace``. Empty for two sets of samples."""
    layer_matrices: Mapping[str, Tensor] = field(default_factory=dict)
    """Every layer's own kernel, where ``per_layer`` was asked for; they add up to ``matrix``."""
    projection_error: float = 0.0
    """Of ``outputs="projected"``: estimated standard error of the matrix, in the Frobenius norm."""
    plan: NTKPlan | None = None

    @property
    def trace(self) -> float:
        """Sum of the diagonal = |J|_F^2 = sum of all eigenvalues.

        Raises:
            ValueError: the kernel is between two sets of samples.
        """
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"trace: the kernel is between two sets of samples, {tuple(self.matrix.shape)}")
        return float(self.matrix.diagonal().sum())


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
    max_memory: int | None = None,
    engine: EngineName = "auto",
    projections: int = 16,
    seed: int = 0,
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
        batch_norm: ``"eval"``: running statistics; ``"frozen"``: the statistics of ``inputs``, held constant.
        max_memory: bytes that may be used (default a quarter of what is free). The work is cut to keep to it.
        engine: ``"auto"``: layer rules where they hold. ``"jacobian"``: per-sample Jacobians for everything, slow, for
            comparison.
        projections: number k of sign vectors.
        seed: of the sign vectors.

    Returns:
        The matrix in float64 with the bound ``floor`` on its rounding error.

    Raises:
        ValueError: no trainable parameter, no or non-finite samples, samples that couple, unknown option.
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
        task = Task(model, inputs, inputs2, parameters, request)
        gram = _projected(task, seed) if outputs == "projected" else _one(task, _cotangents(task, outputs))
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
    max_memory: int | None = None,
    engine: EngineName = "auto",
    projections: int = 16,
) -> NTKPlan:
    """What ``ntk_gram`` with the same arguments would do: its flops, its peak memory, seconds, and the form of every layer.

    Nothing but three samples passes through the network. Arguments and errors are those of ``ntk_gram``.

    Example:
        >>> import torch
        >>> plan = plan_ntk(torch.nn.Linear(784, 10), torch.rand(100, 784))
        >>> plan.contributions[0].way
        'Hadamard product'
    """
    request = Request(outputs, per_layer, precision, batch_norm, max_memory, engine, projections)
    with undisturbed(model):
        return Task(model, inputs, inputs2, parameters, request).plan


@dataclass(frozen=True)
class Request:
    """The options of a kernel, checked."""

    outputs: Outputs
    per_layer: bool
    precision: Precision
    batch_norm: BatchNormMode
    max_memory: int | None
    engine: EngineName
    projections: int

    def __post_init__(self) -> None:
        _require("outputs", self.outputs, get_args(Outputs))
        _require("precision", self.precision, PRECISIONS)
        _require("batch_norm", self.batch_norm, get_args(BatchNormMode))
        _require("engine", self.engine, get_args(EngineName))
        if self.projections < 2:
            raise ValueError(f"projections: {self.projections}; an estimate with its error needs at least 2")


class Task:
    """A network that was read and what is to be computed of it. Make it inside ``undisturbed(model)``."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        inputs2: Inputs | None,
        parameters: Sequence[str] | str | None,
        request: Request,
    ) -> None:
        self.request = request
        for each in (inputs, inputs2):
            if each is not None:
                sample_count(each)
                require_float_inputs(each)
        dtype = torch.float64 if request.precision == "certified" else None
        self.module = StatelessModule(model, dtype=dtype, batch_norm=request.batch_norm, statistics_of=inputs)
        self.names = parameter_names(self.module, parameters)
        self.inputs = self.module.convert(inputs)
        self.others = None if inputs2 is None else self.module.convert(inputs2)
        self.anatomy: Anatomy = read_network(
            self.module,
            self.names,
            self.inputs,
            batch_norm=request.batch_norm,
            statistics_of=inputs,
            rules=request.engine == "auto",
        )
        count = sample_count(self.inputs)
        with torch.no_grad():
            few = self._outputs(slice(0, min(3, max(1, count - 1))))
            check_samples_do_not_couple(few, self._outputs(slice(0, min(16, count))))
        self.plan = self._plan()

    def _outputs(self, rows: slice) -> Tensor:
        return self.module.outputs({}, map_inputs(lambda tensor: tensor[rows], self.inputs))

    def _plan(self) -> NTKPlan:
        request, classes = self.request, self.anatomy.outputs
        # The groups of projections are computed one after the other.
        groups = error_groups(request.projections)
        outputs = {"sum": 1, "projected": -(-request.projections // groups)}.get(request.outputs, classes)
        problem = Problem(
            samples=sample_count(self.inputs),
            others=None if self.others is None else sample_count(self.others),
            outputs=outputs,
            trace=request.outputs != "full",
            width=torch.finfo(self.module.dtype).bits // 8,
        )
        layers = {name.rpartition(".")[0] for name in self.names} if request.per_layer else set()
        return make_plan(
            self.anatomy,
            problem,
            precision=request.precision,
            repeats=groups if request.outputs == "projected" else 1,
            matrices=(1 + len(layers)) * (2 if request.outputs == "projected" else 1),
            max_memory=request.max_memory,
            device=self.module.device,
        )


def error_groups(projections: int) -> int:
    """Into how many groups the projections are divided."""
    return min(ERROR_GROUPS, projections)


def _cotangents(task: Task, outputs: Outputs) -> Tensor:
    eye = torch.eye(task.anatomy.outputs, dtype=task.module.dtype, device=task.module.device)
    return eye.sum(0, keepdim=True) if outputs == "sum" else eye


def _one(task: Task, cotangents: Tensor) -> KernelGram:
    """The kernel for the given combinations of outputs."""
    engine = Engine(
        task.module, task.anatomy, task.plan, cotangents, task.inputs, task.others, per_layer=task.request.per_layer
    )
    engine.run()
    return KernelGram(
        matrix=engine.matrix,
        outputs=task.request.outputs,
        n_samples=sample_count(task.inputs),
        n_outputs=task.anatomy.outputs,
        precision=task.request.precision,
        batch_norm=task.request.batch_norm,
        floor=engine.floor,
        jacobian_error=task.anatomy.jacobian_error,
        parameters=task.names,
        structured=tuple(n for site in task.anatomy.sites for n in site.names),
        general=tuple(task.anatomy.general),
        seconds=0.0,
        layer_traces=engine.layer_traces,
        layer_matrices=engine.layer_matrices,
        plan=task.plan,
    )


def _projected(task: Task, seed: int) -> KernelGram:
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
    for each in signs.tensor_split(groups):
        # Rows of sqrt(1 / size): the group's own mean. The plan is for the largest group.
        gram = _one(task, each / len(each) ** 0.5)
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


def _require(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
