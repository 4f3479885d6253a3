"""``Task``: a request for a kernel, the network that was read for it, and its plan.

Common to ``ntk_gram`` and ``plan_ntk``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_conv.kernels.planning.costs import Problem
from lightning_conv.kernels.planning.pass_cost import PassCost, count_pass
from lightning_conv.kernels.planning.plan import NTKPlan, make_plan
from lightning_conv.kernels.planning.request import Request
from lightning_conv.kernels.planning.sizes import measuring_bytes
from lightning_conv.kernels.planning.steadiness import (
    checking_bytes,
    converted_bytes,
    on_copies,
    room_of_outputs,
    rows_that_fit,
    unsteady_outputs,
)
from lightning_conv.kernels.products.combinations import (
    Combinations,
    EachOutput,
    SharedRows,
    checked_sets,
    cotangents_of_shape,
)
from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy, rounded_again
from lightning_conv.kernels.reading.contracted_error import combined, contracted_error, measured_count
from lightning_conv.kernels.reading.coupling import require_repeatable
from lightning_conv.kernels.reading.memory import reading_bytes
from lightning_conv.kernels.reading.parameters import parameter_names
from lightning_conv.kernels.reading.reach import with_late_parameters
from lightning_conv.kernels.reading.read_within import read_within, reading_samples
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.kernels.reading.sites import layer_of
from lightning_conv.machine.memory import allowed_memory
from lightning_conv.machine.processes import Processes
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.narrowing import Narrowing
from lightning_conv.networks.stage import Stage

ERROR_GROUPS = 4
"""Groups into which the projections are divided, so that their spread gives a standard error."""


class Task:
    """A network that was read, and what is to be computed of it. Construct it inside ``staged``.

    Arguments and errors are those of ``ntk_gram``; ``stage`` has its model, and ``request`` holds its options.

    Attributes:
        combinations: what is differentiated, of the samples in the rows and of those in the columns.
        unsteady: the change of the outputs between two evaluations that is neither rounding nor refused, see
            ``require_own_outputs``; None: there is none.
    """

    def __init__(
        self,
        stage: Stage,
        inputs: Inputs,
        inputs2: Inputs | None,
        parameters: Sequence[str] | str | None,
        request: Request,
        plan: NTKPlan | None = None,
        cotangents: Tensor | None = None,
        cotangents2: Tensor | None = None,
        *,
        remeasure: bool = False,
        processes: Processes | None = None,
        rate: float | None = None,
    ) -> None:
        self.request, self._processes = request, processes
        self._staging_seconds = stage.seconds if plan is None else plan.staging_seconds
        for name, each in (("inputs", inputs), ("inputs2", inputs2)):
            if each is not None:
                sample_count(each, name)
        given = checked_sets(inputs, inputs2, cotangents, cotangents2)
        self.module = stage.stateless(dtype=request.dtype, batch_norm=request.batch_norm, statistics_of=inputs)
        self.names = parameter_names(self.module, parameters)
        self.inputs = self.module.convert(inputs)
        self.others = None if inputs2 is None else self.module.convert(inputs2)
        for each in self._sets:
            require_float_inputs(each, partial(self.module.outputs, {}, each))
        self.couples = request.batch_norm == "batch"
        if self.couples and inputs2 is not None:
            raise ValueError(
                'inputs2: with batch_norm="batch" each set of samples has its own statistics, so a kernel between two sets is not '
                'defined; use batch_norm="eval" or "frozen"'
            )
        start = time.perf_counter()
        self.anatomy = self._read(by_gradients=remeasure) if plan is None else plan.reading
        if plan is not None and remeasure:
            share = None if processes is None or self.couples else processes.share
            self.anatomy = rounded_again(self.anatomy, self.module, self.inputs, share)
        if not self.couples:  # a network whose samples couple is read on all of them
            allowed = allowed_memory(request.max_memory, self.module.device)
            self.anatomy = with_late_parameters(self.anatomy, self.module, self._sets, allowed)
        known = plan is not None and self.anatomy.general == plan.reading.general
        self._general = plan.general_pass if plan is not None and known else self._general_pass()
        self.combinations = self._combinations(given)
        self._reading_seconds = time.perf_counter() - start if plan is None else 0.0
        self.plan = self._plan().divided(1 if processes is None else processes.world, rate)
        if plan is not None:
            self._require_same(plan, sizes=not remeasure)
        same = plan is not None and (plan.problem, plan.precision) == (self.plan.problem, self.plan.precision)
        checked = same and request.precision != "certified"  # on the samples of the plan
        if not checked:
            self.plan = replace(self.plan, bytes=max(self.plan.bytes, self._checking_bytes()))
        self.plan = replace(self.plan, bytes=self.plan.bytes + converted_bytes(self.module))
        start = time.perf_counter()
        self.unsteady = None if checked else on_copies(stage, self.module, self._unsteady)
        if plan is None:
            self._count_checking(time.perf_counter() - start)

    def _count_checking(self, seconds: float) -> None:
        """Count the comparison of the outputs as a part of reading, which a call without a plan does again."""
        plan = self.plan
        self.plan = replace(plan, seconds=plan.seconds + seconds, reading_seconds=plan.reading_seconds + seconds)

    @property
    def _fits(self) -> int:
        return rows_that_fit(self.module, self.anatomy, self.request.max_memory)

    @property
    def _room(self) -> int:
        return room_of_outputs(self.module, self.request.max_memory)

    @property
    def _sets(self) -> list[Inputs]:
        return [self.inputs] if self.others is None else [self.inputs, self.others]

    def _checking_bytes(self) -> int:
        samples = max(map(sample_count, self._sets))
        rows = samples if self.couples else min(samples, self._fits)
        gradients = self.request.precision == "certified" and not self.couples
        return checking_bytes(self.module, self.anatomy, samples, rows, room=self._room, gradients=gradients)

    def _unsteady(self) -> Narrowing | None:
        """Return ``unsteady``.

        Raises:
            ValueError: the outputs change with the rest of the batch, or from one forward to the next.
        """
        if self.couples:
            return require_repeatable(self.module, self.inputs)
        sets = self._sets
        if self._processes is not None and self.plan.division is not None:  # each looks at a share of the samples
            sets = [take(each, self._processes.share(sample_count(each))) for each in sets]
        if (few := reading_samples(self.inputs, self.others)) is not self.inputs:
            sets.append(few)
        gradients = self.request.precision == "certified"
        return unsteady_outputs(
            self.module, sets, self.anatomy, self.plan, rows=self._fits, room=self._room, gradients=gradients
        )

    def _read(self, *, by_gradients: bool) -> Anatomy:
        return read_within(
            self.module,
            self.names,
            reading_samples(self.inputs, self.others),
            rules=self.request.engine == "auto" and not self.couples,
            couples=self.couples,
            by_gradients=by_gradients,
            max_memory=self.request.max_memory,
        )

    def _require_same(self, plan: NTKPlan, *, sizes: bool) -> None:
        """Refuse a plan that was made for another kernel; without ``sizes`` only one over other parameters.

        Raises:
            ValueError: the parameters, the sizes or the precision differ.
        """
        if plan.parameters != self.names:
            raise ValueError(
                f"plan: made for {len(plan.parameters)} parameters ({', '.join(plan.parameters[:3])}, ...), but the kernel is over "
                f"{len(self.names)} ({', '.join(self.names[:3])}, ...); make a new plan with plan_ntk"
            )
        if sizes and (plan.problem, plan.precision) != (self.plan.problem, self.plan.precision):
            raise ValueError(
                f"plan: made for {plan.problem}, {plan.precision!r}, but asked for is {self.plan.problem}, "
                f"{self.plan.precision!r}; make a new plan with plan_ntk"
            )

    def _plan(self) -> NTKPlan:
        request = self.request
        # The groups of projections are computed one after the other.
        groups = error_groups(request.projections) if self.projects else 1
        outputs = -(-request.projections // groups) if self.projects else self.combinations[0].count
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
            staging_seconds=self._staging_seconds,
            general=self._general,
            measured=self._measured if self.contracts and not self.couples else 0,
            copies=reading_bytes(self.module, self.names),
        )

    def _general_pass(self) -> PassCost | None:
        """Count a pass for the parameters without a rule: of one sample, or of the batch where samples couple."""
        if not self.anatomy.general:
            return None
        inputs = self.inputs if self.couples else take(self.inputs, slice(1))
        return count_pass(self.module, tuple(self.anatomy.general), inputs)

    @property
    def projects(self) -> bool:
        """Whether outputs are projected.

        They are not if there are no more outputs than sign vectors, since the exact trace kernel then costs no more.
        """
        return self.request.outputs == "projected" and self.anatomy.outputs > self.request.projections

    def _combinations(self, given: Sequence[tuple[Tensor, str]]) -> tuple[Combinations, Combinations]:
        """Return the combinations of outputs in the rows and in the columns; random ones are drawn by ``projected_kernel``.

        Raises:
            ValueError: cotangents have another shape than the outputs.
        """
        classes = self.anatomy.outputs
        if given:
            few = self.inputs if self.couples else take(self.inputs, slice(READ_SAMPLES))
            found = [cotangents_of_shape(each, self.module, few, classes, name) for each, name in given]
            return found[0], found[-1]
        each = EachOutput(classes)
        if self.request.outputs == "sum":
            ones = SharedRows(torch.ones(1, classes, dtype=self.module.dtype, device=self.module.device))
            return ones, ones
        return each, each

    @property
    def contracts(self) -> bool:
        """Whether the outputs of a sample are contracted to one number, so that terms of its gradient may cancel."""
        return self.request.outputs in ("sum", "cotangents")

    @property
    def _measured(self) -> int:
        """Number of samples on which the rounding of contracted rows is measured, in a quarter of the memory."""
        each = self.anatomy.forward_bytes
        room = allowed_memory(self.request.max_memory, self.module.device) // 4 // max(1, measuring_bytes(self.anatomy))
        return max(1, min(room, measured_count(sample_count(self.inputs), each)))

    def jacobian_error(self, error: float, matrix: Tensor) -> float:
        """Return the relative rounding error of the rows of the kernel, from that of the whole Jacobian.

        They are the same unless the outputs are contracted; then the rounding is measured on some of the samples.
        """
        if not self.contracts:
            return error
        diagonal = matrix.diagonal() if self.others is None else None
        processes = None if self.couples else self._processes
        measure = partial(
            contracted_error,
            self.module,
            self.names,
            self.inputs,
            self.combinations[0],
            count=None if self.couples else self._measured,
            diagonal=diagonal,
        )
        if processes is None:
            found = measure()
        else:
            found = combined(processes.gather(processes.together(lambda: measure(share=processes.share))))
        return found.relative(error, None if diagonal is None else float(diagonal.sum()))


def error_groups(projections: int) -> int:
    """Return the number of groups into which the projections are divided."""
    return min(ERROR_GROUPS, projections)
