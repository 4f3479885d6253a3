"""``Worst``: for an inequality that a theorem requires at every step, the measurement that speaks most against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from lightning_conv.theory.criterion import Criterion, Verdict

Side: TypeAlias = Literal["least", "greatest"]

_SEVERITY: dict[Verdict, int] = {"refuted": 3, "undecided": 2, "consistent": 1, "certified": 0, "not applicable": 0}


@dataclass(frozen=True)
class _Seen:
    criterion: Criterion
    step: int


class Worst:
    """Keeps the worst criterion of each name.

    Args:
        sides: for each name, which measured values are bad: ``"least"`` for a criterion made by ``at_least``.
    """

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self._sides = dict(sides)
        self._kept: dict[str, _Seen] = {}

    def note(self, criteria: Sequence[Criterion], step: int) -> None:
        """Keep those that are worse than the ones kept so far: compare the severity of the verdicts, then the measured values."""
        for each in criteria:
            kept = self._kept.get(each.name)
            if kept is None or self._badness(each) > self._badness(kept.criterion):
                self._kept[each.name] = _Seen(each, step)

    def criteria(self) -> list[Criterion]:
        """Return the criteria that were kept; their reasons name the step."""
        return [worst_at(seen.criterion, seen.step) for seen in self._kept.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {name: {"criterion": asdict(seen.criterion), "step": seen.step} for name, seen in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._kept = {name: _Seen(Criterion(**kept["criterion"]), int(kept["step"])) for name, kept in state.items()}

    def _badness(self, criterion: Criterion) -> tuple[int, float]:
        # A bound may change with the step size, so the share of the bound that is used is compared.
        share = criterion.measured / criterion.bound if criterion.bound > 0 else criterion.measured
        number = share if self._sides[criterion.name] == "greatest" else -share
        return _SEVERITY[criterion.verdict], -math.inf if math.isnan(number) else number


def worst_at(criterion: Criterion, step: int) -> Criterion:
    """Return the criterion with the step at which it was worst added to its reason."""
    return replace(criterion, reason=f"{criterion.reason} (the worst, at step {step})")
