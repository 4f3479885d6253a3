"""When phase 1 ends: at a step, at a share of the run, or where the training loss has come to rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_conv.callbacks.guard.settings import GuardSettings

ENDLESS_WINDOW = 100  # batches in a window of the training loss, where an epoch has no known number of them


@dataclass
class Plateau:
    r"""The rule of ``ReduceLROnPlateau`` on means of the training loss: has the loss come to rest?

    The loss is averaged over windows of as many batches as an epoch has, in which every sample counts once and the noise of the
    mini-batches cancels. A window is *better* if its mean is below :math:`\text{best} - \epsilon |\text{best}|`, where best is
    the least mean so far. The loss has come to rest after ``patience`` windows in a row that were not better. Windows with a
    mean that is not finite do not count.

    After a failed attempt the rule waits 1, 2, 4, ... windows before it is due again.

    Args:
        window: Number of batches that are averaged.
        threshold: epsilon, the relative improvement that counts.
        patience: Number of windows without an improvement.
    """

    window: int
    threshold: float
    patience: int
    total: float = 0.0  # sum of the losses in the window that is not full yet
    count: int = 0  # number of these losses
    best: float | None = None  # None: no window is full yet
    stale: int = 0  # windows since the last better one
    tries: int = 0  # failed attempts
    resting: int = 0  # windows to wait before the next attempt
    pending: list[Tensor] = field(default_factory=list)  # losses of this window, left on their device

    def observe(self, loss: Tensor) -> None:
        """Take in the loss of one batch.

        Args:
            loss: Mean over the batches of all ranks.
        """
        self.pending.append(loss.detach())
        if self.count + len(self.pending) >= self.window:
            self.settle()
            self._close(self.total / self.count)

    def settle(self) -> None:
        """Add up the pending losses."""
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
        """Whether the loss has come to rest and the last failed attempt is long enough ago."""
        return self.stale >= self.patience and self.resting == 0

    def failed(self) -> None:
        """Note a failed attempt: wait before the next one, twice as long as before this one."""
        self.resting = 2**self.tries
        self.tries += 1

    def as_plain(self) -> dict[str, Any]:
        """Return all fields but ``pending``, as plain numbers."""
        self.settle()
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "pending"}


def switch_step(switch_at: int | float, total: float) -> int:
    """Return the step after which phase 1 ends. A share of the run leaves at least one step for phase 2.

    Args:
        switch_at: A number of steps (int), or a share in (0, 1).
        total: Number of steps of the run, finite if ``switch_at`` is a share.
    """
    if isinstance(switch_at, int):
        return switch_at
    return min(math.ceil(switch_at * total), max(int(total) - 1, 0))


def plan_switch(
    settings: GuardSettings, plateau: Plateau | None, total: float, batches: float
) -> tuple[Plateau | None, int | None]:
    """Decide when phase 1 is to end.

    Args:
        settings: Settings of the guard.
        plateau: What the rule of ``switch_at="auto"`` remembers of an earlier part of the run; kept under the present settings.
        total: Number of optimizer steps of the run, infinite where it is not known.
        batches: Number of batches in an epoch.

    Returns:
        The rule of ``switch_at="auto"``, else None; and the step after which phase 1 ends at the latest, None if it is not known.

    Raises:
        MisconfigurationException: ``switch_at`` is a share of an endless run.
    """
    known, at = 1 <= total < math.inf, settings.switch_at
    if at == "auto":
        window = settings.plateau_window or (int(batches) if math.isfinite(batches) else ENDLESS_WINDOW)
        rule = Plateau(window, settings.plateau_threshold, settings.plateau_patience)
        if plateau is not None:
            rule = replace(plateau, window=rule.window, threshold=rule.threshold, patience=rule.patience)
        return rule, switch_step(settings.latest_switch, total) if known else None
    if isinstance(at, float) and not known:
        raise MisconfigurationException(
            f"switch_at: {at} is a share of the run, but its length is not known; set max_epochs or max_steps, or pass a "
            "number of optimizer steps"
        )
    step = switch_step(at, total)
    if step >= total:
        rank_zero_warn(f"switch_at: step {step} is not before the run's last, {total}; nothing will be certified")
    return None, step
