"""``Task``: a request for a kernel, the network that was read for it, and its plan.

Common to ``ntk_gram`` and ``plan_ntk``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.kernels.planning.costs import Problem
from lightning_conv.kernels.planning.pass_cost import PassCost, count_pass
from lightning_conv.kernels.planning.plan import MEASURING_COPIES, NTKPlan, make_plan
from lightning_conv.kernels.planning.request import Request
from lightning_conv.kernels.products.combinations import (
    Combinations,
    EachOutput,
    SharedRows,
    checked_sets,
    cotangents_of_shape,
)
from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy, read_network, rounded_again
from lightning_conv.kernels.reading.contracted_error import contracted_error, measured_count
from lightning_conv.kernels.reading.coupling import require_own_outputs, require_repeatable
from lightning_conv.kernels.reading.memory import reading_bytes
from lightning_conv.kernels.reading.parameters import parameter_names
from lightning_conv.kernels.reading.reach import with_late_parameters
from lightning_conv.kernels.reading.samples import joined, require_float_inputs
from lightning_conv.kernels.reading.sites import layer_of
from lightning_conv.machine.memory import allowed_memory, blocks, mebibytes
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.narrowing import Narrowing, coarsest
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
    ) -> None:
        self.request = request
        for each in (inputs, inputs2):
            if each is not None:
                sample_count(each)
                require_float_inputs(each)
        given = checked_sets(inputs, inputs2, cotangents, cotangents2)
        self._stage = stage
        self.module = stage.stateless(dtype=request.dtype, batch_norm=request.batch_norm, statistics_of=inputs)
        self.names = parameter_names(self.module, parameters)
        self.inputs = self.module.convert(inputs)
        self.others = None if inputs2 is None else self.module.convert(inputs2)
        self.couples = request.batch_norm == "batch"
        if self.couples and inputs2 is not None:
            raise ValueError(
                'inputs2: with batch_norm="batch" each set of samples has its own statistics, so a kernel between two sets is not '
                'defined; use batch_norm="eval" or "frozen"'
            )
        start = time.perf_counter()
        self.anatomy = self._read(by_gradients=remeasure) if plan is None else plan.reading
        if plan is not None and remeasure:
            self.anatomy = rounded_again(self.anatomy, self.module, self.inputs)
        if not self.couples:  # a network whose samples couple is read on all of them
            sets = [self.inputs] if self.others is None else [self.inputs, self.others]
            allowed = allowed_memory(request.max_memory, self.module.device)
            self.anatomy = with_late_parameters(self.anatomy, self.module, sets, allowed)
        known = plan is not None and self.anatomy.general == plan.reading.general
        self._general = plan.general_pass if plan is not None and known else self._general_pass()
        self.combinations = self._combinations(given)
        self._reading_seconds = time.perf_counter() - start if plan is None else 0.0
        self.plan = self._plan()
        if plan is not None:
            self._require_same(plan, sizes=not remeasure)
        same = plan is not None and (plan.problem, plan.precision) == (self.plan.problem, self.plan.precision)
        checked = same and request.precision != "certified"  # on the samples of the plan
        if not checked:
            self.plan = replace(self.plan, bytes=max(self.plan.bytes, self._checking_bytes()))
        self.unsteady = None if checked else self._unsteady_on_copies()

    def _unsteady_on_copies(self) -> Narrowing | None:
        """Return ``_unsteady``, for which all samples pass through the network for the first time: on copies of the weights.

        A forward may write to weights or attributes on other samples than those that it was tried on.
        """
        refused: ValueError | None = None
        with self.module.on_copies() as wrote:
            try:
                found = self._unsteady()
            except ValueError as error:
                refused = error
        if self._stage.wrote() or wrote():
            self.module.before, self.module.copies = self._stage.before, self.module.copies or wrote()
            return self._unsteady()
        if refused is not None:
            raise refused
        return found

    @property
    def _fits(self) -> int:
        """Number of samples whose forward fits into half of the memory."""
        allowed = allowed_memory(self.request.max_memory, self.module.device)
        return max(1, allowed // 2 // max(1, self.anatomy.forward_bytes))

    def _checking_bytes(self) -> int:
        """Return the bytes of the outputs that ``_unsteady`` holds: of all samples, and twice of one batch."""
        samples = max(sample_count(each) for each in (self.inputs, self.others) if each is not None)
        batch = samples if self.couples else min(samples, self._fits)
        return (samples + 2 * batch) * self.anatomy.outputs * torch.finfo(self.module.dtype).bits // 8

    def _unsteady(self) -> Narrowing | None:
        """Refuse a network whose samples couple or whose forward is random, and return a change that is too small for that.

        Raises:
            ValueError: the outputs change with the rest of the batch, or from one forward to the next.
        """
        if self.couples:
            return require_repeatable(self.module, self.inputs)
        sets = [self.inputs] if self.others is None else [self.inputs, self.others]
        if (few := self._reading_samples()) is not self.inputs:
            sets.append(few)
        return coarsest(
            [
                require_own_outputs(
                    self.module,
                    each,
                    rows=self._fits,
                    cuts=self._cuts(sample_count(each)),
                    arranged=self.anatomy.arranged,
                    level=self.anatomy.level,
                    coarse=self.anatomy.coarse,
                    gradients=self.request.precision == "certified",
                )
                for each in sets
            ]
        )

    def _cuts(self, samples: int) -> list[list[slice]]:
        """Return the batches in which the passes of the plan evaluate so many samples; torch.func takes them one by one."""
        cuts = []
        for each in self.plan.passes:
            tiles = [(rows, blocks(rows.stop - rows.start, each.tile)) for rows in blocks(samples, each.rows)]
            in_tiles = [slice(rows.start + t.start, rows.start + t.stop) for rows, cut in tiles for t in cut]
            cuts.append(blocks(samples, 1) if each.general else in_tiles)
        return cuts

    def _read(self, *, by_gradients: bool) -> Anatomy:
        """Read the network on a few samples.

        Raises:
            MemoryError: reading takes more than ``max_memory``.
        """
        needed = reading_bytes(self.module, self.names)
        allowed = allowed_memory(self.request.max_memory, self.module.device)
        if needed > allowed:
            raise MemoryError(
                f"max_memory: reading the network (its gradients and a copy in another precision) takes {mebibytes(needed)} of the allowed "
                f"{mebibytes(allowed)}; allow more, or choose fewer parameters"
            )
        inputs = self._reading_samples()
        return read_network(
            self.module,
            self.names,
            inputs,
            rules=self.request.engine == "auto" and not self.couples,
            samples=sample_count(inputs) if self.couples else READ_SAMPLES,
            by_gradients=by_gradients,
        )

    def _reading_samples(self) -> Inputs:
        """Return the samples of the rows.

        If they are few, columns are added, since one sample does not tell which dimension contains it.
        """
        if self.others is None or sample_count(self.inputs) >= READ_SAMPLES:
            return self.inputs
        both = joined(self.inputs, take(self.others, slice(0, READ_SAMPLES)))
        return max(self.inputs, self.others, key=sample_count) if both is None else both

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
        room = allowed_memory(self.request.max_memory, self.module.device) // 4 // max(1, MEASURING_COPIES * each)
        return max(1, min(room, measured_count(sample_count(self.inputs), each)))

    def jacobian_error(self, error: float, matrix: Tensor) -> float:
        """Return the relative rounding error of the rows of the kernel, from that of the whole Jacobian.

        They are the same unless the outputs are contracted; then the rounding is measured on some of the samples.
        """
        if not self.contracts:
            return error
        diagonal = matrix.diagonal() if self.others is None else None
        found = contracted_error(
            self.module,
            self.names,
            self.inputs,
            self.combinations[0],
            count=None if self.couples else self._measured,
            diagonal=diagonal,
        )
        return found.relative(error, None if diagonal is None else float(diagonal.sum()))


def error_groups(projections: int) -> int:
    """Return the number of groups into which the projections are divided."""
    return min(ERROR_GROUPS, projections)
