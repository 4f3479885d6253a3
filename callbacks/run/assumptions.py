"""``Breach``: a hypothesis of the theorems that a run does not fulfil, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Hypothesis: TypeAlias = Literal[
    "descent", "unclipped", "full batch", "whole set", "no BatchNorm", "no dropout", "fixed data", "known loss", "squared loss",
    "attained infimum", "smooth",
]  # fmt: skip

EVERYWHERE: frozenset[Hypothesis] = frozenset(
    {"descent", "unclipped", "no BatchNorm", "no dropout", "fixed data", "known loss"}
)
"""What every theorem about gradient descent here asks for."""


@dataclass(frozen=True)
class Breach:
    """A hypothesis that does not hold in this run, and why."""

    hypothesis: Hypothesis
    reason: str


def breached(breaches: Iterable[Breach], asked: Iterable[Hypothesis]) -> str:
    """The reasons why a theorem that asks for these hypotheses does not apply; empty if it does."""
    wanted = set(asked)
    return "; ".join(dict.fromkeys(each.reason for each in breaches if each.hypothesis in wanted))
