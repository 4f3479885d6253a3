"""``Series``: the values of one quantity by step in bounded memory, thinned so that its peaks stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

MOST = 2000
"""Points that a series keeps."""

POINTS = 40_000
"""Points of all series that are written together, on a page or in a file: it stays well under 2 MB."""

FEWEST = 24
"""Points of each of them at least."""

DIGITS = 6
"""Significant digits of a value that is written."""


def points_each(number: int) -> int:
    """Return how many points each of several series may have where they are written together.

    Args:
        number: How many they are.
    """
    return min(MOST, max(FEWEST, POINTS // max(1, number)))


def numbers_of(values: Iterable[float]) -> list[float | None]:
    """Return values with ``DIGITS`` significant digits, as JSON has them; one that is missing is None.

    Args:
        values: The values.
    """
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values]


class Series:
    """Values by step, in ascending order of the steps; a value that is not finite stands for one that is missing.

    Up to ``most`` points are kept as they come. Beyond that the steps are divided into intervals of equal length, and of each the smallest
    and the largest value are kept, so that a short peak is still there after a million steps. A missing value is kept where its interval
    has no other one.

    Args:
        most: Points that are kept, at least 4.

    Raises:
        ValueError: ``most`` is smaller.

    Cost: 16 bytes per point in a checkpoint; two microseconds per value.
    """

    def __init__(self, most: int = MOST) -> None:
        if most < 4:
            raise ValueError(f"most: {most}; need 4 or more, two for each end")
        self.most = most
        self.width = 1
        """Steps of an interval; 1: nothing was left out, except between the smallest and the largest of more than two values of a step."""
        self._steps: list[int] = []
        self._values: list[float] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> list[int]:
        """The steps, in ascending order; one may occur twice."""
        return list(self._steps)

    @property
    def values(self) -> list[float]:
        """The values; NaN: missing."""
        return list(self._values)

    @property
    def last(self) -> float:
        """The last value; NaN: there is none."""
        return self._values[-1] if self._values else math.nan

    def add(self, step: int, value: float) -> None:
        """Add a value, beside those that its step has already. One that lies behind later steps replaces these.

        Args:
            step: Its step.
            value: The value; what is not finite is missing.
        """
        if self._steps and step < self._steps[-1]:
            self.cut(step)
        self._steps.append(step)
        self._values.append(value if math.isfinite(value) else math.nan)
        self._thin_last()
        if len(self._steps) > self.most:
            self._widen()

    def put(self, step: int, value: float) -> None:
        """Set the value of a step in place of what is known of it and of all later ones: a run that is resumed goes on from there.

        Args:
            step: Its step.
            value: The value.
        """
        self.cut(step)
        self.add(step, value)

    def cut(self, step: int) -> None:
        """Forget a step and all later ones.

        Args:
            step: The first one that is forgotten.
        """
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._values.pop()

    def extend(self, points: Iterable[tuple[int, float]]) -> Series:
        """Add several values and return the series.

        Args:
            points: Steps and values.
        """
        for step, value in points:
            self.add(step, value)
        return self

    def thinned(self, most: int) -> Series:
        """Return a copy with at most so many points.

        Args:
            most: Points.
        """
        return Series(most).extend(zip(self._steps, self._values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors."""
        steps, values = torch.tensor(self._steps, dtype=torch.int64), torch.tensor(self._values, dtype=torch.float64)
        return {"most": self.most, "width": self.width, "steps": steps, "values": values}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Series:
        """Return the series of a ``state_dict``.

        Args:
            state: The state.
        """
        series = cls(state["most"])
        series.width = state["width"]
        series._steps, series._values = state["steps"].tolist(), state["values"].tolist()
        return series

    def joined(self, other: Series) -> Series:
        """Return the values of both series; at a step that both have, those of this one.

        Args:
            other: Values of the same quantity, such as those that a logger has left out as they had not changed.
        """
        mine = {*self._steps}
        more = [each for each in zip(other._steps, other._values, strict=True) if each[0] not in mine]
        both = [*zip(self._steps, self._values, strict=True), *more]
        return Series(max(self.most, other.most)).extend(sorted(both, key=lambda each: each[0])) if more else self

    def to_json(self, most: int) -> dict[str, list[Any]]:
        """Return steps and values with ``DIGITS`` significant digits, at most so many; a missing one is None.

        Args:
            most: Points.
        """
        kept = self.thinned(most)
        return {"steps": kept.steps, "values": numbers_of(kept._values)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Series:
        """Return the series of ``to_json``.

        Args:
            content: Steps and values.

        Raises:
            ValueError: There are not as many steps as values.
        """
        values = [math.nan if each is None else float(each) for each in content["values"]]
        return cls().extend(zip(map(int, content["steps"]), values, strict=True))

    def _thin_last(self) -> None:
        """Keep the extremes of the last interval."""
        interval = self._steps[-1] // self.width
        begin = len(self._steps) - 1
        while begin and self._steps[begin - 1] // self.width == interval:
            begin -= 1
        if len(self._steps) - begin < 2:
            return
        known = [at for at in range(begin, len(self._steps)) if not math.isnan(self._values[at])]
        if known:
            extremes = {min(known, key=self._values.__getitem__), max(known, key=self._values.__getitem__)}
        else:
            extremes = {begin}
        kept = sorted(extremes)
        steps, values = [self._steps[at] for at in kept], [self._values[at] for at in kept]
        self._steps[begin:], self._values[begin:] = steps, values

    def _widen(self) -> None:
        """Double the intervals until the points fit."""
        while len(self._steps) > self.most:
            self.width *= 2
            steps, values = self._steps, self._values
            self._steps, self._values = [], []
            for step, value in zip(steps, values, strict=True):
                self._steps.append(step)
                self._values.append(value)
                self._thin_last()
