"""`lightning-conv lab health_forecast`: the error of the forecasts of the loss, by share of the run, against the cheapest ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from lightning_conv.health.kernel.forecast_record import LEAST, USEFUL
from lightning_conv.health.wording import percent
from lightning_conv.recipes.lab.health.forecast_run import (
    AHEAD,
    MEASUREMENTS,
    Forecast,
    ForecastTrack,
    middle,
    track_run,
)
from lightning_conv.recipes.lab.health.kept_results import KeptResults, grouped
from lightning_conv.recipes.lab.health.step_tables import ENOUGH
from lightning_conv.recipes.lab.health.study_plan import LOSSES, NETWORKS, OPTIMIZERS
from lightning_conv.recipes.lab.health.study_runs import Network, StudyRun
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.recipes.lab.shares import Share

SMALL: dict[str, Any] = {"seeds": 1, "networks": ["mlp"], "most": 3}
"""Settings with which `run` takes seconds."""

SOURCE = "docs/health.md"
SINCE, NEAR, MOST_RUNS = 0.3, 0.25, 0.8
"""The goal: from this share of a run on, the median error is at most the second number in this share of the runs."""

PARTS = ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0))
RATIOS = (0.1, 0.3)
SHARE = 3
"""Of so many seeds the networks that are no perceptrons have one."""

WAYS: dict[str, Callable[[Forecast], float]] = {
    "forecast": lambda each: each.error,
    "the loss stays": lambda each: each.error_unchanged,
    "it falls by the same factor": lambda each: each.error_extrapolated,
}


def run(
    *,
    seeds: int = 6,
    first_seed: int = 100,
    networks: list[Network] | None = None,
    most: int | None = None,
    keep: str | None = None,
) -> Report:
    """Forecast the loss of the probe in runs of several networks, losses and optimizers, and compare.

    Cost: about four minutes on one core with the default settings.

    Args:
        seeds: Number of seeds of the perceptrons; the other networks have a third of them.
        first_seed: The first one.
        networks: Names of networks; None: all.
        most: Largest number of runs of a network; None: all.
        keep: File in which every run is kept, one a line; None: nothing is kept.

    Raises:
        ValueError: There is no seed, or a network has no such name.
    """
    if seeds < 1:
        raise ValueError(f"seeds: {seeds}; need 1 or more")
    if unknown := set(networks or ()) - set(NETWORKS):
        raise ValueError(f"networks: {', '.join(sorted(unknown))}; choose from {', '.join(NETWORKS)}")
    todo = [each for network in networks or NETWORKS for each in _planned(network, seeds, first_seed)[:most]]
    kept = KeptResults(None if keep is None else Path(keep))
    tracks = kept.results(
        todo,
        track_run,
        write=ForecastTrack.to_json,
        read=ForecastTrack.from_json,
        title="runs with forecasts",
        seconds=1.0,
    )
    well = [each for each in tracks if each.ended_well]
    return Report(
        name="health_forecast",
        title="Forecasts of the loss: how far off they are",
        setting=(
            "The networks, data, losses and optimizers of [the study of steps](health_step.md), at ratios of "
            f"{RATIOS[0]:g} and {RATIOS[1]:g} at the start (the other networks: {RATIOS[1]:g} and mini-batches), seeds {first_seed} to "
            f"{first_seed + seeds - 1} (the other networks: {max(1, seeds // SHARE)} of them). {MEASUREMENTS} times in a run the loss "
            f"of the probe {AHEAD[0]} and {AHEAD[1]} measurements later, 5 and 20 % of the run, is forecast from the present kernel. "
            f"Errors are relative to the loss that came. {len(well)} of {len(tracks)} runs ended below their start and are scored. By "
            f"its own rule the product shows a forecast of the next measurement after {LEAST} earlier ones with a median error of at "
            f"most {percent(USEFUL)} that is not above that of the loss that stays." + kept.words
        ),
        checks=_checks(well),
        tables={
            "Median error over the runs of each run's median error, by share of the run": _by_share(well),
            f"Runs whose median error is at most {percent(NEAR)}, from {percent(SINCE)} of the run on, one measurement ahead": _by_kind(
                well
            ),
            "What the product would have shown": _shown(well),
        },
    )


def _planned(network: Network, seeds: int, first: int) -> list[StudyRun]:
    alone = network == "mlp"
    number = seeds if alone else max(1, seeds // SHARE)
    losses = LOSSES[1:] if network == "gpt" else LOSSES
    batches, ratios = ((True, False), RATIOS) if alone else ((False,), RATIOS[1:])
    return [
        StudyRun(network=network, loss=loss, optimizer=optimizer, full_batch=full, ratio=ratio, seed=seed)
        for seed in range(first, first + number)
        for loss, optimizer, full, ratio in product(losses, OPTIMIZERS, batches, ratios)
    ]


def _near(tracks: Sequence[ForecastTrack], way: Callable[[Forecast], float], ahead: int = 1) -> Share:
    """Return the share of the runs whose median error is small enough."""
    errors = [middle(way(each) for each in track.some(ahead, SINCE)) for track in tracks if track.some(ahead, SINCE)]
    return Share.among(each <= NEAR for each in errors)


def _checks(tracks: Sequence[ForecastTrack]) -> list[Check]:
    checks = []
    for ahead in AHEAD:
        found = {name: _near(tracks, way, ahead) for name, way in WAYS.items()}
        ours = found["forecast"]
        seen = "; ".join(f"{name}: {share.words}" for name, share in found.items())
        what = "the next measurement" if ahead == 1 else f"{ahead} measurements ahead"
        goal = f"the median error is at most {percent(NEAR)} in {percent(MOST_RUNS)} of the runs"
        claim = f"{what}: from {percent(SINCE)} of the run on {goal}"
        met = ours.of > 0 and ours.value >= MOST_RUNS
        checks.append(Check(claim, SOURCE, met, seen, must=ours.of >= ENOUGH))
    shown = _runs_shown(tracks)
    near = Share.among(middle(each.error for each in some) <= NEAR for some in shown)
    claim = f"what the product shows: the median error is at most {percent(NEAR)} in {percent(MOST_RUNS)} of the runs"
    met = near.of > 0 and near.value >= MOST_RUNS
    checks.append(Check(claim, SOURCE, met, near.words, must=near.of >= ENOUGH))
    return checks


def _runs_shown(tracks: Sequence[ForecastTrack]) -> list[list[Forecast]]:
    found = [[each for each in track.some(1, SINCE) if each.shown] for track in tracks]
    return [each for each in found if each]


def _by_share(tracks: Sequence[ForecastTrack]) -> list[dict[str, Any]]:
    rows = []
    for ahead, (since, until) in product(AHEAD, PARTS):
        parts = [track.some(ahead, since, until) for track in tracks]
        row: dict[str, Any] = {"measurements ahead": ahead, "share of the run": f"{percent(since)} to {percent(until)}"}
        for name, way in WAYS.items():
            row[name] = f"{100 * middle(middle(map(way, part)) for part in parts if part):.3g} %"
        rows.append(row)
    return rows


def _by_kind(tracks: Sequence[ForecastTrack]) -> list[dict[str, Any]]:
    groups = grouped(tracks, lambda each: (each.run.network, each.run.loss, each.run.optimizer, each.run.full_batch))
    return [
        {"network": network, "loss": loss, "optimizer": optimizer, "batches": "full" if full else "mini"}
        | {name: _near(some, way).words for name, way in WAYS.items()}
        for (network, loss, optimizer, full), some in groups.items()
    ]


def _shown(tracks: Sequence[ForecastTrack]) -> list[dict[str, Any]]:
    rows = []
    groups = {"all": list(tracks)} | grouped(tracks, lambda each: f"{each.run.loss}, {each.run.optimizer}")
    for name, some in groups.items():
        every = [each for track in some for each in track.some(1, SINCE)]
        shown = [each for each in every if each.shown]
        rows.append(
            {
                "runs": name,
                f"shown, from {percent(SINCE)} of the run on": Share.among(each.shown for each in every).words,
                f"of those shown, within {percent(NEAR)}": Share.among(each.error <= NEAR for each in shown).words,
                "median error": f"{100 * middle(each.error for each in shown):.3g} %",
                "the loss stays": f"{100 * middle(each.error_unchanged for each in shown):.3g} %",
                "it falls by the same factor": f"{100 * middle(each.error_extrapolated for each in shown):.3g} %",
            }
        )
    return rows
