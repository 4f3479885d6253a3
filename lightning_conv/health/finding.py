"""``Finding``: one sentence about a run with its number, its limit and what to do; the order of findings and the worst level."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from lightning_conv.arguments import described, require_type
from lightning_conv.health.wording import page_of
from lightning_conv.reporting.json_values import json_values

Level: TypeAlias = Literal["ok", "notice", "warning", "alert"]

LEVELS: tuple[Level, ...] = get_args(Level)
"""From the mildest to the most severe: ``notice``: worth knowing, and usual in runs that end well. ``warning``: the run is held
back by what was measured. ``alert``: it cannot go on well as it is."""

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is known about a run, in words.

    Attributes:
        name: In small letters and digits joined by ``_``, so that ``health/<name>`` is a tag.
        level: How severe it is, one of ``LEVELS``.
        sentence: What was measured, with the limit and since when; ends with a full stop.
        value: The number of the sentence; NaN: there is none.
        lower: Lower end of what it may truly be.
        upper: Upper end; with ``lower`` equal to the value where it is exact.
        limit: What it was held against; NaN: nothing.
        step: Step of the measurement; None: it does not belong to a step.
        advice: What to do; empty where the measurement supports none.
        page: Page of the documentation, with the section; empty: that of the name, see ``page_of``.
    """

    name: str
    level: Level
    sentence: str
    value: float = math.nan
    lower: float = math.nan
    upper: float = math.nan
    limit: float = math.nan
    step: int | None = None
    advice: str = ""
    page: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "sentence", "advice", "page"):
            require_type(name, getattr(self, name), str, "a text")
        for name in ("value", "lower", "upper", "limit"):
            require_type(name, getattr(self, name), Real, "a number, or NaN for none")
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r}; need small letters and digits joined by _")
        if self.level not in LEVELS:
            raise ValueError(f"level: {self.level!r}; need one of {', '.join(LEVELS)}")
        for name in ("sentence", "advice"):
            text = getattr(self, name)
            if (text or name == "sentence") and (not text.endswith(".") or text != text.strip() or "\n" in text):
                raise ValueError(f"{name}: {text!r}; need one line that ends with a full stop")
        if self.step is not None and not (isinstance(self.step, int) and self.step >= 0):
            raise ValueError(f"step: {described(self.step)}; need a whole number of 0 or more, or None")
        if self.lower > self.value or self.value > self.upper or self.lower > self.upper:
            raise ValueError(
                f"lower, value, upper: {self.lower}, {self.value}, {self.upper}; need them in ascending order"
            )
        if not self.page:
            object.__setattr__(self, "page", page_of(self.name))

    @classmethod
    def exact(
        cls,
        *,
        name: str,
        level: Level,
        sentence: str,
        value: float,
        limit: float = math.nan,
        step: int | None = None,
        advice: str = "",
    ) -> Finding:
        """Return a finding whose value is exact: both of its ends are the value.

        Args:
            name: Its name; this and the others are the fields of the class.
            level: How severe it is.
            sentence: What was measured.
            value: The number, which is no estimate.
            limit: What it was held against; NaN: nothing.
            step: Step of the measurement; None: it does not belong to a step.
            advice: What to do.
        """
        return cls(
            name=name,
            level=level,
            sentence=sentence,
            value=value,
            lower=value,
            upper=value,
            limit=limit,
            step=step,
            advice=advice,
        )

    @property
    def severity(self) -> int:
        """Return 0 for ``ok``, up to 3 for ``alert``."""
        return LEVELS.index(self.level)

    def to_json(self) -> dict[str, Any]:
        """Return the fields in the types of JSON; numbers that are not finite become None."""
        content: dict[str, Any] = json_values({each.name: getattr(self, each.name) for each in fields(self)})
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Finding:
        """Return what ``to_json`` wrote; numbers that were not finite are NaN now."""
        numbers = {"value", "lower", "upper", "limit"}
        known: dict[str, Any] = {
            name: math.nan if name in numbers and value is None else value for name, value in content.items()
        }
        return cls(**known)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with the most severe ones first; among equals their order stays."""
    return sorted(findings, key=lambda each: -each.severity)


def worst_level(findings: Iterable[Finding]) -> Level:
    """Return the most severe level; ``ok`` if there is no finding."""
    return LEVELS[max((each.severity for each in findings), default=0)]
