"""Passes of a plan, and how the work of a kernel is cut into passes whose factors fit into the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_conv.kernels.planning.costs import Contribution, Problem
from lightning_conv.kernels.planning.sizes import FORWARD_TARGET
from lightning_conv.machine.memory import mebibytes

COPIES = 3
"""Copies of its rows that torch.func takes while it forms them (measured: up to 2.6 where it batches by itself)."""


@dataclass(frozen=True)
class Pass:
    """One run over the samples, for some of the contributions; their factors are in memory at the same time."""

    contributions: tuple[int, ...]  # indices into the contributions of the plan
    outputs: tuple[int, int]  # range of the outputs (or projections) that it covers
    rows: int  # samples whose factors are in memory at once; if fewer than n, blocks of them are taken in pairs
    tile: int  # samples that go through the network together
    bytes: int  # taken by its factors, and by torch.func while it forms them
    general: bool  # whether the rows are formed by torch.func rather than by layer rules


@dataclass(frozen=True)
class Cutter:
    """Cuts the contributions of one kind (layer rules or torch.func) into passes, in the cheapest way that fits.

    It tries in turn: the outputs of a trace (one more forward for each piece), the layers (one more forward and
    backward pass for each piece), and blocks of samples (the number of passes grows with the number of blocks).

    Args:
        found: all contributions of the kernel.
        problem: the sizes of the kernel.
        budget: bytes for the factors of a pass.
        general: whether torch.func forms the contributions.
        tile: number of samples that go through the network together, where layer rules form the contributions.
        working: bytes that torch.func takes for one sample beside the rows that it forms.
    """

    found: Sequence[Contribution]
    problem: Problem
    budget: int
    general: bool
    tile: int
    working: int

    def cut(self, indices: Sequence[int]) -> list[Pass]:
        """Return passes that cover the contributions ``indices``.

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
        """Return groups of consecutive layers that fit into memory together."""
        groups: list[list[int]] = [[]]
        for index in indices:
            if groups[-1] and not self._fits([*groups[-1], index], self.problem.outputs):
                groups.append([])
            groups[-1].append(index)
        return groups

    def _whole_or_blocks(self, group: Sequence[int]) -> Pass:
        """Return a pass over all samples at once or, where they do not fit, in blocks of which two fit."""
        total = self.problem.outputs
        if self._fits(group, total):
            return self._pass(group, (0, total), self.problem.rows)
        each = self._kept(group, total)
        rows = (self.budget - self._forming(group, total)) // (2 * each)
        if rows < 1:
            layer = self.found[group[0]]
            raise MemoryError(
                f"max_memory: layer {layer.layer} ({layer.way}) keeps {mebibytes(each)} per sample, and two samples must fit into "
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
        """Return the bytes of one sample's factors.

        Rows of torch.func that are reordered (outputs first) exist twice.
        """
        copies = 2 if self.general and not self.problem.trace else 1
        return copies * sum(self.found[k].kept_bytes(outputs) for k in group)

    def _forming(self, group: Sequence[int], outputs: int) -> int:
        """Return the bytes that torch.func takes while it forms rows.

        For layer rules the result is zero, since their bytes are counted once for all passes.
        """
        if not self.general:
            return 0
        each = self._kept(group, outputs)
        return self._formed_at_once(each, self.problem.rows) * (self.working + COPIES * each)

    def _formed_at_once(self, kept: int, rows: int) -> int:
        """Return the number of samples whose rows torch.func forms at once."""
        target = min(FORWARD_TARGET, self.budget // 4)
        return max(1, min(rows, target // max(1, self.working + COPIES * kept)))

    def _fits(self, group: Sequence[int], outputs: int) -> bool:
        return self.problem.rows * self._kept(group, outputs) + self._forming(group, outputs) <= self.budget
