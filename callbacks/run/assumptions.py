"""``Violation``: an assumption of the theorems that a run does not meet, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lightning_conv.theory.criterion import Criterion

Assumption: TypeAlias = Literal[
    "descent",
    "unclipped",
    "full batch",
    "whole set",
    "no BatchNorm",
    "no dropout",
    "fixed data",
    "known loss",
    "squared loss",
    "attained infimum",
    "smooth",
]

EVERYWHERE: frozenset[Assumption] = frozenset(
    {"descent", "unclipped", "no BatchNorm", "no dropout", "fixed data", "known loss"}
)
"""The assumptions that all theorems about gradient descent share here."""

Hypothesis = Assumption  # its former name


@dataclass(frozen=True)
class Violation:
    """An assumption that is violated in this run, and why."""

    assumption: Assumption
    reason: str

    @property
    def hypothesis(self) -> Assumption:
        """Former name of ``assumption``."""
        return self.assumption


Breach = Violation  # its former name


def violated(violations: Iterable[Violation], assumed: Iterable[Assumption]) -> str:
    """Return the reasons why a theorem with these assumptions does not apply; empty if it does."""
    wanted = set(assumed)
    return "; ".join(dict.fromkeys(each.reason for each in violations if each.assumption in wanted))


def without_verdict(criterion: Criterion, reason: str) -> Criterion:
    """Return the criterion as ``not applicable``: the measured number stays, the bound has no meaning."""
    return replace(criterion, bound=math.nan, verdict="not applicable", reason=reason)


def on_the_probe(criterion: Criterion, what: str = "", *, whole_set: bool) -> Criterion:
    """Turn ``certified`` into ``consistent`` where the probe is a part of the training set.

    Args:
        criterion: about the samples of the probe.
        what: name of the number that it is about, if that is smaller, or equal, on a larger set.
        whole_set: whether the probe holds the whole training set.
    """
    if whole_set or criterion.verdict != "certified":
        return criterion
    where = (
        f"; on the probe, whose {what} is an upper bound of the training set's"
        if what
        else "; on the probe's samples only"
    )
    return replace(criterion, verdict="consistent", reason=criterion.reason + where)
