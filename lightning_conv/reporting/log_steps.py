"""``LogSteps``: rows of numbers at steps that are evenly spaced on a logarithmic scale, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 32
"""Steps that are kept."""


class LogSteps:
    """Keeps the first and the last row and, of those between them, at most ``most`` in all.

    Where there are more, the one goes whose neighbours are the closest on the scale of log(1 + steps since the first), so that what is left
    is dense in the early steps, where most happens, and reaches over the whole run. Rows have one length; another length begins anew.

    Args:
        most: Rows that are kept, at least 3.

    Raises:
        ValueError: ``most`` is smaller.

    Cost: 8 bytes per number in memory and in checkpoints.
    """

    def __init__(self, most: int = MOST) -> None:
        if most < 3:
            raise ValueError(f"most: {most}; need 3 or more, the two ends and one between them")
        self.most = most
        self._steps: list[int] = []
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> list[int]:
        """The steps, in ascending order."""
        return list(self._steps)

    @property
    def rows(self) -> Tensor:
        """The rows, (number of steps, length of a row), float64; NaN: a number is not known."""
        return torch.stack(self._rows) if self._rows else torch.zeros(0, 0, dtype=torch.float64)

    def note(self, step: int, row: Sequence[float] | Tensor) -> None:
        """Add a row; what is known of the same step and of later ones goes, since a run that is resumed goes on from there.

        Args:
            step: Its step.
            row: The numbers; infinities are kept as they are.
        """
        new = torch.as_tensor(row, dtype=torch.float64).detach().flatten().cpu().clone()
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._rows.pop()
        if self._rows and len(self._rows[-1]) != len(new):
            self._steps, self._rows = [], []
        self._steps.append(step)
        self._rows.append(new)
        if len(self._steps) > self.most:
            places = [math.log1p(each - self._steps[0]) for each in self._steps]
            gone = min(range(1, len(places) - 1), key=lambda at: places[at + 1] - places[at - 1])
            del self._steps[gone], self._rows[gone]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors."""
        return {"steps": list(self._steps), "rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an empty state empties it."""
        self._steps = [int(step) for step in state.get("steps", ())]
        self._rows = list(state["rows"].unbind()) if self._steps else []
