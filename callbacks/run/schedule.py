"""``Schedule``: when to measure, every n steps or as often as a share of the wall time allows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException


@dataclass
class Schedule:
    """Decides which optimizer steps are measured. The first and the last step are always measured and not decided here.

    Args:
        every_n_steps: measure when the step is a multiple of it; None: go by the time budget.
        max_overhead: share of the wall time since the first measurement that all later ones may take. The first one, which is
            always made, does not count.
    """

    every_n_steps: int | None
    max_overhead: float
    _start: float = field(default=0.0, repr=False)
    _first_step: int = field(default=0, repr=False)
    _spent: float = field(default=0.0, repr=False)
    _next_cost: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise MisconfigurationException(
                f"every_n_steps: {self.every_n_steps}; need 1 or more, or None to go by max_overhead"
            )
        if not 0 < self.max_overhead <= 1:
            raise MisconfigurationException(f"max_overhead: {self.max_overhead}; need a share of wall time in (0, 1]")

    def begin(self, step: int) -> None:
        """Start the clock at the step of the first measurement."""
        self._start, self._first_step, self._spent, self._next_cost = time.monotonic(), step, 0.0, 0.0

    def expect(self, seconds: float) -> None:
        """Set the expected cost of the next measurement."""
        self._next_cost = seconds

    def back_off(self, failures: int) -> None:
        """Wait longer after failures: the next measurement is taken to cost twice as much for each of them.

        Args:
            failures: Number of measurements that have failed.
        """
        self._next_cost = max(self._next_cost, 1e-3) * 2.0 ** min(failures, 20)

    def spend(self, step: int, seconds: float) -> None:
        """Add what measuring at ``step`` has cost; the costs of callbacks that share the schedule add up."""
        if step != self._first_step:
            self._spent += seconds

    def left(self) -> float:
        """Return the seconds that measuring may take now."""
        return self.max_overhead * (time.monotonic() - self._start) - self._spent

    def due(self, step: int) -> bool:
        """Return whether to measure after ``step`` optimizer steps."""
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        return self._next_cost <= self.left()
