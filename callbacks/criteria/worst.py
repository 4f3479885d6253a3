"""``Worst``: of an inequality that a theorem asks for at every step, the measurement that speaks most against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from lightning_conv.theory.criterion import Criterion, Verdict

Side: TypeAlias = Literal["least", "greatest"]

_WEIGHT: dict[Verdict, int] = {"refuted": 3, "undecided": 2, "consistent": 1, "certified": 0, "not applicable": 0}


@dataclass(frozen=True)
class _Seen:
    criterion: Criterion
    step: int


class Worst:
    """Keeps one criterion a name.

    Args:
        sides: name -> which numbers are bad ones: those of a criterion ``at_least`` are worst where they are ``"least"``.
    """

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self._sides = dict(sides)
        self._kept: dict[str, _Seen] = {}

    def note(self, criteria: Sequence[Criterion], step: int) -> None:
        """Keep those that are worse than what was kept: by verdict first, as errors differ, then by the number."""
        for each in criteria:
            kept = self._kept.get(each.name)
            if kept is None or self._badness(each) > self._badness(kept.criterion):
                self._kept[each.name] = _Seen(each, step)

    def criteria(self) -> list[Criterion]:
        """What was kept; the reasons name the step."""
        return [worst_at(seen.criterion, seen.step) for seen in self._kept.values()]

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {name: {"criterion": asdict(seen.criterion), "step": seen.step} for name, seen in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._kept = {name: _Seen(Criterion(**kept["criterion"]), int(kept["step"])) for name, kept in state.items()}

    def _badness(self, criterion: Criterion) -> tuple[int, float]:
        # A bound may change with the step size: by how much of it is used.
        share = criterion.measured / criterion.bound if criterion.bound > 0 else criterion.measured
        number = share if self._sides[criterion.name] == "greatest" else -share
        return _WEIGHT[criterion.verdict], -math.inf if math.isnan(number) else number


def worst_at(criterion: Criterion, step: int) -> Criterion:
    """The same, and the reason says at which step it was."""
    return replace(criterion, reason=f"{criterion.reason} (the worst, at step {step})")
