"""Cut the work of a kernel into passes whose factors fit into a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_conv.kernels.plan import Pass
from lightning_conv.kernels.planning.costs import Contribution, Problem
from lightning_conv.kernels.planning.memory import mebibytes

FORWARD_TARGET = 512 * 2**20
"""Bytes that one tile of samples may take on its way through the network: more is not faster."""

COPIES = 3
"""Of the rows that torch.func forms, in the making (measured: up to 2.6 where it batches by itself)."""


@dataclass(frozen=True)
class Cutter:
    """Cuts contributions of one kind, the cheapest way first.

    Outputs of a trace (one more forward each), then layers (one more forward and backward pass each), then blocks of
    samples (passes in proportion to their number).

    Args:
        found: all contributions of the kernel.
        problem: its sizes.
        budget: bytes for the factors of a pass.
        general: whether the contributions are formed by torch.func.
        tile: samples that go through the network together, for the others.
        working: bytes that torch.func takes for one sample beside the rows that it forms.
    """

    found: Sequence[Contribution]
    problem: Problem
    budget: int
    general: bool
    tile: int
    working: int

    def cut(self, indices: Sequence[int]) -> list[Pass]:
        """Passes that cover the contributions ``indices``.

        Raises:
            MemoryError: not even two samples of one layer fit.
        """
        total = self.problem.outputs
        if self._fits(indices, total):
            return [self._pass(indices, (0, total), self.problem.rows)]
        if self.problem.trace:
            size = total
            while size > 1 and not self._fits(indices, size):
                size = (size + 1) // 2
            if self._fits(indices, size):
                starts = range(0, total, size)
                return [self._pass(indices, (k, min(k + size, total)), self.problem.rows) for k in starts]
        return [self._whole_or_blocks(group) for group in self._groups(indices)]

    def _groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Layers that fit together, in their order."""
        groups: list[list[int]] = [[]]
        for index in indices:
            if groups[-1] and not self._fits([*groups[-1], index], self.problem.outputs):
                groups.append([])
            groups[-1].append(index)
        return groups

    def _whole_or_blocks(self, group: Sequence[int]) -> Pass:
        """All samples at once, or as many as two blocks of them fit."""
        total = self.problem.outputs
        if self._fits(group, total):
            return self._pass(group, (0, total), self.problem.rows)
        each = self._kept(group, total)
        rows = (self.budget - self._forming(group, total)) // (2 * each)
        if rows < 1:
            layer = self.found[group[0]]
            raise MemoryError(
                f"max_memory: layer {layer.layer} ({layer.way}) keeps {mebibytes(each)} a sample, of which two must fit in "
                f"{mebibytes(self.budget)} beside {mebibytes(self._forming(group, total))} for forming one; allow "
                f"{mebibytes(4 * each)} more, use outputs='sum' or 'projected', or leave the layer out by parameters="
            )
        return self._pass(group, (0, total), min(rows, self.problem.rows))

    def _pass(self, group: Sequence[int], outputs: tuple[int, int], rows: int) -> Pass:
        count = outputs[1] - outputs[0]
        held = self._kept(group, count)
        blocks = 1 if rows == self.problem.rows else 2
        tile = self._formed_at_once(held, rows) if self.general else self.tile
        needed = blocks * rows * held + self._forming(group, count)
        return Pass(tuple(group), outputs, rows, tile, needed, self.general)

    def _kept(self, group: Sequence[int], outputs: int) -> int:
        """Bytes of one sample's factors; where torch.func's rows are put outputs first, they are there twice."""
        copies = 2 if self.general and not self.problem.trace else 1
        return copies * sum(self.found[k].kept_bytes(outputs) for k in group)

    def _forming(self, group: Sequence[int], outputs: int) -> int:
        """Bytes that torch.func takes while it forms rows; what the others take is counted once for all passes."""
        if not self.general:
            return 0
        each = self._kept(group, outputs)
        return self._formed_at_once(each, self.problem.rows) * (self.working + COPIES * each)

    def _formed_at_once(self, kept: int, rows: int) -> int:
        """Samples whose rows torch.func forms at once."""
        target = min(FORWARD_TARGET, self.budget // 4)
        return max(1, min(rows, target // max(1, self.working + COPIES * kept)))

    def _fits(self, group: Sequence[int], outputs: int) -> bool:
        return self.problem.rows * self._kept(group, outputs) + self._forming(group, outputs) <= self.budget
