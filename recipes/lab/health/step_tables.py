"""The tables and checks of the study of steps: the risk by ratio, the causes, false alarms, advised rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from lightning_conv.health.finding import LEVELS
from lightning_conv.health.wording import percent
from lightning_conv.recipes.lab.health.judged_run import JudgedRun, cause_said
from lightning_conv.recipes.lab.health.kept_results import grouped
from lightning_conv.recipes.lab.report import Check
from lightning_conv.recipes.lab.shares import Share

Told: TypeAlias = Literal["right", "wrong", "open", "nothing", "rose before"]
Rows: TypeAlias = list[dict[str, Any]]

SOURCE = "docs/health.md"
EDGES = (0.25, 0.5, 0.8, 1.2, 2.0, 4.0)
"""Between the bins of the ratio after some steps."""

ENOUGH = 20
"""Runs from which on a goal has to be met; with fewer it is an observation."""

TOLD, FALSE, WELL = 0.95, 0.05, 0.9
"""Goals: share of told causes that are right at least, share of false alerts at most, of advised rates that end well at least."""


def risk_by_start(runs: Sequence[JudgedRun]) -> Rows:
    """Return the share of bad ends by the ratio at the start, a row for each loss and optimizer.

    Args:
        runs: Runs that were left alone.
    """
    ratios = sorted({each.run.ratio for each in runs})
    return [
        {"loss": loss, "optimizer": optimizer}
        | {f"ratio {ratio:g}": _bad(each for each in some if each.run.ratio == ratio).words for ratio in ratios}
        for (loss, optimizer), some in grouped(runs, lambda each: (each.run.loss, each.run.optimizer)).items()
    ]


def risk_by_ratio(runs: Sequence[JudgedRun], step: int) -> Rows:
    """Return the share of bad ends by the ratio that was measured after some steps.

    Args:
        runs: Runs that were left alone; those that had ended before are left out.
        step: Step of the measurement.
    """

    def place(run: JudgedRun) -> int | None:
        ratio = run.ratio_at(step)
        return None if ratio is None else sum(ratio > edge for edge in EDGES)

    names = [f"up to {EDGES[0]:g}", *(f"to {edge:g}" for edge in EDGES[1:]), f"above {EDGES[-1]:g}"]
    return [
        {"loss": loss, "optimizer": optimizer}
        | {name: _bad(each for each in some if place(each) == number).words for number, name in enumerate(names)}
        for (loss, optimizer), some in grouped(runs, lambda each: (each.run.loss, each.run.optimizer)).items()
    ]


def told(run: JudgedRun) -> Told:
    """Return whether the cause of a rise was told.

    A wrong cause at any measurement counts as wrong; "open" says that neither is known. A run whose loss had risen before something was
    done to it is not judged. That a batch with a NaN is named counts as right.

    Args:
        run: The run.
    """
    said = [(step, cause) for step, found in run.findings if (cause := cause_said(found)) is not None]
    if run.run.cause != "none" and any(step <= run.run.at for step, _ in said):
        return "rose before"
    causes = {cause for _, cause in said}
    by_step = run.run.cause in ("none", "rate raised")
    right, wrong = ("the step", "not the step") if by_step else ("not the step", "the step")
    if wrong in causes:
        return "wrong"
    if right in causes or (run.record.input_not_finite and not by_step):
        return "right"
    return "open" if causes else "nothing"


def causes(runs: Sequence[JudgedRun]) -> Rows:
    """Return what was told of the causes, a row for each.

    Args:
        runs: All runs.
    """
    rows = []
    for cause, some in grouped(runs, lambda each: each.run.cause).items():
        answers = [told(each) for each in some]
        known = [each == "right" for each in answers if each in ("right", "wrong")]
        rows.append(
            {"done to the run": "nothing, and its loss rose" if cause == "none" else cause}
            | {"right, of those told": Share.among(known).words}
            | {name: answers.count(name) for name in ("right", "wrong", "open", "nothing", "rose before")}
        )
    return rows


def check_causes(runs: Sequence[JudgedRun]) -> list[Check]:
    """Return the checks of the causes: of all that were told, and of runs with and without something done to them.

    Args:
        runs: All runs.
    """
    checks = []
    for what, some in (
        ("in all runs", runs),
        ("where the step is the cause", [each for each in runs if each.run.cause in ("none", "rate raised")]),
        ("where data, labels or numbers are", [each for each in runs if each.run.cause not in ("none", "rate raised")]),
    ):
        answers = [told(each) for each in some]
        known = Share.among(each == "right" for each in answers if each in ("right", "wrong"))
        silent = f"; open in {answers.count('open')}, nothing said in {answers.count('nothing')}"
        claim = f"a cause that is told is right, {what}: at least {percent(TOLD)}"
        met = known.of > 0 and known.value >= TOLD
        checks.append(Check(claim, SOURCE, met, known.words + silent, must=known.of >= ENOUGH))
    return checks


def alarms(runs: Sequence[JudgedRun]) -> Rows:
    """Return how often an alarm was false, and how many bad ends it found, for the findings and the baselines.

    Args:
        runs: Runs that were left alone.
    """
    groups = grouped(runs, lambda each: (each.run.network, each.run.loss, each.run.optimizer))
    rows = []
    for (network, loss, optimizer), some in groups.items():
        rows.append(
            {"network": network, "loss": loss, "optimizer": optimizer}
            | {name: _false(some, alarm).words for name, alarm in ALARMS.items()}
        )
    everything = {"network": "all", "loss": "all", "optimizer": "all"}
    return [*rows, everything | {name: _false(runs, alarm).words for name, alarm in ALARMS.items()}]


def hits(runs: Sequence[JudgedRun]) -> Rows:
    """Return which share of the bad ends each alarm found.

    Args:
        runs: Runs that were left alone.
    """
    groups = grouped(runs, lambda each: (each.run.loss, each.run.optimizer))
    rows = [({"loss": loss, "optimizer": optimizer}, some) for (loss, optimizer), some in groups.items()]
    rows.append(({"loss": "all", "optimizer": "all"}, list(runs)))
    return [
        names | {name: Share.among(alarm(each) for each in some if each.lost).words for name, alarm in ALARMS.items()}
        for names, some in rows
    ]


def check_alarms(runs: Sequence[JudgedRun]) -> list[Check]:
    """Return the checks of false alerts.

    Args:
        runs: Runs that were left alone.
    """
    ours, *baselines = ALARMS
    found = {name: _false(runs, ALARMS[name]) for name in ALARMS}
    seen = "; ".join(f"{name}: {found[name].words}" for name in (ours, *baselines))
    claim = f"{ours} in runs that end well: at most {percent(FALSE)}"
    met = found[ours].of > 0 and found[ours].value <= FALSE
    return [Check(claim, SOURCE, met, seen, must=found[ours].of >= ENOUGH)]


def advice(runs: Sequence[tuple[JudgedRun, JudgedRun]]) -> tuple[Rows, list[Check]]:
    """Return how runs with the advised rate ended, from the same start, and the check of it.

    Args:
        runs: A run in which a rate was advised, and the same with that rate.
    """
    groups = grouped(runs, lambda each: (each[0].run.loss, each[0].run.optimizer))
    rows: Rows = [
        {
            "loss": loss,
            "optimizer": optimizer,
            "ended well": Share.among(not then.ended_badly for _, then in some).words,
            "of the rate": _span([then.record.rate / before.record.rate for before, then in some]),
        }
        for (loss, optimizer), some in groups.items()
    ]
    well = Share.among(not then.ended_badly for _, then in runs)
    claim = f"a run with the advised rate ends well: at least {percent(WELL)}"
    met = well.of > 0 and well.value >= WELL
    return rows, [Check(claim, SOURCE, met, well.words, must=well.of >= ENOUGH)]


def _alert(run: JudgedRun) -> bool:
    return run.worst("stability") >= LEVELS.index("alert")


def _warning(run: JudgedRun) -> bool:
    return max(run.worst("stability"), run.worst("loss_rise")) >= LEVELS.index("warning")


ALARMS: dict[str, Callable[[JudgedRun], bool]] = {
    "alert": _alert,
    "warning or alert": _warning,
    "loss of the probe three times its minimum": lambda run: run.loss_spiked,
    "gradient norm ten times its median": lambda run: run.norm_spiked,
}
"""The findings, and the baselines."""


def _bad(runs: Iterable[JudgedRun]) -> Share:
    return Share.among(each.ended_badly for each in runs)


def _false(runs: Iterable[JudgedRun], alarm: Callable[[JudgedRun], bool]) -> Share:
    return Share.among(alarm(each) for each in runs if not each.lost)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}"
