"""``Schedule``: when to measure, every n steps or as often as a share of the wall time allows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from numbers import Integral, Real

from lightning.fabric.utilities.exceptions import MisconfigurationException

FIRST_SECONDS = 1.2
"""Seconds of the first measurement, finding the network included, that no later one has to make up for."""

FIRST_COUNTED = 1.2
"""Seconds of the first measurement that count where a measurement beyond the third is to be made."""

SECONDS_OF_A_STEP = 5e-5
"""Seconds that the hooks of the callbacks take in every step: 30 to 60 microseconds on one core of a server (Xeon, 2026)."""

LATER_BESIDE = 0.5
"""Of what the first measurement takes beside its kernel, what a later one does: data and network are looked at once."""

SHORT_RUN_SECONDS = 1.6
"""Seconds that all of measuring may take in a run that is too short for its share: a measurement at the end is made within them. Its
figures, whose time is not predicted, take the rest of the two seconds that are promised."""


@dataclass
class Schedule:
    r"""Decides which optimizer steps are measured. The first and the last step are measured beside what is decided here.

    With s the share, t the seconds since the first measurement began, f what that one has cost, c the cost of all later ones and h that of
    the hooks in every step, what may be spent is :math:`\max(s\,t - h, s\,t / 3) - c - \max(0, f - 1.2\,\mathrm{s})`. So a run of 20 s or
    more with s = 0.03 has at most 1.2 s + 0.03 t for its measurements, as long as f is within them, and the last one. That one is provided
    for from the third measurement on, and one beyond the third is made only where all together stay within twice the share. Where f is
    more, one in the midst of the run and the last one are still made if each takes at most a third of the share, or if all together stay
    within three times the share: a run has three measurements if that is possible.

    Args:
        every_n_steps: measure when the step is a multiple of it; None: go by the time budget.
        max_overhead: share of the wall time since the first measurement that all later ones may take.
    """

    every_n_steps: int | None
    max_overhead: float
    _start: float = field(default=0.0, repr=False)
    _first_step: int = field(default=0, repr=False)
    _first: float = field(default=0.0, repr=False)  # seconds of the first measurement
    _spent: float = field(default=0.0, repr=False)  # of the later ones
    _kernel: float = field(default=0.0, repr=False)  # of the next kernel
    _beside: float = field(
        default=0.0, repr=False
    )  # of what was done beside the kernel at the last step that was measured
    _step: int = field(default=-1, repr=False)  # that one
    _later: int = field(default=0, repr=False)  # number of later ones

    def __post_init__(self) -> None:
        n, share = self.every_n_steps, self.max_overhead
        if n is not None and (not isinstance(n, Integral) or isinstance(n, bool) or n < 1):
            raise MisconfigurationException(
                f"every_n_steps: {n!r}; need a whole number of 1 or more, or None to go by max_overhead"
            )
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share <= 1:
            raise MisconfigurationException(f"max_overhead: {share!r}; need a share of wall time in (0, 1]")

    def begin(self, step: int) -> None:
        """Start the clock at the step of the first measurement, before it."""
        self._start, self._first_step, self._step = time.monotonic(), step, step
        self._first = self._spent = self._kernel = self._beside = 0.0
        self._later = 0

    def expect(self, seconds: float) -> None:
        """Set the expected cost of the next kernel."""
        self._kernel = seconds

    def back_off(self, failures: int) -> None:
        """Wait longer after failures: the next measurement is taken to cost twice as much for each of them.

        Args:
            failures: Number of measurements that have failed.
        """
        self._kernel = max(self._kernel, 1e-3) * 2.0 ** min(failures, 20)

    def spend(self, step: int, seconds: float) -> None:
        """Add what measuring at ``step`` has cost; the costs of callbacks that share the schedule add up."""
        if step == self._first_step:
            self._first += seconds
        else:
            self._spent += seconds

    def note(self, step: int, beside: float) -> None:
        """Note what a measurement at ``step`` took beside the kernel, as the next one will; those of several callbacks add up."""
        if step != self._step:
            self._beside, self._step = 0.0, step
            self._later += 1
        self._beside += beside if self._later else LATER_BESIDE * beside

    @property
    def cost(self) -> float:
        """Expected seconds of the next measurement."""
        return self._kernel + self._beside

    @property
    def first_seconds(self) -> float:
        """Seconds of the first measurement, of all callbacks that share the schedule."""
        return self._first

    @property
    def seconds(self) -> float:
        """Seconds of all measurements of this fit, of all callbacks that share the schedule."""
        return self._first + self._spent

    @property
    def elapsed(self) -> float:
        """Seconds since the first measurement began."""
        return time.monotonic() - self._start

    def left(self, step: int) -> float:
        """Return the seconds that measuring may take now.

        Args:
            step: Optimizer steps done.
        """
        share = self.max_overhead * self.elapsed
        return max(share - self._hooks(step), share / 3) - self._taken

    def _hooks(self, step: int) -> float:
        """Return the seconds that the hooks have taken."""
        return SECONDS_OF_A_STEP * max(0, step - self._first_step)

    @property
    def _taken(self) -> float:
        """Seconds that measuring has to make up for."""
        return self._spent + max(0.0, self._first - FIRST_SECONDS)

    def due(self, step: int) -> bool:
        """Return whether to measure after ``step`` optimizer steps."""
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        within = 2 * self.max_overhead * self.elapsed
        if self._later and min(self._first, FIRST_COUNTED) + self._spent + self._wanted > within:
            return False
        in_the_midst = not self._later and (self._is_cheap(self.cost) or self._are_few(2 * self.cost))
        return self._wanted <= self.left(step) or in_the_midst

    @property
    def _wanted(self) -> float:
        """Seconds that must be left for the next measurement: from the third one on, that at the end is provided for."""
        return (2 if self._later else 1) * self.cost

    def rests_until(self, step: int) -> float:
        """Return a moment (``time.monotonic``) before which ``due`` is False at this step and all later ones; 0 where the steps decide.

        Args:
            step: Optimizer steps done.
        """
        if self.every_n_steps is not None:
            return 0.0
        needed = self._wanted + self._taken
        seconds = min(needed + self._hooks(step), 3 * needed)
        if not self._later:
            seconds = min(seconds, 3 * self.cost, (self._first + self._spent + 2 * self.cost) / 3)
        return self._start + seconds / self.max_overhead

    def _is_cheap(self, seconds: float) -> bool:
        """Return whether a measurement takes so little of the run that one in its midst and one at its end do not matter."""
        return seconds <= self.max_overhead / 3 * self.elapsed

    def _are_few(self, seconds: float) -> bool:
        """Return whether all measurements, with these seconds more, stay within three times the share of the run."""
        return self._first + self._spent + seconds <= 3 * self.max_overhead * self.elapsed

    def allows_beside(self, seconds: float, step: int) -> bool:
        """Return whether a part of this measurement that could be left out leaves time for the first three measurements.

        Args:
            seconds: What it takes.
            step: Optimizer steps done.
        """
        if self.every_n_steps is not None:
            return True
        if step == self._first_step:
            return self._first + seconds <= FIRST_SECONDS
        within = max(SHORT_RUN_SECONDS, 3 * self.max_overhead * self.elapsed)
        rest = (3 - self._later) * self.cost  # of this measurement, and those that follow up to the third one
        return rest <= 0 or self._first + self._spent + seconds + rest <= within

    def allows_last(self, step: int) -> bool:
        """Return whether the last step is measured: also where it was provided for when one in the midst of the run was.

        Args:
            step: Optimizer steps done.
        """
        return self.allows(self.cost, step) or (self._later == 1 and self._are_few(self.cost))

    def allows_at_end(self, seconds: float, step: int) -> bool:
        """Return whether what is done after the last measurement may take so long: with all hooks and measurements up to twice the share.

        Args:
            seconds: What it takes.
            step: Optimizer steps done.
        """
        within = max(SHORT_RUN_SECONDS, 2 * self.max_overhead * self.elapsed)
        spent = self._first + self._spent + self._hooks(step) + seconds
        return self.every_n_steps is not None or spent <= within

    def allows(self, seconds: float, step: int) -> bool:
        """Return whether a measurement may be made beside those that are due.

        Args:
            seconds: What it takes.
            step: Optimizer steps done.
        """
        spent = self._first + self._spent + seconds
        within = max(SHORT_RUN_SECONDS, 2 * self.max_overhead * self.elapsed)
        return (
            self.every_n_steps is not None or seconds <= self.left(step) or spent <= within or self._is_cheap(seconds)
        )
