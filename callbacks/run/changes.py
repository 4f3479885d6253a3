"""``Changes``: holds back values until they change, so that a tag that never does is no curve but one number."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """A value that has not changed.

    Attributes:
        value: The value.
        first: First step at which it was measured.
        last: Last one.
        sent: Whether the first measurement was passed on.
    """

    value: float
    first: int
    last: int
    sent: bool


class Changes:
    """Passes on the values of a run, those of a tag from its first change on, with what was held back until then.

    Args:
        at_once: Tags whose first value is passed on at once, as it is what is looked at first.
    """

    def __init__(self, at_once: Collection[str] = ()) -> None:
        self._at_once = at_once
        self._held: dict[str, Held] = {}
        self._varying: set[str] = set()

    def pass_on(self, values: Mapping[str, float], step: int) -> dict[int, dict[str, float]]:
        """Return what is to be logged now, by step in order: it may contain earlier values.

        Args:
            values: Finite values by tag.
            step: Their step.
        """
        found: dict[int, dict[str, float]] = {}
        for tag, value in values.items():
            for at, known in self._of(tag, value, step):
                found.setdefault(at, {})[tag] = known
        return dict(sorted(found.items()))

    def _of(self, tag: str, value: float, step: int) -> list[tuple[int, float]]:
        if tag in self._varying:
            return [(step, value)]
        held = self._held.get(tag)
        if held is None:
            sent = tag in self._at_once
            self._held[tag] = Held(value, step, step, sent)
            return [(step, value)] if sent else []
        if held.first == held.last == step:  # judged again
            self._held[tag] = Held(value, step, step, held.sent)
            return [(step, value)] if held.sent and value != held.value else []
        if value == held.value:
            self._held[tag] = Held(value, min(step, held.first), max(step, held.last), held.sent)
            return []
        del self._held[tag]
        self._varying.add(tag)
        before = [] if held.sent else [held.first]
        before += [held.last] if held.last > held.first else []
        return [*((at, held.value) for at in before if at < step), (step, value)]

    @property
    def constants(self) -> dict[str, float]:
        """What was measured more than once and was the same each time."""
        return {tag: each.value for tag, each in self._held.items() if each.last > each.first}

    def single(self) -> dict[int, dict[str, float]]:
        """Return what was measured once, and not passed on, by step."""
        found: dict[int, dict[str, float]] = {}
        for tag, each in self._held.items():
            if each.last == each.first and not each.sent:
                found.setdefault(each.first, {})[tag] = each.value
        return dict(sorted(found.items()))
