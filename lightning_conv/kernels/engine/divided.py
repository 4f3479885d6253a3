"""Divide the passes of a plan among processes: by outputs, whose kernels are added up, or by samples, whose factors travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lightning_conv.kernels.engine.factors import Factor
from lightning_conv.kernels.engine.formed_factor import FormedFactor
from lightning_conv.kernels.engine.passes import Engine, Factors
from lightning_conv.kernels.planning.passes import Pass
from lightning_conv.kernels.planning.sizes import MIRRORED
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.combinations import Combinations
from lightning_conv.machine.memory import blocks
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.progress import Report, part, silent


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

    def _add_traces(self, found: Sequence[Mapping[str, float]]) -> None:
        """Add up the traces of the layers over the processes."""
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
        mine = (self.floor, self._size, self._additions, self.layer_traces)
        floors, sizes, additions, traces = zip(*self._processes.gather(mine), strict=True)
        self.floor, self._size = sum(floors), sum(sizes)
        self._additions = max(additions) + self._processes.world  # the sums of the parts are added, too
        self._add_traces(traces)


class SamplesDivided(Divided):
    r"""Gives every process some of the samples: it computes their factors once, and products with the factors that others send.

    With W processes of a symmetric kernel, process r multiplies its factors with its own and with those of processes r + 1, ..., r + W / 2
    (modulo W), so that each pair of shares is multiplied once. For even W both processes of the last pair multiply half of it. Gradients
    that are formed late are formed by output channels: each process gets the layer's inputs of all samples and the output gradients of its
    channels, and the matrices are added up. Where the factors of a share do not fit into the plan's memory, nothing travels: each process
    forms the blocks of its pairs by itself.

    Cost: a share of all passes and products, and the bytes of a share's factors sent to W / 2 others (W - 1 for two sets of samples).
    """

    def __init__(
        self, task: Task, rows: Combinations, columns: Combinations, report: Report, processes: Processes
    ) -> None:
        super().__init__(task, rows, columns, report, processes)
        self._filled: dict[tuple[int, int, int, int], None] = {}  # the blocks of the matrix that this process computes
        self._summed = False  # whether processes have parts of the same entries

    def _run(self, each: Pass, report: Report) -> None:
        processes = self._processes
        largest = max(-(-side.count // processes.world) for side in (self.rows, self.columns))
        if each.rows < largest:
            self._run_pairs(each, report)
            return
        mine = processes.share(self.rows.count)
        left = processes.together(lambda: self._collect(each, self.rows, mine, part(report, 0.0, 0.5)))
        own = left if self.symmetric else self._share_of_columns(each)
        formed = self._formed(left) if self.symmetric and each.rows >= self.rows.count else {}
        pairs = [(left[index], own[index]) for index in range(len(left)) if index not in formed]
        sizes: dict[int, float] = {}
        others: dict[int, float] = {}

        def within() -> None:
            everything = slice(0, self.rows.count)
            self._note(mine, processes.share(self.columns.count))
            for index, ((layer, one), (_, other)) in enumerate(zip(left, own, strict=True)):
                if index in formed:
                    if (whole := formed[index]) is not None:
                        diagonal = self._add(layer, whole, whole, everything, everything)
                        sizes[index] = self._size_of(whole, self.rows, everything, diagonal)
                    continue
                theirs = processes.share(self.columns.count)
                diagonal = self._add(layer, one, other, mine, theirs)
                sizes[index] = self._size_of(one, self.rows, mine, diagonal)
                if not self.symmetric:
                    others[index] = self._size_of(other, self.columns, theirs)

        for distance in range(1, processes.world // 2 + 1 if self.symmetric else processes.world):
            report(0.5 + 0.5 * distance / processes.world)
            received = self._received([theirs for _, theirs in pairs], distance)
            before = within if distance == 1 else None
            multiply = partial(self._multiply_with, [one for one, _ in pairs], received, distance, before)
            processes.together(multiply)
        used = [formed.get(index, one) for index, (_, one) in enumerate(left)]
        gammas = [0.0 if one is None else one.gamma(self.plan.precision) for one in used]
        found = processes.gather((gammas, sizes, others))
        numbers = range(len(left))
        of_rows = {k: sum(rows.get(k, 0.0) for _, rows, _ in found) for k in numbers}
        of_columns = {k: sum(columns.get(k, 0.0) for _, _, columns in found) for k in numbers} if others else of_rows
        self._bound([max(of[k] for of, _, _ in found) for k in numbers], of_rows, of_columns)

    def _formed(self, left: Factors) -> dict[int, FormedFactor | None]:
        """Return, for each factor whose gradients are formed late, that of all samples and a share of the output channels.

        Each process forms gradients of these channels only; by pairs of samples all would be formed in each. The products of all
        processes are added up. None: there are fewer channels than processes.
        """
        processes = self._processes
        found = {index: one for index, (_, one) in enumerate(left) if isinstance(one, FormedFactor)}
        if not found:
            return {}
        self._summed = True
        world, rank = processes.world, processes.rank
        parts = {index: {rank: one.of_channels(processes.share(one.channels))} for index, one in found.items()}
        for distance in range(1, world):
            source, to = (rank + distance) % world, (rank - distance) % world
            share = processes.share(self.rows.count, source)
            outgoing = [each for one in found.values() for each in one.of_channels(processes.share(one.channels, to))]
            mine = [each for of in parts.values() for each in of[rank]]
            shapes = [[share.stop - share.start, *each.shape[1:]] for each in mine]
            received = iter(processes.exchange(outgoing, to, source, shapes))
            for of in parts.values():
                of[source] = [next(received) for _ in of[rank]]
        return {
            index: one.joined([parts[index][k] for k in range(world)]) if parts[index][rank][-1].shape[-1] else None
            for index, one in found.items()
        }

    def _share_of_columns(self, each: Pass) -> Factors:
        theirs = self._processes.share(self.columns.count)
        return self._processes.together(lambda: self._collect(each, self.columns, theirs, silent))

    def _is_twice(self, distance: int) -> bool:
        """Return whether the process so many places behind has this one that many places behind it: each takes half of the pair."""
        return self.symmetric and 2 * distance == self._processes.world

    def _multiply_with(
        self, left: Factors, received: Sequence[Factor], distance: int, before: Callable[[], None] | None
    ) -> None:
        """Multiply the factors of this process with those of the one that is so many places behind it, after ``before``."""
        if before is not None:
            before()
        processes = self._processes
        source = (processes.rank + distance) % processes.world
        mine, theirs = processes.share(self.rows.count), processes.share(self.columns.count, source)
        if self._is_twice(distance):
            lower = min(processes.rank, source)
            middle = processes.share(self.rows.count, lower)
            middle = slice(middle.start + (middle.stop - middle.start) // 2, middle.stop)
            if lower == source:
                theirs = middle
            else:
                mine = slice(mine.start, middle.start)
                left = [(layer, one.part(slice(0, mine.stop - mine.start))) for layer, one in left]
        if mine.start < mine.stop and theirs.start < theirs.stop:
            for (layer, one), other in zip(left, received, strict=True):
                one.add_gram(other, self._target(layer, mine, theirs), self.plan.precision)

    def _target(self, layer: str, rows: slice, columns: slice) -> Tensor:
        """Return where the products of these samples belong: on or above the diagonal of a symmetric kernel."""
        whole = self.layer_matrices.get(layer, self.matrix)
        below = self.symmetric and columns.start < rows.start
        block = self._note(columns, rows) if below else self._note(rows, columns)
        return whole[block].T if below else whole[block]

    def _note(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Note that this process computes the products of these samples, and return their block of the matrix."""
        first, second = (slice(each.start * self.stride, each.stop * self.stride) for each in (rows, columns))
        if self.symmetric and first == second:  # what is below the diagonal is mirrored
            for strip in blocks(first.stop - first.start, MIRRORED):
                start, stop = first.start + strip.start, first.start + strip.stop
                self._filled[start, stop, start, first.stop] = None
        else:
            self._filled[first.start, first.stop, second.start, second.stop] = None
        return first, second

    def _received(self, own: Factors, distance: int) -> list[Factor]:
        """Send the factors of this process to one, and return those of the one that is so many places behind this one."""
        processes = self._processes
        world, rank, count = processes.world, processes.rank, self.columns.count
        source, to = (rank + distance) % world, (rank - distance) % world
        share, mine = processes.share(count, source), processes.share(count)
        theirs = share.stop - share.start
        if self._is_twice(distance):  # of the lower rank the second half is enough
            half = (mine.stop - mine.start) // 2
            if rank < source:
                own = [(layer, one.part(slice(half, one.samples))) for layer, one in own]
            else:
                theirs -= theirs // 2
        outgoing = [one.tensors() for _, one in own]
        shapes: list[list[int]] = []
        for (_, one), tensors in zip(own, outgoing, strict=True):
            for tensor in tensors:
                shape = list(tensor.shape)
                shape[one.sample_axis] = theirs
                shapes.append(shape)
        sent = [tensor for tensors in outgoing for tensor in tensors]
        found: Iterator[Tensor] = iter(processes.exchange(sent, to, source, shapes))
        return [one.of_tensors([next(found) for _ in tensors]) for (_, one), tensors in zip(own, outgoing, strict=True)]

    def _run_pairs(self, each: Pass, report: Report) -> None:
        """Multiply blocks of samples that are formed again for each pair, as a single process does, each by one of the processes."""
        processes = self._processes
        rows, columns = (blocks(side.count, each.rows) for side in (self.rows, self.columns))
        sizes: dict[int, float] = {}
        others: dict[int, float] = {}
        gammas: list[float] = []

        def run() -> None:
            number = 0
            left: Factors = []
            right: Factors = []
            for first, mine in enumerate(rows):
                report(first / len(rows))
                left, right = [], []  # two blocks are in memory at once: those before are freed first
                for second, theirs in enumerate(columns):
                    if self.symmetric and second < first:
                        continue
                    number += 1
                    if number % processes.world != processes.rank:
                        continue
                    left = left or self._collect(each, self.rows, mine, silent)
                    is_own, right = self.symmetric and second == first, []
                    self._note(mine, theirs)
                    right = left if is_own else self._collect(each, self.columns, theirs, silent)
                    diagonals = self._multiply(left, right, mine, theirs, silent)
                    if is_own or (not self.symmetric and second == 0):
                        self._count(sizes, left, self.rows, mine, diagonals)
                    if not self.symmetric and first == 0:
                        self._count(others, right, self.columns, theirs)
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
        filled, traces = zip(*self._processes.gather((list(self._filled), self.layer_traces)), strict=True)
        for matrix in self._matrices:
            if self._summed:
                self._processes.add(matrix)
            else:
                self._processes.share_blocks(matrix, filled)
        self._additions += self._processes.world if self._summed else 0
        self._add_traces(traces)
