"""``PaidParts``: the costly parts of a measurement, which are left out where the run cannot afford them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning_conv.callbacks.run.guarded import Failures, guarded

PASSES: Mapping[str, int] = {
    "stability": 60,
    "forecast": 40,
    "gradient_noise": 25,
    "critical_sharpness": 15,
    "linearisation_error": 15,
    "watched_step": 20,
}
"""Forward and backward passes of the probe that each costly part takes, roughly, before it is known."""

Made = TypeVar("Made")


class PaidParts:
    """Follows what the parts of a measurement take.

    Attributes:
        failures: Parts that ended in an error.
        undecided: What could not be judged, and why.
    """

    def __init__(self) -> None:
        self.failures = Failures()
        self.undecided: dict[str, str] = {}
        self._seconds: dict[str, float] = {}  # what a part took the last time
        self._spent: dict[str, float] = {}  # and so far

    @property
    def spent(self) -> float:
        """Return the seconds that the costly parts took so far."""
        return sum(self._spent.values())

    def ahead(self, name: str) -> float:
        """Return how many seconds more than all others together a part took so far.

        Args:
            name: Its name.
        """
        return 2 * self._spent.get(name, 0.0) - self.spent

    def look(self, step: int, what: str, look: Callable[[], Any]) -> Any:
        """Look at a part that costs little; an error in it is a warning.

        Args:
            step: Optimizer steps done.
            what: It, in words.
            look: Does it.
        """
        made = None
        with guarded(step, f"ConvergenceHealth: {what} could not be looked at", failures=self.failures):
            made = look()
        return made

    def afford(
        self,
        name: str,
        step: int,
        affords: Callable[[float], bool],
        look: Callable[[], Made],
        *,
        pass_seconds: float = 0.0,
        seconds: float | None = None,
    ) -> Made | None:
        """Look at a costly part, if it is affordable; that it is not is noted.

        Args:
            name: Its name, as a key of ``undecided``.
            step: Optimizer steps done.
            affords: Whether a part may take so many seconds now.
            look: Does it.
            pass_seconds: Seconds of a forward and a backward pass of the probe, by which ``PASSES`` is counted.
            seconds: What it takes this time; None: what it took the last time, or ``PASSES``.
        """
        expected = self._seconds.get(name, PASSES.get(name, 0) * pass_seconds) if seconds is None else seconds
        self.undecided.pop(name, None)
        if not affords(expected):
            when = "not again after an earlier measurement: " if name in self._seconds else ""
            self.undecided[name] = f"{when}a look takes longer than the run allows for; every_n_steps= asks for it"
            return None
        begun = time.perf_counter()
        made: Made | None = self.look(step, f"the {name.replace('_', ' ')}", look)
        self._seconds[name] = time.perf_counter() - begun
        self._spent[name] = self._spent.get(name, 0.0) + self._seconds[name]
        return made
