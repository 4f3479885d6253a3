"""`lightning-conv lab health_gallery`: runs with a known illness, and healthy ones, and what ``ConvergenceHealth`` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_conv.recipes.lab.health.case import GalleryCase
from lightning_conv.recipes.lab.health.healthy_runs import HEALTHY
from lightning_conv.recipes.lab.health.kept_results import KeptResults, grouped
from lightning_conv.recipes.lab.health.sick_runs import SICK
from lightning_conv.recipes.lab.health.training import CaseResult, train_case
from lightning_conv.recipes.lab.report import Check, Report

SMALL: dict[str, Any] = {"seeds": 1, "only": ["dead_layer", "fine_tuning"]}
"""Settings with which `run` takes seconds."""

SOURCE = "docs/health.md"
SECONDS = 4.0
"""Duration of a run, about."""


@dataclass(frozen=True)
class GalleryRun:
    """A case from one seed.

    Attributes:
        case: The case.
        seed: Seed of the data's choice, the weights and the order.
    """

    case: GalleryCase
    seed: int

    @property
    def key(self) -> str:
        """Return what tells it from all others."""
        return f"{self.case.name}/{self.seed}"


def run(*, seeds: int = 5, first_seed: int = 0, only: list[str] | None = None, keep: str | None = None) -> Report:
    """Train every run of the gallery from several seeds, and compare what is said of it with what has to be said.

    Cost: about 4 s a run on one core, 13 minutes with the default settings.

    Args:
        seeds: Number of seeds.
        first_seed: The first one.
        only: Names of runs; None: all.
        keep: File in which the outcome of every run is kept, one a line. What it holds already is not trained again; delete it when
            the code has changed. None: nothing is kept.

    Returns:
        A check for every run, and a table of the runs with an illness and one of the healthy ones.

    Raises:
        ValueError: There is no seed, a run has no such name, or ``keep`` is a file of something else.
    """
    if seeds < 1:
        raise ValueError(f"seeds: {seeds}; need 1 or more")
    cases = [each for each in (*SICK, *HEALTHY) if only is None or each.name in only]
    if unknown := set(only or ()) - {each.name for each in cases}:
        known = ", ".join(each.name for each in (*SICK, *HEALTHY))
        raise ValueError(f"only: there is no run {', '.join(sorted(unknown))}; choose from {known}")
    wanted = range(first_seed, first_seed + seeds)
    kept = KeptResults(None if keep is None else Path(keep))
    found = kept.results(
        [GalleryRun(case, seed) for case in cases for seed in wanted],
        lambda each: train_case(each.case, each.seed),
        write=CaseResult.to_json,
        read=CaseResult.from_json,
        title="the runs of the gallery",
        seconds=SECONDS,
    )
    results = grouped(found, lambda each: each.case)
    sick, healthy = ([each for each in cases if each.healthy == well] for well in (False, True))
    return Report(
        name="health_gallery",
        title="Runs with a known illness, and healthy ones: what is said of them",
        setting=(
            "Small networks on digits, and a small GPT on sums, trained with `ConvergenceHealth` for 20 to 200 steps from the seeds "
            f"{wanted[0]} to {wanted[-1]}, about eight measurements in a run; a seed chooses the samples, the weights and their order. "
            "A hit: the finding of the illness stands in the report at the end, with its level and its words. An accusation: at any time "
            "of the run there was a warning or an alert. The runs are in recipes/lab/health." + kept.words
        ),
        checks=[_check(case, results[case.name]) for case in cases],
        tables={
            "Runs with an illness": [_sick_row(case, results[case.name]) for case in sick],
            "Healthy runs": [_healthy_row(case, results[case.name]) for case in healthy],
        },
        data={"runs": [each.to_json() for each in found]},
    )


def _check(case: GalleryCase, results: Sequence[CaseResult]) -> Check:
    number = len(results)
    if case.healthy:
        accused = sum(bool(each.above) for each in results)
        return Check(
            f"{case.name}: nothing above notice is said", SOURCE, not accused, f"accused in {accused} of {number}"
        )
    hits = sum(each.hit for each in results)
    wanted = " or ".join(f"{each.name} ({each.level})" for each in case.said)
    return Check(f"{case.name}: {wanted} is said", SOURCE, hits == number, f"in {hits} of {number}")


def _sick_row(case: GalleryCase, results: Sequence[CaseResult]) -> dict[str, Any]:
    named = {each.name for each in case.said}
    when = [each.when for each in results if each.when is not None]
    return {
        "run": case.name,
        "illness": case.what,
        "said (first seed)": results[0].sentence or "nothing",
        "first said at step": _span(when),
        "of steps": _span([each.steps for each in results]),
        "hits": f"{sum(each.hit for each in results)} of {len(results)}",
        "said as well, above notice": ", ".join(sorted({name for each in results for name in each.above} - named))
        or "nothing",
    }


def _healthy_row(case: GalleryCase, results: Sequence[CaseResult]) -> dict[str, Any]:
    return {
        "run": case.name,
        "what it is": case.what,
        "accusations": f"{sum(bool(each.above) for each in results)} of {len(results)}",
        "of what": next((each.sentence for each in results if each.sentence), "nothing"),
    }


def _span(numbers: Sequence[int]) -> str:
    if not numbers:
        return "never"
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
