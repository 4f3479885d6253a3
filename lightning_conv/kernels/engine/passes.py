"""``Engine``: the passes of a plan, in which samples go through the network and Gram blocks are added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.engine.collectors import Collector, Store, collectors_of
from lightning_conv.kernels.engine.factors import Factor, RowsFactor
from lightning_conv.kernels.engine.formed_factor import Workspace
from lightning_conv.kernels.engine.kernel_sum import KernelSum
from lightning_conv.kernels.engine.per_sample_jacobian import jacobian_rows
from lightning_conv.kernels.engine.samples import Samples, mirror, scale
from lightning_conv.kernels.planning.passes import Pass
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.combinations import Combinations
from lightning_conv.kernels.reading.recording import LayerCall, layer_gradients, record
from lightning_conv.kernels.reading.same_uses import require_same_uses
from lightning_conv.linalg.rounding import gamma
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.inputs import take
from lightning_conv.reporting.progress import Report, equal_parts, part, silent

Factors = list[tuple[str, Factor]]
"""With the names of their layers."""


class Engine:
    """Adds up the Gram matrix of a network whose samples do not couple, one pass of the plan after the other.

    Args:
        task: the network, its samples and its plan.
        rows: the combinations of outputs that are differentiated, of the samples in the rows.
        columns: those of the samples in the columns.
        report: called with the share of the work that is done.
    """

    def __init__(self, task: Task, rows: Combinations, columns: Combinations, report: Report = silent) -> None:
        self.module, self.anatomy, self.plan = task.module, task.anatomy, task.plan
        self.report = report
        self.trace, self.count = self.plan.problem.trace, rows.count
        self.stride = 1 if self.trace else self.count
        self.symmetric = task.others is None
        self.rows = Samples(task.inputs, rows)
        self.columns = self.rows if task.others is None else Samples(task.others, columns)
        self.shape = [self.stride * each.count for each in (self.rows, self.columns)]
        layers = list(dict.fromkeys(c.layer for c in self.plan.contributions))
        self.matrix = self._zeros()
        self.layer_matrices = {layer: self._zeros() for layer in layers} if task.request.per_layer else {}
        self.layer_traces = dict.fromkeys(layers, 0.0) if self.symmetric else {}
        self.floor = 0.0
        self._workspace = Workspace(self.plan.workspace)
        anatomy = self.anatomy
        # All parameters that were tracked when the network was read, so that the same calls are recorded.
        self._tracked = {name: self.module.parameters[name] for name in anatomy.tracked}
        self._additions = 0
        self._size = 0.0  # sum over the factors of |m||m'|

    def _zeros(self) -> Tensor:
        return torch.zeros(*self.shape, dtype=torch.float64, device=self.module.device)

    def run(self) -> KernelSum:
        """Run all passes, once, since the matrix accumulates.

        If the plan is for more outputs than there are, only those passes run that cover some of them.
        """
        self._run_all([each for each in self.plan.passes if each.outputs[0] < self.count])
        self.report(1.0)
        self._collect_parts()
        for layer in self.layer_matrices.values():
            self.matrix += layer
        # The sum over factors errs by gamma_k times the sum of their magnitudes.
        self.floor += gamma(self._additions + 1, torch.float64) * self._size
        for matrix in (self.matrix, *self.layer_matrices.values()):
            scale(matrix, self.rows.combinations.scales, self.columns.combinations.scales)
            if self.symmetric:
                mirror(matrix)
        return KernelSum(self.matrix, self.floor, self.layer_traces, self.layer_matrices)

    def _run_all(self, passes: Sequence[Pass]) -> None:
        for number, each in enumerate(passes):
            self._run(each, part(self.report, number / len(passes), 1 / len(passes)))

    def _collect_parts(self) -> None:
        """Add what other processes have computed; here there are none."""

    def _run(self, each: Pass, report: Report) -> None:
        rows, columns = (blocks(side.count, each.rows) for side in (self.rows, self.columns))
        reports = equal_parts(report, _steps(len(rows), None if self.symmetric else len(columns)))
        left_sizes: dict[int, float] = {}
        right_sizes: dict[int, float] = {}
        left: Factors = []
        right: Factors = []
        for first, mine in enumerate(rows):
            left, right = [], []  # two blocks are in memory at once: those before are freed first
            left = self._collect(each, self.rows, mine, next(reports))
            for second, theirs in enumerate(columns):
                if self.symmetric and second < first:
                    continue
                own, right = self.symmetric and second == first, []
                right = left if own else self._collect(each, self.columns, theirs, next(reports))
                diagonals = self._multiply(left, right, mine, theirs, next(reports))
                if own or (not self.symmetric and second == 0):
                    self._count(left_sizes, left, self.rows, mine, diagonals)
                if not self.symmetric and first == 0:
                    self._count(right_sizes, right, self.columns, theirs)
        # The last block of rows: its bound is the same for every block.
        gammas = [factor.gamma(self.plan.precision) for _, factor in left]
        self._bound(gammas, left_sizes, right_sizes or left_sizes)

    def _multiply(
        self, left: Factors, right: Factors, mine: slice, theirs: slice, report: Report
    ) -> list[float | None]:
        """Add the products of all factors of two blocks; return what each adds to the trace, None off the diagonal."""
        diagonals = []
        for index, ((layer, one), (_, other)) in enumerate(zip(left, right, strict=True)):
            report(index / len(left))
            diagonals.append(self._add(layer, one, other, mine, theirs))
        return diagonals

    def _count(
        self,
        sizes: dict[int, float],
        factors: Factors,
        side: Samples,
        block: slice,
        diagonals: Sequence[float | None] | None = None,
    ) -> None:
        """Add |m|^2 of a block of samples to ``sizes``, by the number of the factor."""
        for index, (_, factor) in enumerate(factors):
            diagonal = None if diagonals is None else diagonals[index]
            sizes[index] = sizes.get(index, 0.0) + self._size_of(factor, side, block, diagonal)

    def _bound(self, gammas: Sequence[float], rows: Mapping[int, float], columns: Mapping[int, float]) -> None:
        """Add the bounds of the products of all factors.

        Args:
            gammas: relative error of the entries, by factor.
            rows: |m|^2 of the samples in the rows, by the number of the factor.
            columns: |m'|^2 of those in the columns.
        """
        for index, own in enumerate(gammas):
            # |E_ij| <= gamma m_i m'_j in every entry, hence |E|_2 <= gamma |m||m'|.
            size = (rows[index] * columns[index]) ** 0.5
            self.floor += own * size
            self._size += size
        self._additions += len(gammas)

    def _size_of(self, factor: Factor, side: Samples, block: slice, diagonal: float | None = None) -> float:
        return factor.size(diagonal, self.plan.precision, side.scales(block))

    def _add(self, layer: str, one: Factor, other: Factor, mine: slice, theirs: slice) -> float | None:
        """Add the Gram block of two factors, and return what it adds to the trace if it lies on the diagonal."""
        rows, columns = (slice(s.start * self.stride, s.stop * self.stride) for s in (mine, theirs))
        target = self.layer_matrices.get(layer, self.matrix)[rows, columns]
        if one is not other:
            one.add_gram(other, target, self.plan.precision)
            return None
        before = target.diagonal().clone()
        one.add_gram(other, target, self.plan.precision)
        terms, scales = target.diagonal() - before, self.rows.scales(mine)
        added = float((terms if scales is None else terms * scales.square()).sum())
        self.layer_traces[layer] += added
        return added

    def _collect(self, each: Pass, side: Samples, block: slice, report: Report) -> Factors:
        form = self._by_jacobian if each.general else self._by_rule
        return form(each, side, block, report)

    def _by_rule(self, each: Pass, side: Samples, block: slice, report: Report) -> Factors:
        first, last = each.outputs[0], min(each.outputs[1], self.count)
        count = block.stop - block.start
        collectors: list[tuple[str, Collector]] = []
        for index in each.contributions:
            site, planned = self.anatomy.sites[index], self.plan.contributions[index]
            found = collectors_of(site, planned, count, last - first, self._workspace, trace=self.trace)
            collectors += [(planned.layer, one) for one in found]
        wanted = sorted({use.call for index in each.contributions for use in self.anatomy.sites[index].uses})
        for tile in blocks(count, each.tile):
            there = slice(block.start + tile.start, block.start + tile.stop)
            report(tile.start / count)
            outputs, recorder = record(self.module, self.anatomy.arranged(take(side.inputs, there)), self._tracked)
            require_same_uses(self.anatomy, outputs, recorder)
            for _, collector in collectors:
                collector.add_inputs(tile, recorder.calls)
            for start in range(first, last, self.plan.outputs_at_once):
                stop = min(start + self.plan.outputs_at_once, last)
                cotangents = side.combinations.taken(slice(start, stop), there, outputs)
                gradients = [
                    self._gradients(outputs, recorder.calls, wanted, one, keep=k + 1 < last)
                    for k, one in enumerate(cotangents, start)
                ]
                for _, collector in collectors:
                    collector.add_gradients(tile, start - first, recorder.calls, gradients)
        return [(layer, collector.factor()) for layer, collector in collectors]

    def _gradients(
        self, outputs: Tensor, calls: Sequence[LayerCall], wanted: Sequence[int], cotangent: Tensor, *, keep: bool
    ) -> Mapping[int, Tensor]:
        chosen = [calls[index] for index in wanted]
        found = layer_gradients(outputs, cotangent, chosen, keep=keep)
        return {
            index: outputs.new_zeros(call.shape) if gradient is None else gradient
            for index, call, gradient in zip(wanted, chosen, found, strict=True)
        }

    def _by_jacobian(self, each: Pass, side: Samples, block: slice, report: Report) -> Factors:
        first, last = each.outputs[0], min(each.outputs[1], self.count)
        count = block.stop - block.start
        planned = [self.plan.contributions[index] for index in each.contributions]
        names = tuple(name for one in planned for name in one.parameters)
        stores = {name: Store(count) for name in names}
        for tile in blocks(count, each.tile):
            there = slice(block.start + tile.start, block.start + tile.stop)
            report(tile.start / count)
            own = take(side.inputs, there)
            like = next(iter(self.module.parameters.values()))
            rows = jacobian_rows(self.module, names, own, side.combinations.taken(slice(first, last), there, like))
            for name in names:
                stores[name].put(tile, rows[name])
        factors: list[tuple[str, Factor]] = []
        for one in planned:
            for name in one.parameters:
                found = stores[name].whole
                piece = found if self.trace else found.transpose(0, 1).contiguous()
                factors.append((one.layer, RowsFactor([piece], trace=self.trace)))
        return factors


def _steps(rows: int, columns: int | None) -> int:
    """Count how often a pass collects or multiplies factors, for blocks of rows and columns (None: the same)."""
    return rows * (rows + 1) if columns is None else rows + 2 * rows * columns
