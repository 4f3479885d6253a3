"""``AboveStart``: since when the loss of a run has not been below that of its start, and the finding that it is so for long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.wording import counted, figure

COUNT, STEPS, SHARE = 5, 40, 0.5
"""Measurements in a row, optimizer steps, and share of all steps so far, over which the loss was not below its start when that counts as
lasting. Chosen on runs with AdamW: none of 63 that ended well was named, and 8 of 9 that ended above their start."""


@dataclass(frozen=True)
class AboveStart:
    """The losses of the probe so far.

    Attributes:
        first: The first one.
        now: The last one.
        step: Its step.
        begun: Step of the first one.
        since: First step from which on none was below the first one; None: the last one is.
        count: Number of losses since then.
    """

    first: float
    now: float
    step: int
    begun: int
    since: int | None = None
    count: int = 0

    @classmethod
    def begin(cls, step: int, loss: float) -> AboveStart:
        """Return what is known after the first loss."""
        return cls(loss, loss, step, step)

    def then(self, step: int, loss: float) -> AboveStart:
        """Return what is known after one loss more.

        Raises:
            ValueError: The step is not later than the last one.
        """
        if step <= self.step:
            raise ValueError(f"step: {step}; need one after {self.step}")
        if loss < self.first:
            return replace(self, now=loss, step=step, since=None, count=0)
        since = step if self.since is None else self.since
        return replace(self, now=loss, step=step, since=since, count=self.count + 1)

    @property
    def lasts(self) -> bool:
        """Return whether the loss has not been below its start for so long that the run does not train."""
        if self.since is None or not 0 < self.first < math.inf:
            return False
        steps = self.step - self.since
        return self.count >= COUNT and steps >= STEPS and steps >= SHARE * (self.step - self.begun)


def finding_of_above_start(above: AboveStart, rise: Finding | None) -> Finding | None:
    """Say that the loss has not been below its start for long; None: it has.

    Args:
        above: The losses of the probe.
        rise: What is said of a rise whose cause is not the step; None: nothing.

    Returns:
        A ``warning``, or more if the rise was; its cause is as open as that of the rise.
    """
    if not above.lasts:
        return None
    times = above.now / above.first
    is_now = f"{figure(times)} times what it was at the start" if math.isfinite(times) else "not finite"
    says = (
        f"The loss of the probe is {is_now}, and in the last {counted(above.count, 'measurement')}, since step {above.since}, it was never "
        "below its start."
    )
    if rise is not None:
        level: Level = "alert" if rise.level == "alert" else "warning"
        return replace(rise, level=level, sentence=f"{rise.sentence} {says}")
    value = times if times < math.inf else math.inf  # NaN as well
    return Finding.exact(
        name="loss_rise",
        level="warning",
        sentence=says,
        value=value,
        limit=1.0,
        step=above.since,
    )
