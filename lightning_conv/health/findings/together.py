"""``told_together``: the findings of a run as they are told, without those that another one explains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lightning_conv.health.finding import Finding, in_order
from lightning_conv.health.findings.of_losses import finding_of_progress
from lightning_conv.health.findings.of_units import NotFinite, finding_of_not_finite
from lightning_conv.health.step.progress import Progress


def findings_of_finiteness(
    found: Sequence[Finding], first: NotFinite | None, progress: Progress | None, *, step: int | None
) -> list[Finding]:
    """Return the findings with whether all values were finite, and whether the loss has fallen.

    A rise whose cause is open is left out where the samples of that step were not finite, which is its cause.

    Args:
        found: The other findings.
        first: The first value that was not finite; None: all were.
        progress: The training losses at both ends; None: not known.
        step: Of the last loss that was seen; None: none was.
    """
    kept = list(found)
    if step is not None or first is not None:
        inputs = first is not None and first.kind == "input"
        kept.append(finding_of_not_finite(first, step=step or 0, inputs_checked=inputs))
        if first is not None and inputs and not first.skipped:
            kept = [each for each in kept if each.name != "loss_rise" or (each.step or 0) < first.step]
    rises = any(each.name in ("loss_rise", "not_finite") and each.level != "ok" for each in kept)
    low = None if progress is None or rises else finding_of_progress(progress)
    return kept if low is None else [*kept, low]


def told_together(found: Iterable[Finding], past: Mapping[str, Finding]) -> list[Finding]:
    """Return what is told of a run, the most severe first: what holds now, and alerts that held before.

    Args:
        found: What holds now.
        past: Alerts so far, by name; one that no longer holds is told as a notice, since it may be the cause of what is found now.
    """
    told = list(found)
    serious = {each.name for each in told if each.level in ("warning", "alert")}
    return in_order([*told, *(_earlier(each) for name, each in past.items() if name not in serious)])


def _earlier(alert: Finding) -> Finding:
    nothing = math.nan
    return replace(
        alert,
        level="notice",
        sentence=f"Earlier: {alert.sentence}",
        value=nothing,
        lower=nothing,
        upper=nothing,
        limit=nothing,
    )
