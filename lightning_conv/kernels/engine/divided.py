"""Divide the passes of a plan among processes: by outputs, whose kernels are added up, or by samples, whose factors travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_conv.kernels.engine.factors import Factor
from lightning_conv.kernels.engine.passes import Engine
from lightning_conv.kernels.engine.samples import Samples
from lightning_conv.kernels.planning.passes import Pass
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.combinations import Combinations
from lightning_conv.machine.memory import blocks
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.progress import Report, part, silent

Factors = list[tuple[str, Factor]]
"""With the names of their layers."""


class Divided(Engine):
    """Base of the engines that share the work of a kernel with other processes.

    Args:
        task: See ``Engine``; the same in all processes.
        rows: See ``Engine``.
        columns: See ``Engine``.
        report: See ``Engine``.
        processes: Those among which it is divided.
    """

    def __init__(
        self, task: Task, rows: Combinations, columns: Combinations, report: Report, processes: Processes
    ) -> None:
        super().__init__(task, rows, columns, report)
        self._processes = processes

    @property
    def _matrices(self) -> list[Tensor]:
        """The matrices that the passes fill: those of the layers, where they are asked for, which are added up later."""
        return list(self.layer_matrices.values()) or [self.matrix]

    def _add_traces(self) -> None:
        """Add up the traces of the layers over the processes."""
        found = self._processes.gather(self.layer_traces)
        self.layer_traces = {layer: sum(each[layer] for each in found) for layer in self.layer_traces}


class OutputsDivided(Divided):
    """Gives every process some of the outputs of a kernel that is summed over them, and adds up their matrices.

    Each process takes all samples through the network, and as many backward passes as it has outputs. The floor is that of the parts, and
    of adding them up.
    """

    def _run_all(self, passes: Sequence[Pass]) -> None:
        mine = self._processes.share(self.count)
        own = []
        for each in passes:
            first, last = max(each.outputs[0], mine.start), min(each.outputs[1], mine.stop, self.count)
            own += [replace(each, outputs=(first, last))] if first < last else []
        self._processes.together(partial(super()._run_all, own))

    def _collect_parts(self) -> None:
        for matrix in self._matrices:
            self._processes.add(matrix)
        floors, sizes, additions = zip(*self._processes.gather((self.floor, self._size, self._additions)), strict=True)
        self.floor, self._size = sum(floors), sum(sizes)
        self._additions = max(additions) + self._processes.world  # the sums of the parts are added, too
        self._add_traces()


class SamplesDivided(Divided):
    r"""Gives every process some of the samples: it computes their factors once, and products with the factors that others send.

    With W processes of a symmetric kernel, process r multiplies its factors with its own and with those of processes r + 1, ..., r + W / 2
    (modulo W), so that each pair of shares is multiplied once. For even W both processes of the last pair multiply half of it. Where the
    factors of a share do not fit into the plan's memory, nothing travels: each process forms the blocks of its pairs by itself.

    Cost: a share of all passes and products, and the bytes of a share's factors sent to W / 2 others (W - 1 for two sets of samples).
    """

    def __init__(
        self, task: Task, rows: Combinations, columns: Combinations, report: Report, processes: Processes
    ) -> None:
        super().__init__(task, rows, columns, report, processes)
        self._filled: dict[tuple[int, int, int, int], None] = {}  # the blocks of the matrix that this process computes

    def _run(self, each: Pass, report: Report) -> None:
        processes = self._processes
        largest = max(-(-side.count // processes.world) for side in (self.rows, self.columns))
        if each.rows < largest:
            self._run_pairs(each, report)
            return
        mine = processes.share(self.rows.count)
        left = processes.together(lambda: self._collect(each, self.rows, mine, part(report, 0.0, 0.5)))
        own = left if self.symmetric else self._share_of_columns(each)
        sizes: dict[int, float] = {}
        others: dict[int, float] = {}

        def within() -> None:
            self._note(mine, processes.share(self.columns.count))
            for index, ((layer, one), (_, other)) in enumerate(zip(left, own, strict=True)):
                theirs = processes.share(self.columns.count)
                diagonal = self._add(layer, one, other, mine, theirs)
                sizes[index] = self._size_of(one, self.rows, mine, diagonal)
                if not self.symmetric:
                    others[index] = self._size_of(other, self.columns, theirs)

        processes.together(within)
        for distance in range(1, processes.world // 2 + 1 if self.symmetric else processes.world):
            report(0.5 + 0.5 * distance / processes.world)
            self._multiply_with(left, own, distance)
        gammas = [one.gamma(self.plan.precision) for _, one in left]
        found = processes.gather((gammas, sizes, others))
        self._bound(
            [max(each[0][index] for each in found) for index in range(len(left))],
            {index: sum(each[1][index] for each in found) for index in sizes},
            {index: sum(each[2 if others else 1][index] for each in found) for index in sizes},
        )

    def _share_of_columns(self, each: Pass) -> Factors:
        theirs = self._processes.share(self.columns.count)
        return self._processes.together(lambda: self._collect(each, self.columns, theirs, silent))

    def _multiply_with(self, left: Factors, own: Factors, distance: int) -> None:
        """Multiply the factors of this process with those of the one that is so many places behind it."""
        processes = self._processes
        world, rank = processes.world, processes.rank
        source, to = (rank + distance) % world, (rank - distance) % world
        mine, theirs = processes.share(self.rows.count), processes.share(self.columns.count, source)
        received = self._received(own, self.columns, to, source)
        twice = self.symmetric and 2 * distance == world  # the other one has this pair, too
        lower = processes.share(self.rows.count, min(rank, source))
        middle = (lower.start + lower.stop) // 2

        def multiply() -> None:
            for (layer, one), other in zip(left, received, strict=True):
                rows, columns = mine, theirs
                if twice and rank < source:
                    rows, one = slice(lower.start, middle), one.part(slice(0, middle - lower.start))
                elif twice:
                    rest = slice(middle - lower.start, lower.stop - lower.start)
                    columns, other = slice(middle, lower.stop), other.part(rest)
                if rows.start < rows.stop and columns.start < columns.stop:
                    one.add_gram(other, self._target(layer, rows, columns), self.plan.precision)

        processes.together(multiply)

    def _target(self, layer: str, rows: slice, columns: slice) -> Tensor:
        """Return where the products of these samples belong: on or above the diagonal of a symmetric kernel."""
        whole = self.layer_matrices.get(layer, self.matrix)
        below = self.symmetric and columns.start < rows.start
        block = self._note(columns, rows) if below else self._note(rows, columns)
        return whole[block].T if below else whole[block]

    def _note(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Note that this process computes the products of these samples, and return their block of the matrix."""
        first, second = (slice(each.start * self.stride, each.stop * self.stride) for each in (rows, columns))
        self._filled[first.start, first.stop, second.start, second.stop] = None
        return first, second

    def _received(self, own: Factors, side: Samples, to: int, source: int) -> list[Factor]:
        """Send the factors of this process to one, and return those that another one sends."""
        processes = self._processes
        share = processes.share(side.count, source)
        outgoing: list[Tensor] = []
        shapes: list[list[int]] = []
        for _, one in own:
            for tensor in one.tensors():
                shape = list(tensor.shape)
                shape[one.sample_axis] = share.stop - share.start
                outgoing.append(tensor)
                shapes.append(shape)
        found: Iterator[Tensor] = iter(processes.exchange(outgoing, to, source, shapes))
        return [one.of_tensors([next(found) for _ in one.tensors()]) for _, one in own]

    def _run_pairs(self, each: Pass, report: Report) -> None:
        """Multiply blocks of samples that are formed again for each pair, as a single process does, each by one of the processes."""
        processes = self._processes
        rows, columns = (blocks(side.count, each.rows) for side in (self.rows, self.columns))
        sizes: dict[int, float] = {}
        others: dict[int, float] = {}
        gammas: list[float] = []

        def run() -> None:
            number = 0
            for first, mine in enumerate(rows):
                report(first / len(rows))
                left: Factors = []
                for second, theirs in enumerate(columns):
                    if self.symmetric and second < first:
                        continue
                    number += 1
                    if number % processes.world != processes.rank:
                        continue
                    left = left or self._collect(each, self.rows, mine, silent)
                    is_own = self.symmetric and second == first
                    self._note(mine, theirs)
                    right = left if is_own else self._collect(each, self.columns, theirs, silent)
                    for index, ((layer, one), (_, other)) in enumerate(zip(left, right, strict=True)):
                        diagonal = self._add(layer, one, other, mine, theirs)
                        if is_own or (not self.symmetric and second == 0):
                            sizes[index] = sizes.get(index, 0.0) + self._size_of(one, self.rows, mine, diagonal)
                        if not self.symmetric and first == 0:
                            others[index] = others.get(index, 0.0) + self._size_of(other, self.columns, theirs)
                if left:
                    gammas[:] = [one.gamma(self.plan.precision) for _, one in left]

        processes.together(run)
        found = processes.gather((gammas, sizes, others))
        numbers = range(max(len(own) for own, _, _ in found))
        of_rows = {k: sum(own.get(k, 0.0) for _, own, _ in found) for k in numbers}
        of_columns = {k: sum(own.get(k, 0.0) for _, _, own in found) for k in numbers}
        largest = [max(own[k] for own, _, _ in found if own) for k in numbers]
        self._bound(largest, of_rows, of_rows if self.symmetric else of_columns)

    def _collect_parts(self) -> None:
        processes = self._processes
        filled = processes.gather(list(self._filled))
        for matrix in self._matrices:
            mine = [matrix[a:b, c:d].flatten() for a, b, c, d in self._filled]
            found = processes.gather_numbers(torch.cat(mine) if mine else matrix.new_empty(0))
            for rank, (blocks_of_one, numbers) in enumerate(zip(filled, found, strict=True)):
                parts = iter(torch.split(numbers, [(b - a) * (d - c) for a, b, c, d in blocks_of_one]))
                for a, b, c, d in blocks_of_one if rank != processes.rank else ():
                    matrix[a:b, c:d] = next(parts).view(b - a, d - c)
        self._add_traces()
