"""What the finding says of the audits of a study: how often there is a notice, and how many of the labels beyond its limit are wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_conv.health.findings.of_labels import FAR, finding_of_labels
from lightning_conv.recipes.lab.health.label_methods import KEPT, START, LabelScores
from lightning_conv.recipes.lab.health.label_sets import Flips, SetName
from lightning_conv.recipes.lab.report import Check

SOURCE = "docs/health.md"

SCORED: tuple[Flips, ...] = ("random", "confusable")
"""Flips after which some labels are wrong and the others right."""

RIGHT = 0.8
"""Share of the labels beyond the limit that have to be wrong where there is a notice."""


@dataclass(frozen=True)
class LabelRun:
    """One run of the study, with its wrong labels.

    Attributes:
        name: The data set.
        flips: How its labels were made wrong.
        seed: Of the samples, flips, weights and order.
        true: The labels before, (n,).
        wrong: Which of them were changed, (n,).
        found: What the methods say.
    """

    name: SetName
    flips: Flips
    seed: int
    true: Tensor
    wrong: Tensor
    found: LabelScores


def runs_of(runs: Iterable[LabelRun], name: SetName, flips: Flips) -> list[LabelRun]:
    """Return the runs of a data set with one kind of wrong labels.

    Args:
        runs: All runs.
        name: The data set.
        flips: The kind.
    """
    return [each for each in runs if (each.name, each.flips) == (name, flips)]


@dataclass(frozen=True)
class _Said:
    """What the finding says of one audit."""

    notice: bool
    named: int
    wrong: int
    corrected: int


def _said(each: LabelRun, moment: str, samples: int) -> _Said:
    audit = each.found.audits[moment, samples]
    far = audit.beyond(FAR)
    bad = far[each.wrong[far]]
    corrected = int((audit.suggested[bad] == each.true[bad]).sum())
    return _Said(finding_of_labels(audit).level == "notice", len(far), len(bad), corrected)


def _sizes(runs: Sequence[LabelRun]) -> list[int]:
    return sorted({size for each in runs for _, size in each.found.audits})


def said_rows(runs: Sequence[LabelRun], name: SetName, flips: Flips) -> list[dict[str, Any]]:
    """Return the rows of a table: what the finding says of these runs, by size and moment of the audit.

    Args:
        runs: All runs.
        name: The data set.
        flips: The kind of wrong labels.
    """
    rows = []
    for size in _sizes(runs):
        for moment in (START, KEPT):
            said = [_said(each, moment, size) for each in runs_of(runs, name, flips)]
            named, wrong = sum(each.named for each in said), sum(each.wrong for each in said)
            rows.append(
                {
                    "set": name,
                    "flips": flips,
                    "samples": size,
                    "moment": moment,
                    "notice": f"{sum(each.notice for each in said)} of {len(said)}",
                    "labels beyond the limit": named,
                    "of them wrong": wrong,
                    "of these with the true label suggested": sum(each.corrected for each in said),
                }
            )
    return rows


def checks_of_finding(runs: Sequence[LabelRun]) -> list[Check]:
    """Check that right and random labels give no notice, and that a notice names labels that are wrong.

    Args:
        runs: All runs.
    """
    said = [(each, _said(each, moment, size)) for each in runs for size in _sizes(runs) for moment in (START, KEPT)]
    checks = []
    for flips, what in (("none", "right labels"), ("all", "labels that are all random")):
        of = [found for each, found in said if each.flips == flips]
        false = sum(found.notice for found in of)
        checks.append(Check(f"{what}: there is no notice", SOURCE, not false, f"in {false} of {len(of)} audits"))
    of = [found for each, found in said if each.flips in SCORED and found.notice]
    named, wrong = sum(found.named for found in of), sum(found.wrong for found in of)
    rate = wrong / named if named else 1.0
    claim = f"where there is a notice, at least {100 * RIGHT:.0f} % of the labels beyond {FAR} are wrong"
    checks.append(Check(claim, SOURCE, rate >= RIGHT, f"{wrong} of {named}"))
    scored = [found for each, found in said if each.flips in SCORED]
    heard = sum(found.notice for found in scored)
    checks.append(
        Check(
            "wrong labels: there is a notice",
            SOURCE,
            heard == len(scored),
            f"in {heard} of {len(scored)} audits",
            must=False,
        )
    )
    return checks
