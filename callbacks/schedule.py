"""When to measure: every so many steps, or as often as a share of the wall time allows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException


@dataclass
class Schedule:
    """Decides which optimizer steps are measured. The first and the last step are always measured and not decided here.

    Args:
        every_n_steps: measure when the step is a multiple of it; None: go by the time budget.
        max_overhead: share of wall time since the first measurement that measurements may take, the next one predicted
            to cost what the last one did. The first one, which is always taken, is not held against the budget.
    """

    every_n_steps: int | None
    max_overhead: float
    _start: float = field(default=0.0, repr=False)
    _spent: float = field(default=0.0, repr=False)
    _last_cost: float | None = field(default=None, repr=False)
    _last_step: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise MisconfigurationException(
                f"every_n_steps: {self.every_n_steps}; need 1 or more, or None to go by max_overhead"
            )
        if not 0 < self.max_overhead <= 1:
            raise MisconfigurationException(f"max_overhead: {self.max_overhead}; need a share of wall time in (0, 1]")

    def begin(self) -> None:
        """Start the clock."""
        self._start, self._spent, self._last_cost, self._last_step = time.monotonic(), 0.0, None, None

    def paid(self, step: int, seconds: float) -> None:
        """Note what measuring at ``step`` cost; callbacks that share the schedule add up."""
        if self._last_cost is None:
            self._last_cost, self._last_step = seconds, step
            return
        same = step == self._last_step
        first = self._spent == 0.0 and same
        self._last_cost, self._last_step = (self._last_cost if same else 0.0) + seconds, step
        if not first:
            self._spent += seconds

    def due(self, step: int) -> bool:
        """Whether to measure after ``step`` optimizer steps."""
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        if self._last_cost is None:
            return True
        return self._spent + self._last_cost <= self.max_overhead * (time.monotonic() - self._start)
