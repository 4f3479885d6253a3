"""``progress_of``: whether the training loss has fallen since the start by more than it scatters from batch to batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 16
"""Losses at the start, and at the end, that are compared."""

FEWEST = 64
"""Optimizer steps before anything is said."""

LEAST = 0.01
"""Share of the loss at the start below which a fall is none, however little the losses scatter."""


@dataclass(frozen=True)
class Progress:
    """The training losses at both ends of a run.

    Attributes:
        start: The larger one of the first loss and of the median of the first ``WINDOW``.
        now: Median of the last ``WINDOW``.
        scatter: Standard deviation of these.
        step: Step of the last one.
    """

    start: float
    now: float
    scatter: float
    step: int

    @property
    def has_fallen(self) -> bool:
        """Whether the loss has fallen by more than it scatters, and by ``LEAST``."""
        return self.start - self.now > max(self.scatter, LEAST * abs(self.start))


def progress_of(first: Sequence[float], last: Sequence[float], step: int) -> Progress | None:
    """Return the losses at both ends; None: there are too few, or one is not finite.

    Args:
        first: The first ``WINDOW`` losses of the batches.
        last: The last ``WINDOW``.
        step: Optimizer steps done.
    """
    enough = len(first) >= WINDOW and len(last) >= WINDOW and step >= FEWEST
    if not enough or not all(map(math.isfinite, (*first, *last))):
        return None
    start = max(first[0], statistics.median(first))
    return Progress(start, statistics.median(last), statistics.stdev(last), step)
