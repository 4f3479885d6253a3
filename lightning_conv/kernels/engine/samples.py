"""``Samples``: one side of a kernel matrix; ``scale`` and ``mirror`` finish the matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_conv.kernels.planning.sizes import MIRRORED
from lightning_conv.kernels.products.combinations import Combinations
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.inputs import Inputs, sample_count


@dataclass(frozen=True)
class Samples:
    """The samples in the rows or in the columns of a kernel, with the combinations of their outputs."""

    inputs: Inputs
    combinations: Combinations

    @property
    def count(self) -> int:
        """Number of samples."""
        return sample_count(self.inputs)

    def scales(self, block: slice) -> Tensor | None:
        """Return ``Combinations.scales`` of a block of samples."""
        found = self.combinations.scales
        return None if found is None else found[block]


def scale(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Multiply entry (i, j) by ``rows[i]`` and ``columns[j]``, in place; None: ones."""
    if rows is not None and columns is not None:
        matrix.mul_(rows[:, None]).mul_(columns)


def mirror(matrix: Tensor) -> None:
    """Copy the upper triangle to the lower one in place, without a second matrix."""
    for rows in blocks(len(matrix), MIRRORED):
        corner = matrix[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
        for columns in blocks(len(matrix), MIRRORED):
            if columns.start > rows.start:
                matrix[columns, rows] = matrix[rows, columns].T
