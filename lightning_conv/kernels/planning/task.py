"""A request for a kernel, the network read for it, and its plan: what ``ntk_gram`` and ``plan_ntk`` have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_conv.kernels.engine.coupled import coupled_kernel
from lightning_conv.kernels.engine.run import Engine
from lightning_conv.kernels.engine.samples import joined
from lightning_conv.kernels.plan import NTKPlan
from lightning_conv.kernels.planning.costs import Problem
from lightning_conv.kernels.planning.make import make_plan
from lightning_conv.kernels.planning.memory import allowed_memory, mebibytes
from lightning_conv.kernels.planning.pass_flops import PassCost, count_pass
from lightning_conv.kernels.planning.selection import parameter_names
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.kernels.reading.discovery import (
    READ_SAMPLES,
    Anatomy,
    check_samples_do_not_couple,
    read_network,
    require_float_inputs,
)
from lightning_conv.kernels.reading.memory import reading_bytes
from lightning_conv.kernels.reading.reach import with_late_parameters
from lightning_conv.kernels.reading.sites import layer_of
from lightning_conv.kernels.result import KernelGram, Outputs
from lightning_conv.networks.evaluation import BatchNormMode, Inputs, StatelessModule, sample_count, take
from lightning_conv.reporting.progress import Report

EngineName: TypeAlias = Literal["auto", "jacobian"]

COMPARED = 16
"""Samples whose outputs are compared with those of fewer, to see whether samples couple."""

ERROR_GROUPS = 4
"""Parts into which the projections are divided to see by how much they differ."""


@dataclass(frozen=True)
class Request:
    """The options of a kernel, checked."""

    outputs: Outputs
    per_layer: bool
    precision: Precision
    batch_norm: BatchNormMode
    max_memory: float | None
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
        plan: NTKPlan | None = None,
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
        self.couples = request.batch_norm == "batch"
        if self.couples and inputs2 is not None:
            raise ValueError(
                'inputs2: with batch_norm="batch" every set of samples has statistics of its own, so a kernel between two sets is not '
                'defined; use batch_norm="eval" or "frozen"'
            )
        start = time.perf_counter()
        self.anatomy = self._read() if plan is None else plan.reading
        if not self.couples:  # a network whose samples couple is read on all of them
            sets = [self.inputs] if self.others is None else [self.inputs, self.others]
            allowed = allowed_memory(request.max_memory, self.module.device)
            self.anatomy = with_late_parameters(self.anatomy, self.module, sets, allowed)
        known = plan is not None and self.anatomy.general == plan.reading.general
        self._general = plan.general_pass if plan is not None and known else self._general_pass()
        self._reading_seconds = time.perf_counter() - start if plan is None else 0.0
        self.plan = self._plan()
        if plan is not None:
            self._require_same(plan)

    def _read(self) -> Anatomy:
        """What there is in the network.

        Raises:
            MemoryError: reading it takes more than ``max_memory``.
        """
        needed = reading_bytes(self.module, self.names)
        allowed = allowed_memory(self.request.max_memory, self.module.device)
        if needed > allowed:
            raise MemoryError(
                f"max_memory: reading the network (its gradients and a copy in another precision) takes {mebibytes(needed)} of the allowed "
                f"{mebibytes(allowed)}; allow more, or choose fewer parameters"
            )
        inputs = self._reading_samples()
        count = sample_count(inputs)
        anatomy = read_network(
            self.module,
            self.names,
            inputs,
            rules=self.request.engine == "auto" and not self.couples,
            samples=count if self.couples else READ_SAMPLES,
        )
        if not self.couples:
            # Of three samples or fewer there is no rest of the batch: the first alone is compared with all.
            few = anatomy.first_outputs if count > READ_SAMPLES else self._outputs(anatomy, inputs, max(1, count - 1))
            check_samples_do_not_couple(few, self._outputs(anatomy, inputs, min(COMPARED, count)), anatomy.level)
        return anatomy

    def _outputs(self, anatomy: Anatomy, inputs: Inputs, first: int) -> Tensor:
        """Of the first samples. Not under ``no_grad``: the forward may differentiate inside, and no parameter asks for a graph."""
        return self.module.outputs({}, anatomy.arranged(take(inputs, slice(0, first)))).detach()

    def _reading_samples(self) -> Inputs:
        """The rows; where they are few, with columns: one sample does not tell where in a tensor the samples are."""
        if self.others is None or sample_count(self.inputs) >= READ_SAMPLES:
            return self.inputs
        both = joined(self.inputs, take(self.others, slice(0, COMPARED)))
        return max(self.inputs, self.others, key=sample_count) if both is None else both

    def _require_same(self, plan: NTKPlan) -> None:
        """Refuse a plan that was made for another kernel.

        Raises:
            ValueError: it was.
        """
        if plan.parameters != self.names:
            raise ValueError(
                f"plan: made for {len(plan.parameters)} parameters ({', '.join(plan.parameters[:3])}, ...), but the kernel is over "
                f"{len(self.names)} ({', '.join(self.names[:3])}, ...); make it anew by plan_ntk"
            )
        if (plan.problem, plan.precision) != (self.plan.problem, self.plan.precision):
            raise ValueError(
                f"plan: made for {plan.problem}, {plan.precision!r}, but asked for is {self.plan.problem}, "
                f"{self.plan.precision!r}; make it anew by plan_ntk"
            )

    def _plan(self) -> NTKPlan:
        request, classes = self.request, self.anatomy.outputs
        # The groups of projections are computed one after the other.
        groups = error_groups(request.projections) if self.projects else 1
        outputs = 1 if request.outputs == "sum" else -(-request.projections // groups) if self.projects else classes
        problem = Problem(
            samples=sample_count(self.inputs),
            others=None if self.others is None else sample_count(self.others),
            outputs=outputs,
            trace=request.outputs != "full",
            width=torch.finfo(self.module.dtype).bits // 8,
        )
        layers = {layer_of(name) for name in self.names} if request.per_layer else set()
        return make_plan(
            self.anatomy,
            problem,
            precision=request.precision,
            repeats=groups,
            matrices=(1 + len(layers)) * (2 if self.projects else 1),
            max_memory=request.max_memory,
            device=self.module.device,
            couples=self.couples,
            reading_seconds=self._reading_seconds,
            general=self._general,
        )

    def _general_pass(self) -> PassCost | None:
        """What a pass costs for the parameters without a rule: of one sample, or of the batch where samples couple."""
        if not self.anatomy.general:
            return None
        inputs = self.inputs if self.couples else take(self.inputs, slice(1))
        return count_pass(self.module, tuple(self.anatomy.general), inputs)

    @property
    def projects(self) -> bool:
        """Whether outputs are projected: of no more of them than there are sign vectors the sum itself is cheaper, and exact."""
        return self.request.outputs == "projected" and self.anatomy.outputs > self.request.projections

    def cotangents(self) -> Tensor:
        """One row for each output, or one of ones for their sum."""
        eye = torch.eye(self.anatomy.outputs, dtype=self.module.dtype, device=self.module.device)
        return eye.sum(0, keepdim=True) if self.request.outputs == "sum" else eye

    def gram(self, cotangents: Tensor, report: Report) -> KernelGram:
        """The kernel of the combinations of outputs given by the rows of ``cotangents``, (K, C)."""
        per_layer = self.request.per_layer
        if self.couples:
            found = coupled_kernel(self.module, self.plan, self.inputs, cotangents, per_layer=per_layer, report=report)
        else:
            engine = Engine(
                self.module, self.anatomy, self.plan, cotangents, self.inputs, self.others,
                per_layer=per_layer, report=report,
            )  # fmt: skip
            found = engine.run()
        return KernelGram(
            matrix=found.matrix,
            outputs=self.request.outputs,
            n_samples=sample_count(self.inputs),
            n_outputs=self.anatomy.outputs,
            precision=self.request.precision,
            batch_norm=self.request.batch_norm,
            floor=found.floor,
            jacobian_error=self.anatomy.jacobian_error,
            parameters=self.names,
            structured=tuple(n for site in self.anatomy.sites for n in site.names),
            general=tuple(self.anatomy.general),
            unused=self.anatomy.unused,
            seconds=0.0,
            layer_traces=found.layer_traces,
            layer_matrices=found.layer_matrices,
            n_samples2=None if self.others is None else sample_count(self.others),
            plan=self.plan,
        )


def error_groups(projections: int) -> int:
    """Into how many groups the projections are divided."""
    return min(ERROR_GROUPS, projections)


def _require(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
