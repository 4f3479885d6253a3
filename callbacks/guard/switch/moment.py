"""When phase 1 ends: at a step, at a share of the run, or where the training loss has come to rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Plateau:
    r"""Whether a loss has come to rest, after the rule of ``ReduceLROnPlateau`` on means of the training loss.

    The loss is averaged over windows of as many batches as an epoch has, in which every sample counts once and the noise of the
    mini-batches cancels. A window is *better* if its mean is below :math:`\text{best} - \epsilon |\text{best}|`, where best is
    the least mean so far. The loss has come to rest after ``patience`` windows in a row that were not better. Windows with a
    mean that is not finite do not count.

    After a try that failed the rule waits 1, 2, 4, ... windows before it is due again.

    Args:
        window: batches.
        threshold: epsilon, the relative improvement that counts.
        patience: windows.
    """

    window: int
    threshold: float
    patience: int
    total: float = 0.0  # of the losses in the window that is not full yet
    count: int = 0
    best: float | None = None  # None: no window is full yet
    stale: int = 0  # windows since one was better
    tries: int = 0  # that failed
    resting: int = 0  # windows to wait before the next try
    pending: list[Tensor] = field(default_factory=list)  # losses of this window, left on their device

    def observe(self, loss: Tensor) -> None:
        """Take in the loss of one batch: the mean over the batches of all ranks."""
        self.pending.append(loss.detach())
        if self.count + len(self.pending) >= self.window:
            self.settle()
            self._close(self.total / self.count)

    def settle(self) -> None:
        """Add up what is pending."""
        for loss in self.pending:
            self.total += float(loss)
        self.count += len(self.pending)
        self.pending = []

    def _close(self, mean: float) -> None:
        self.total, self.count = 0.0, 0
        if not math.isfinite(mean):
            return
        self.resting = max(self.resting - 1, 0)
        if self.best is None or mean < self.best - self.threshold * abs(self.best):
            self.best, self.stale = mean, 0
        else:
            self.stale += 1

    @property
    def reached(self) -> bool:
        """Whether the loss has come to rest, and the last failed try is long enough ago."""
        return self.stale >= self.patience and self.resting == 0

    def failed(self) -> None:
        """Wait before the next try, twice as long as before this one."""
        self.resting = 2**self.tries
        self.tries += 1

    def as_plain(self) -> dict[str, Any]:
        """Numbers only."""
        self.settle()
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "pending"}


def switch_step(switch_at: int | float, total: float) -> int:
    """The step after which phase 1 ends, of a run of ``total`` steps; a share leaves at least one step for phase 2.

    Args:
        switch_at: a number of steps (int), or a share in (0, 1).
        total: steps of the run, finite if a share is asked for.
    """
    if isinstance(switch_at, int):
        return switch_at
    return min(math.ceil(switch_at * total), max(int(total) - 1, 0))
